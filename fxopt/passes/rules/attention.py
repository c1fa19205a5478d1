"""softmax(q k^T * scale + mask) v, however spelled, to scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.passes import algebra, ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Call, Reason, Rule

SDPA = aten.scaled_dot_product_attention.default
MATMULS = (aten.matmul.default, aten.bmm.default)
# A score that is added to such a number leaves it as it is: adding the number and writing it over
# the score are then one thing, also where a whole row is masked.
ABSORBING = -1e30


@dataclass(frozen=True)
class Scores:
    """q @ k^T * scale + mask.

    keep: whether a bool mask is True where attention is allowed. fill: the score elsewhere.
    """

    q: fx.Node
    k_T: fx.Node
    scale: float = 1.0
    mask: fx.Node | None = None
    keep: bool = True
    fill: float = float("-inf")


def propose(softmax: fx.Node) -> Iterator[Binding | Reason]:
    a = ir.arguments(softmax)
    x = softmax.args[0]
    assert isinstance(x, fx.Node)
    rank = len(ir.shape(x))
    scores = read_scores(x)
    if scores is None:
        return  # a softmax over something else
    if a["dim"] % rank != rank - 1:
        yield Reason(f"softmax is over dim {a['dim']}, attention is over the last", softmax)
        return
    end = _attended(softmax)
    if end is None:
        yield Reason("the softmax does not go into one product with the values alone", softmax)
        return
    product, v = end
    k = _transposed(scores.k_T)
    if k is None:
        yield Reason("the keys are not transposed by a view of the last two dims", scores.k_T)
        return
    repeated = _unrepeated(k), _unrepeated(v)
    if repeated[0] is not None and repeated[1] is not None:
        yield _bind(softmax, product, scores, repeated[0], repeated[1], gqa=True)
    yield _bind(softmax, product, scores, k, v, gqa=False)


def read_scores(node: fx.Node) -> Scores | None:
    """Read the softmax's input backwards to the product of queries and keys."""
    node = ir.skip_casts(node)
    if ir.is_call(node, *MATMULS):
        q, k_T = node.args
        return Scores(q, k_T)  # type: ignore[arg-type]
    if ir.is_call(node, aten.baddbmm.default):
        return _read_baddbmm(node)
    if ir.is_call(node, aten.masked_fill.Scalar):
        inner, mask, value = node.args
        return _masked(inner, mask, value, keep=False)
    if ir.is_call(node, aten.where.ScalarOther, aten.where.self):
        mask, inner, value = node.args
        return _masked(inner, mask, value, keep=True)
    if ir.is_call(node, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        return _scaled(read_scores(node.args[0]), 1.0 / node.args[1])  # type: ignore[arg-type]
    pair = algebra.factors(node)
    if pair is not None:
        number = next((p for p in pair if isinstance(p, (int, float))), None)
        inner = next((p for p in pair if isinstance(p, fx.Node)), None)
        return _scaled(read_scores(inner), number) if number is not None and inner else None
    pair = algebra.terms(node)
    if pair is not None and all(isinstance(p, fx.Node) for p in pair):
        for inner, mask in (pair, pair[::-1]):
            found = read_scores(inner)
            if found is not None and found.mask is None and algebra.broadcasts_into(mask, node):
                return replace(found, mask=mask)
    return None


def _read_baddbmm(node: fx.Node) -> Scores:
    a = ir.arguments(node)
    mask = a["self"] if a["beta"] == 1 else None
    return Scores(a["batch1"], a["batch2"], float(a["alpha"]), mask)


def _scaled(scores: Scores | None, factor: float) -> Scores | None:
    # A mask that was added before the scaling would be scaled as well.
    if scores is None or scores.mask is not None:
        return None
    return replace(scores, scale=scores.scale * factor)


def _masked(inner: Any, mask: Any, value: Any, *, keep: bool) -> Scores | None:
    found = read_scores(inner)
    if found is None or found.mask is not None or not isinstance(value, (int, float)):
        return None
    return replace(found, mask=mask, keep=keep, fill=value) if value <= ABSORBING else None


def _attended(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(product, v) if the weights go into weights @ v and nowhere else."""
    node = softmax
    while len(node.users) == 1:
        user = next(iter(node.users))
        if ir.is_call(user, *MATMULS):
            weights, v = user.args
            return (user, v) if weights is node and v is not node else None  # type: ignore[return-value]
        if not ir.is_call(user, *ir.CASTS, *ir.COPIES):
            return None
        node = user
    return None


def _transposed(k_T: fx.Node) -> fx.Node | None:
    """k, if `k_T` is k with its last two dims exchanged by a view."""
    k_T = ir.skip_copies(k_T)
    rank = len(ir.shape(k_T))
    if ir.is_call(k_T, aten.transpose.int):
        dims = {d % rank for d in k_T.args[1:]}  # type: ignore[operator]
        return k_T.args[0] if dims == {rank - 2, rank - 1} else None  # type: ignore[return-value]
    if ir.is_call(k_T, aten.permute.default):
        order = [d % rank for d in k_T.args[1]]  # type: ignore[operator, union-attr]
        identity = [*range(rank - 2), rank - 1, rank - 2]
        return k_T.args[0] if order == identity else None  # type: ignore[return-value]
    return None


def _unrepeated(k: fx.Node) -> fx.Node | None:
    """The heads before they were repeated for grouped queries: [B, 1, n] expand, then merge."""
    if not ir.is_call(k, aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return None
    expanded = ir.skip_copies(k.args[0])  # type: ignore[arg-type]
    if not ir.is_call(expanded, aten.expand.default):
        return None
    inner = expanded.args[0]
    if not ir.is_call(inner, aten.unsqueeze.default) or inner.args[1] != 2:  # type: ignore[union-attr]
        return None
    return inner.args[0]  # type: ignore[union-attr, return-value]


def _bind(
    softmax: fx.Node, product: fx.Node, scores: Scores, k: fx.Node, v: fx.Node, *, gqa: bool
) -> Binding:
    inputs = tuple(dict.fromkeys(n for n in (scores.q, k, v, scores.mask) if n is not None))
    dtype, out = ir.dtype(scores.q), ir.dtype(product)

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True))
        mask = given[scores.mask] if scores.mask is not None else None
        if mask is not None and ir.dtype(scores.mask) == torch.bool:  # type: ignore[arg-type]
            mask = _emit_mask(call, mask, scores, dtype)
        elif mask is not None:
            mask = call(aten.to.dtype, mask, dtype)
        args = (given[scores.q], given[k], given[v], mask, 0.0, False)
        result = call(SDPA, *args, **{"scale": scores.scale, "enable_gqa": gqa})
        return result if out == dtype else call(aten.to.dtype, result, out)

    return Binding(softmax, inputs, (product,), emit, "attention")


def _emit_mask(call: Call, mask: fx.Node, scores: Scores, dtype: torch.dtype) -> fx.Node:
    if scores.fill == float("-inf"):
        return mask if scores.keep else call(aten.logical_not.default, mask)
    fill = max(scores.fill, torch.finfo(dtype).min)
    values = (0.0, fill) if scores.keep else (fill, 0.0)
    return call(aten.to.dtype, call(aten.where.Scalar, mask, *values), dtype)


RULE = Rule(
    name="attention",
    version=1,
    anchors=(aten.softmax.int, aten._softmax.default),
    propose=propose,
)
