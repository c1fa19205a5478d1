"""softmax(q k^T * scale + mask) v, however spelled, to scaled_dot_product_attention.

The two products are read as index expressions, so that matmul, bmm, baddbmm and einsum, with keys
transposed by whatever views, are one form.

Letters: s queries, t keys, c the dim that is summed over, other letters batch and heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.passes import algebra, ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Call, Reason, Rule

SOFTMAX = (aten.softmax.int, aten._softmax.default)
SPLITS = (aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints)
# A score that is added to such a number leaves it as it is: adding the number and writing it over
# the score are then one thing, also where a whole row is masked.
ABSORBING = -1e30


@dataclass(frozen=True)
class Operand:
    """`node` with its dims in the given order, times `factor`."""

    node: fx.Node
    order: tuple[int, ...]
    factor: float = 1.0

    def emit(self, call: Call, node: fx.Node, num_heads: int | None) -> fx.Node:
        if self.order != tuple(range(len(self.order))):
            node = call(aten.permute.default, node, list(self.order))
        if num_heads is not None:
            node = call(aten.unflatten.int, node, 0, [-1, num_heads])
        return node


@dataclass(frozen=True)
class Product:
    """A product of two tensors over one index; `dims` name those of a, b and the result."""

    node: fx.Node
    a: fx.Node
    b: fx.Node
    dims: tuple[str, str, str]

    def operand(self, letter: str, order: str) -> Operand | None:
        """The operand that has `letter`, its dims in `order`."""
        node, dims = (self.a, self.dims[0]) if letter in self.dims[0] else (self.b, self.dims[1])
        if sorted(dims) != sorted(order):
            return None
        return _peeled(Operand(node, tuple(dims.index(x) for x in order)))


@dataclass(frozen=True)
class Scores:
    """q @ k^T * scale + mask.

    keep: whether a bool mask is True where attention is allowed. fill: the score elsewhere.
    num_heads: heads that are split off the batch only after the product; None if there are none.
    """

    q: Operand
    k: Operand
    scale: float = 1.0
    mask: fx.Node | None = None
    keep: bool = True
    fill: float = float("-inf")
    num_heads: int | None = None


def propose(softmax: fx.Node) -> Iterator[Binding | Reason]:
    x, dim = softmax.args[0], ir.arguments(softmax)["dim"]
    assert isinstance(x, fx.Node)
    rank = len(ir.shape(x))
    scores = read_scores(x)
    if isinstance(scores, Reason):
        yield scores
        return
    if scores is None:
        found = scores_behind(ir.skip_casts(x)) if _attended(softmax) is not None else None
        if found is not None and not ir.mutates(found[1]):  # `writes` speaks of it
            why = f"{found[1].target}, between scores and softmax, is no scale and no mask"
            yield Reason(why, found[1])
        return  # a softmax over something else
    if dim % rank != rank - 1:
        yield Reason(f"softmax is over dim {dim}, attention is over the last", softmax)
        return
    product = _attended(softmax)
    if product is None:
        yield Reason("the softmax does not go into one product with the values alone", softmax)
        return
    batch, s, t = product.dims[0][:-2], product.dims[0][-2], product.dims[0][-1]
    (d,) = set(product.dims[1]) - set(batch + t)
    v = product.operand(d, batch + t + d)
    if v is None or v.factor != 1.0:
        yield Reason("the values are more than a view", product.node)
        return
    order = tuple((batch + s + d).index(x) for x in product.dims[2])
    k_before, v_before = _unrepeated(scores.k), _unrepeated(v)
    if k_before is not None and v_before is not None:
        grouped = replace(scores, k=k_before)
        yield _bind(softmax, product.node, grouped, v_before, order, gqa=True)
    yield _bind(softmax, product.node, scores, v, order, gqa=False)


def read_product(node: fx.Node) -> Product | None:
    if ir.is_call(node, aten.einsum.default):
        equation, operands = node.args[:2]
        inputs, _, out = str(equation).replace(" ", "").partition("->")
        dims = (*inputs.split(","), out)
        if len(dims) != 3 or any(len(set(x)) != len(x) or not x.isalpha() for x in dims):
            return None
        a, b = operands
    elif ir.is_call(node, aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
        a, b = node.args[-2:]
        batch = "ABEFGH"[: len(ir.shape(node)) - 2]
        dims = (batch + "sc", batch + "ct", batch + "st")
    elif ir.is_call(node, ir.LINEAR) and ir.arguments(node)["bias"] is None:
        (a, b), dims = node.args[:2], ("sc", "tc", "st")
    else:
        return None
    ranks = [len(x) for x in dims[:2]]
    if ranks != [len(ir.shape(a)), len(ir.shape(b))]:
        return None  # a product of unequal ranks broadcasts
    shared = set(dims[0]) & set(dims[1])
    return Product(node, a, b, dims) if len(shared - set(dims[2])) == 1 else None


def _peeled(operand: Operand) -> Operand:
    """The operand behind exchanges of dims, copies and scalar factors."""
    node, order, factor = operand.node, operand.order, operand.factor
    rank = len(order)
    while True:
        pair = algebra.factors(node) or _quotient(node)
        if ir.is_call(node, *ir.COPIES):
            node = node.args[0]
        elif ir.is_call(node, aten.transpose.int):
            i, j = (dim % rank for dim in node.args[1:])
            order = tuple({i: j, j: i}.get(o, o) for o in order)
            node = node.args[0]
        elif ir.is_call(node, aten.permute.default):
            order = tuple(node.args[1][o] % rank for o in order)
            node = node.args[0]
        elif pair is not None and isinstance(pair[1], (int, float)):
            node, factor = pair[0], factor * pair[1]
        else:
            return Operand(algebra.skip_upcasts(node), order, factor)


def _quotient(node: fx.Node) -> tuple[Any, float] | None:
    """(a, 1 / b) if `node` is a / b for a number b."""
    if ir.is_call(node, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        return node.args[0], 1.0 / node.args[1]
    return None


def read_scores(node: fx.Node) -> Scores | Reason | None:
    """Read the softmax's input backwards to the product of queries and keys."""
    node = ir.skip_casts(node)
    product = read_product(node)
    if product is not None:
        return _unmasked(product)
    if ir.is_call(node, aten.masked_fill.Scalar):
        return _masked(node.args[0], node.args[1], node.args[2], keep=False)
    if ir.is_call(node, aten.where.ScalarOther, aten.where.self):
        return _masked(node.args[1], node.args[0], node.args[2], keep=True)
    if ir.is_call(node, *SPLITS) and len(ir.shape(node)) == 4:
        found, num_heads = read_scores(node.args[0]), ir.shape(node)[1]
        if not isinstance(found, Scores) or found.mask is not None or len(found.q.order) != 3:
            return None
        return replace(found, num_heads=num_heads) if isinstance(num_heads, int) else None
    pair = algebra.factors(node) or _quotient(node)
    if pair is not None:
        number = next((p for p in pair if isinstance(p, (int, float))), None)
        scaled = next((p for p in pair if isinstance(p, fx.Node)), None)
        return _scaled(scaled, number) if number is not None and scaled is not None else None
    added = algebra.terms(node)
    if added is not None and all(isinstance(p, fx.Node) for p in added):
        for inner, mask in (added, added[::-1]):
            found = read_scores(inner)
            if not isinstance(found, Scores) or found.mask is not None:
                continue
            if algebra.broadcasts_into(mask, node):
                return replace(found, mask=mask)
    return None


