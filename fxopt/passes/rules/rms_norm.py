"""Decomposed RMSNorm and LayerNorm chains to one op.

The reduction over the last dim is the anchor. What it reads, behind squares and casts, is x; every
later node of x's shape that depends on the reduction may be the end. Which chain of casts, weight
and eps stands between them does not matter: the region is run.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.passes import algebra, ir
from fxopt.passes.ir import aten
from fxopt.passes.regions import between, side_inputs
from fxopt.passes.rule import Binding, Call, Reason, Rule

MAX_CHAIN = 24


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    norm = algebra.as_norm(anchor)
    if norm is not None:  # composite, and its backward is a chain of small kernels all the same
        x = algebra.skip_upcasts(norm.x)
        yield _bind(anchor, anchor, x, norm.kind, norm.eps, norm.weight, norm.bias, 0.0)
        return
    source = _normed_input(anchor)
    if source is None:
        return
    x = source
    reasons = []
    for end, region in _ends(anchor, x):
        sides = side_inputs(region, x)
        if len(sides) > 2 or not all(_is_affine(s, x) for s in sides):
            reasons.append(Reason("the chain mixes in a tensor that is no [D] weight", end))
            continue
        yield from _hypotheses(anchor, end, region, x, sides)
    yield from reasons


def _normed_input(anchor: fx.Node) -> fx.Node | None:
    """x, behind the squares, absolute values, casts and mean subtractions of the reduction."""
    a = ir.arguments(anchor)
    source = anchor.args[0]
    if not isinstance(source, fx.Node) or not ir.is_floating(source):
        return None
    rank = len(ir.shape(source))
    dims = a.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or [d % rank for d in dims] != [rank - 1]:
        return None
    node = ir.skip_casts(source)
    while True:
        inner = node.args[0] if node.op == "call_function" and node.args else None
        if (
            ir.is_call(node, aten.pow.Tensor_Scalar, aten.square.default, aten.abs.default)
            or (ir.is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1])
            or (ir.is_call(node, aten.sub.Tensor) and _is_mean_of(node.args[1], inner))
        ):
            assert isinstance(inner, fx.Node)
            node = ir.skip_casts(inner)
        else:
            return node


def _is_mean_of(mean: object, x: object) -> bool:
    return ir.is_call(mean, aten.mean.dim) and mean.args[0] is x


def _ends(anchor: fx.Node, x: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Nodes of x's shape behind the reduction whose region is closed, the farthest first."""
    reached, frontier = {anchor}, [anchor]
    while frontier and len(reached) < MAX_CHAIN:
        for user in frontier.pop(0).users:
            if user in reached or user.op != "call_function" or user.target in ir.MATERIALIZED:
                continue
            size = ir.shape(user)[:-1] if ir.tensor(user) is not None else None
            if size is not None and ir.same(size, ir.shape(x)[:-1]):
                reached.add(user)
                frontier.append(user)
    for end in sorted(reached, reverse=True):
        if end is anchor or not ir.same(ir.shape(end), ir.shape(x)):
            continue
        region = between(x, end)
        members = set(region)
        if anchor in members and all(
            n is end or all(u in members for u in n.users) for n in region if n in reached
        ):
            yield end, region


def _is_affine(side: Any, x: fx.Node) -> bool:
    """Whether `side` is a [D] vector, possibly with leading dims of 1."""
    sizes = ir.shape(side) if ir.tensor(side) is not None else ()
    return bool(sizes) and ir.same(sizes[-1], ir.shape(x)[-1]) and all(s == 1 for s in sizes[:-1])


def _vector(side: fx.Node, x: fx.Node) -> tuple[fx.Node, float]:
    """(w, o) if `side` is o + w, behind casts and views that only add dims of 1."""
    node, offset = ir.skip_casts(side), 0.0
    while True:
        inner, one = algebra.offset_by_one(node)
        if one and not offset:
            offset = one
        elif ir.is_call(node, *ir.VIEWS) and _is_affine(node.args[0], x):
            inner = node.args[0]
        else:
            return node, offset
        node = ir.skip_casts(inner)


def _hypotheses(
    anchor: fx.Node, end: fx.Node, region: list[fx.Node], x: fx.Node, sides: list[fx.Node]
) -> Iterator[Binding]:
    found = [_vector(side, x) for side in sides]
    vectors, offset = [w for w, _ in found], max([o for _, o in found], default=0.0)
    if any(len(ir.shape(w)) != 1 for w in vectors):
        return
    constants = {a for n in region for a in n.args if isinstance(a, float) and 0 <= a < 0.1}
    subtracts = any(ir.is_call(n, aten.sub.Tensor, aten.var.correction) for n in region)
    weight, bias = (*vectors, None, None)[:2]
    for eps in sorted(constants, reverse=True) or [0.0]:
        for kind in ("layer",) if subtracts else ("rms",):
            yield _bind(anchor, end, algebra.skip_upcasts(x), kind, eps, weight, bias, offset)


def _bind(
    anchor: fx.Node,
    end: fx.Node,
    x: fx.Node,
    kind: str,
    eps: float,
    weight: fx.Node | None,
    bias: fx.Node | None,
    weight_offset: float,
) -> Binding:
    inputs = tuple(n for n in (x, weight, bias) if n is not None)
    dtype, h_dtype = ir.dtype(end), ir.dtype(x)

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True))
        affine = [given[n] if n is not None else None for n in (weight, bias)]
        settings = (kind, eps, weight_offset, 0.0, h_dtype, dtype)
        op = call(norm_modulate, given[x], None, None, *affine, None, None, None, *settings)
        return call(operator.getitem, op, 0)

    return Binding(anchor, inputs, (end,), emit, "norm_modulate")


RULE = Rule(
    name="rms_norm",
    version=1,
    anchors=(
        aten.rms_norm.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim,
        aten.var.correction,
    ),
    propose=propose,
)
