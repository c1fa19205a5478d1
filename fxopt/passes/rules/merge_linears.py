"""Linears that share an input become one autograd node, with the op that makes the input.

Parameters stay where they are. A compiler does this by recomputation and scheduling of its own, so
the rule serves eager execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.gated_activation_linear import gated_activation_linear
from fxopt.kernels.linears import by_input, linears
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.norm_modulate_segments_linears import norm_modulate_segments_linears
from fxopt.passes import algebra, ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Call, Reason, Rule


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    shared = anchor.args[0]
    assert isinstance(shared, fx.Node)
    group = linears_on(shared)
    if min(group) is not anchor or not all(map(has_matrix, group)):
        return
    others = [u for u in shared.users if u not in group]
    segments = segment_operands(shared)
    producer = segments or norm_operands(shared)
    if producer is not None and not others:
        composite = norm_modulate_linears if segments is None else norm_modulate_segments_linears
        yield _bind_norm(shared, composite, producer, group)
        return
    if len(group) == 1 and not others:
        binding = _bind_activation(anchor, shared)
        if binding is not None:
            yield binding
            return
    if producer is not None:
        why = f"the normed tensor is also used by {others[0].name} and is kept for it"
        yield Reason(why, shared)
    if len(group) > 1 or len(split_outputs(group)[0]) > 1:
        yield bind_linears(shared, group, linears, "linears")


def linears_on(x: fx.Node) -> list[fx.Node]:
    """Those that have `x` for their input."""
    return [u for u in x.users if ir.is_call(u, ir.LINEAR) and u.args[0] is x]


def has_matrix(linear: fx.Node) -> bool:
    """Whether its weight is one."""
    weight: Any = linear.args[1]
    return len(ir.shape(weight)) == 2


def is_stored_by_output(linear: fx.Node) -> bool:
    """Whether its weight lies in memory as [out, in], not as a transposed view of [in, out]."""
    weight = ir.tensor(linear.args[1])
    assert weight is not None
    return not by_input(weight)


def norm_operands(y: fx.Node) -> tuple[Any, ...] | None:
    """Arguments of the norm_modulate that makes `y`, if one does or could."""
    if ir.is_call(y, operator.getitem) and y.args[1] == 0 and ir.is_call(y.args[0], norm_modulate):
        return y.args[0].args
    norm = algebra.as_norm(y)
    if norm is None:
        return None
    x = norm.x
    operands = (x, None, None, norm.weight, norm.bias, None, None, None)
    return (*operands, norm.kind, norm.eps, norm.weight_offset, 0.0, ir.dtype(x), ir.dtype(y))


def segment_operands(y: fx.Node) -> tuple[Any, ...] | None:
    """Arguments of the norm_modulate_segments that makes `y`, if one does."""
    op = y.args[0] if ir.is_call(y, operator.getitem) and y.args[1] == 0 else None
    return op.args if ir.is_call(op, norm_modulate_segments) else None


def parameters(group: list[fx.Node]) -> tuple[list[Any], list[Any]]:
    named = [ir.arguments(n) for n in group]
    return [a["weight"] for a in named], [a["bias"] for a in named]


def split_outputs(group: list[fx.Node], of_rows: bool = False) -> tuple[list[fx.Node], list[int]]:
    """The outputs of the group's products, and for each its linear and rows of weight.

    A linear whose output is only split counts with its pieces, not as a whole; one of a row per
    sample only with `of_rows`.
    """
    outputs: list[fx.Node] = []
    pieces: list[int] = []

    def visit(node: fx.Node, i: int, start: int, stop: int) -> None:
        parts = _parts(node, of_rows)
        if parts is None:
            outputs.append(node)
            pieces.extend((i, start, stop))
            return
        for part in parts:
            size = ir.shape(part)[-1]
            visit(part, i, start, start + size)
            start += size

    for i, linear in enumerate(group):
        visit(linear, i, 0, ir.shape(linear)[-1])
    return outputs, pieces


def _parts(node: fx.Node, of_rows: bool) -> list[fx.Node] | None:
    """What `node` is split into along the last dim, if that is all that happens to it."""
    sizes = ir.shape(node)
    is_row = len(sizes) < 3 or ir.same(sizes[-2], 1)
    if len(node.users) != 1 or (is_row and not of_rows):
        return None  # one row per sample: six small products would cost more than one join
    split = next(iter(node.users))
    if not ir.is_call(split, *ir.SPLITS):
        return None
    if ir.arguments(split)["dim"] % len(ir.shape(node)) != len(ir.shape(node)) - 1:
        return None
    parts = ir.results(split)
    whole = list(parts) == list(range(len(split.meta["val"]))) and len(split.users) == len(parts)
    fixed = all(isinstance(ir.shape(p)[-1], int) for p in parts.values())
    return list(parts.values()) if whole and fixed else None


def _bind_norm(
    y: fx.Node, composite: Any, operands: tuple[Any, ...], group: list[fx.Node]
) -> Binding:
    num_tensors = 8 if composite is norm_modulate_linears else 9  # with the index
    tensors, settings = operands[:num_tensors], operands[num_tensors:]
    weights, biases = parameters(group)
    products, pieces = split_outputs(group)
    h = ir.results(y.args[0]).get(1) if ir.is_call(y, operator.getitem) else None
    listed = (*tensors, *weights, *biases)
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        operands, w, b = ([given[n] for n in nodes] for nodes in (tensors, weights, biases))
        op = call(composite, *operands, *settings, w, b, pieces)
        outs = call(operator.getitem, op, 0)
        results = [call(operator.getitem, outs, i) for i in range(len(products))]
        if h is not None:
            results.append(call(operator.getitem, op, 1))
        return tuple(results)

    outputs = (*products, h) if h is not None else tuple(products)
    carries = (y, h) if h is not None else (y,)
    op = "norm_modulate" if composite is norm_modulate_linears else "norm_modulate_segments"
    return Binding(group[0], inputs, outputs, emit, op, regroups=True, carries=carries)


def activation_operands(shared: fx.Node) -> tuple[Any, Any] | None:
    """The gated_activation that makes `shared`, and what is joined before it, if one does."""
    activation, beside = shared, None
    if ir.is_call(shared, aten.cat.default) and len(shared.args[0]) == 2:
        dim = ir.arguments(shared)["dim"] % len(ir.shape(shared))
        if dim != len(ir.shape(shared)) - 1:
            return None
        beside, activation = shared.args[0]
    if not ir.is_call(activation, gated_activation) or len(activation.users) != 1:
        return None
    if beside is not None and ir.dtype(beside) != ir.dtype(activation):
        return None
    return activation, beside


def _bind_activation(linear: fx.Node, shared: fx.Node) -> Binding | None:
    found = activation_operands(shared)
    if found is None:
        return None
    activation, beside = found
    of_op = ir.arguments(activation)
    settings = of_op["activation"], of_op["packing"]
    (weight,), (bias,) = parameters([linear])
    listed = (of_op["gate"], of_op["up"], beside, of_op["gate_bias"], weight, bias)
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        gate, up, *others = (given[n] for n in listed)
        return call(gated_activation_linear, gate, up, *settings, *others)

    return Binding(
        linear, inputs, (linear,), emit, "gated_activation", regroups=True, carries=(activation,)
    )


def bind_linears(
    x: fx.Node, group: list[fx.Node], composite: Any, op: str, of_rows: bool = False
) -> Binding:
    """`composite` in place of the linears of `group`, of what makes their outputs out of x."""
    weights, biases = parameters(group)
    products, pieces = split_outputs(group, of_rows)
    inputs = tuple(dict.fromkeys(n for n in (x, *weights, *biases) if n is not None))

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        w, b = [given[w] for w in weights], [given[b] for b in biases]
        outs = call(composite, given[x], w, b, pieces)
        return tuple(call(operator.getitem, outs, i) for i in range(len(products)))

    return Binding(group[0], inputs, tuple(products), emit, op, regroups=True)


RULE = Rule(
    name="merge_linears",
    version=1,
    anchors=(ir.LINEAR,),
    propose=propose,
    compiled=False,
)