def scores_behind(node: fx.Node) -> tuple[Scores, fx.Node] | None:
    """The scores that `node` is computed from one by one, and what is first done to them."""
    stack, seen = [node], {node}
    while stack:
        outer = stack.pop()
        for inner in outer.all_input_nodes:
            if inner in seen or ir.tensor(inner) is None:
                continue
            scores = read_scores(inner)
            if isinstance(scores, Scores):
                return scores, outer
            if ir.same(ir.shape(inner), ir.shape(node)) and not ir.is_call(inner, *ir.MATERIALIZED):
                seen.add(inner)
                stack.append(inner)
    return None


def _unmasked(product: Product) -> Scores | None:
    a = ir.arguments(product.node)
    *batch, s, t = list(product.dims[2])
    c = (set(product.dims[0]) & set(product.dims[1]) - set(product.dims[2])).pop()
    q = product.operand(s, "".join(batch) + s + c)
    k = product.operand(t, "".join(batch) + t + c)
    if q is None or k is None:
        return None
    mask = a["self"] if a.get("beta", 0) == 1 else None
    return Scores(q, k, q.factor * k.factor * float(a.get("alpha", 1.0)), mask)


def _scaled(inner: fx.Node, factor: float) -> Scores | Reason | None:
    found = read_scores(inner)
    if isinstance(found, Scores):
        # A mask that was added before the scaling would be scaled as well.
        return replace(found, scale=found.scale * factor) if found.mask is None else None
    return found


def _masked(inner: Any, mask: Any, value: Any, *, keep: bool) -> Scores | Reason | None:
    found = read_scores(inner)
    if not isinstance(found, Scores) or found.mask is not None:
        return None
    if ir.is_call(value, aten.full_like.default, aten.full.default):
        value = value.args[1]
    if isinstance(value, (int, float)) and value <= ABSORBING:
        return replace(found, mask=mask, keep=keep, fill=value)
    shown = "a tensor" if isinstance(value, fx.Node) else value
    why = f"scores are masked with {shown}, not -inf: rows that are masked whole would differ"
    return Reason(why, inner)


def _attended(softmax: fx.Node) -> Product | None:
    """The product of the softmax and the values, if it goes there and nowhere else."""
    node = softmax
    while len(node.users) == 1:
        user = next(iter(node.users))
        product = read_product(user)
        if product is not None and node in (product.a, product.b) and product.a is not product.b:
            if node is product.b:
                product = replace(product, a=product.b, b=product.a, dims=_exchanged(product.dims))
            summed = set(product.dims[0]) & set(product.dims[1]) - set(product.dims[2])
            return product if summed == {product.dims[0][-1]} else None
        if not ir.is_call(user, *ir.CASTS, *ir.COPIES, *SPLITS):
            return None
        if not ir.same(ir.shape(user)[-2:], ir.shape(node)[-2:]):
            return None
        node = user
    return None


def _exchanged(dims: tuple[str, str, str]) -> tuple[str, str, str]:
    return dims[1], dims[0], dims[2]


def _unrepeated(heads: Operand) -> Operand | None:
    """The heads before they were repeated for grouped queries."""
    found = unrepeated(heads.node)
    if found is None or found[1] != heads.order[1] or len(heads.order) != 4:
        return None
    return replace(heads, node=found[0])


def unrepeated(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim) if `node` is x with each item of `dim` repeated."""
    if ir.is_call(node, aten.repeat_interleave.self_int):
        a = ir.arguments(node)
        return None if a["dim"] is None else (a["self"], a["dim"] % len(ir.shape(node)))
    if not ir.is_call(node, *SPLITS):
        return None
    expanded = ir.skip_copies(node.args[0])
    if not ir.is_call(expanded, aten.expand.default, aten.repeat.default):
        return None
    inner, repeats = expanded.args[:2]
    if not ir.is_call(inner, aten.unsqueeze.default):
        return None
    dim = inner.args[1] % len(ir.shape(inner)) - 1
    others = repeats[: dim + 1] + repeats[dim + 2 :]
    if expanded.target is aten.repeat.default and any(r != 1 for r in others):
        return None
    return inner.args[0], dim


def _bind(
    softmax: fx.Node,
    out: fx.Node,
    scores: Scores,
    v: Operand,
    order: tuple[int, ...],
    *,
    gqa: bool,
) -> Binding:
    operands = (scores.q, scores.k, v)
    mask_nodes = () if scores.mask is None else (scores.mask,)
    inputs = tuple(dict.fromkeys((*(o.node for o in operands), *mask_nodes)))
    dtype, num_heads = ir.dtype(scores.q.node), scores.num_heads

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True))
        q, k, v = (o.emit(call, given[o.node], num_heads) for o in operands)
        mask = None
        if scores.mask is not None:
            mask = _emit_mask(call, given[scores.mask], scores, dtype)
        result = call(
            ir.SDPA, q, k, v, mask, 0.0, False, **{"scale": scores.scale, "enable_gqa": gqa}
        )
        if num_heads is not None and len(order) == 3:
            result = call(aten.flatten.using_ints, result, 0, 1)
        if order != tuple(range(len(order))):
            result = call(aten.permute.default, result, list(order))
        return result if ir.dtype(out) == dtype else call(aten.to.dtype, result, ir.dtype(out))

    return Binding(softmax, inputs, (out,), emit, "attention")


def _emit_mask(call: Call, mask: fx.Node, scores: Scores, dtype: torch.dtype) -> fx.Node:
    assert scores.mask is not None
    if ir.dtype(scores.mask) != torch.bool:
        return call(aten.to.dtype, mask, dtype)
    if math.isinf(scores.fill):
        return mask if scores.keep else call(aten.logical_not.default, mask)
    fill = max(scores.fill, torch.finfo(dtype).min)
    values = (0.0, fill) if scores.keep else (fill, 0.0)
    return call(aten.to.dtype, call(aten.where.Scalar, mask, *values), dtype)


RULE = Rule(
    name="attention",
    version=1,
    anchors=SOFTMAX,
    propose=propose,
)
