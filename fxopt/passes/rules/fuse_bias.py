"""The bias of a linear is added, and its gradient summed, in the fused op that reads the linear.

The op is a gated residual, or an activation whose result goes into a linear.

The gradient of a bias is a sum over all tokens of a tensor that the op's backward writes anyway. A
compiler fuses that sum by itself, so the rule serves eager execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.passes import ir
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.rules.gated_activation import feeds_a_linear

# Above it the backward's four sums per feature (gate, scale, shift, bias) leave the registers.
MAX_FEATURES_WITH_ALL_SUMS = 6144


def has_room(num_features: int, *, all_sums: bool) -> bool:
    """Whether the op's backward can sum the gradient of this bias too.

    Args:
        num_features: of a row.
        all_sums: whether there is a gate, and a weight, bias, scale or shift as well.
    """
    return not all_sums or num_features <= MAX_FEATURES_WITH_ALL_SUMS


def propose(op: fx.Node) -> Iterator[Binding | Reason]:
    yield from _activation(op) if ir.is_call(op, gated_activation) else _norm(op)


def _operands(linear: Any) -> tuple[Any, Any, Any] | None:
    """Input, weight and bias of a linear that has one and that only one op reads."""
    if not ir.is_call(linear, ir.LINEAR):
        return None
    x, weight, bias = (ir.arguments(linear)[name] for name in ("input", "weight", "bias"))
    return (x, weight, bias) if bias is not None and len(linear.users) == 1 else None


def _activation(op: fx.Node) -> Iterator[Binding | Reason]:
    given = ir.arguments(op)
    inputs = _operands(given["gate"])
    if inputs is None or given["up"] is not None or given["gate_bias"] is not None:
        return
    # Behind a recipe's linears the op writes codes, and that form takes no bias.
    if not feeds_a_linear(op):
        return
    settings = given["activation"], given["packing"]

    def emit(call: Call, x: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
        return call(gated_activation, call(ir.LINEAR, x, weight), None, *settings, bias)

    yield Binding(op, inputs, (op,), emit, "gated_activation", regroups=True, carries=(op,))


def _norm(op: fx.Node) -> Iterator[Binding | Reason]:
    linear: Any
    linear, residual, gate, *affine, x_bias = op.args[:8]
    operands = _operands(linear)
    if residual is None or x_bias is not None or operands is None:
        return
    if linear in (residual, gate, *affine):
        return
    x, weight, bias = operands
    all_sums = gate is not None and any(t is not None for t in affine)
    if not has_room(ir.shape(linear)[-1], all_sums=all_sums):
        return
    listed = (x, weight, bias, residual, gate, *affine)
    index = [a for a in op.args[8:] if isinstance(a, fx.Node)]
    inputs = tuple(dict.fromkeys(n for n in (*listed, *index) if n is not None))
    outputs = tuple(op.users)

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        x, weight, bias, *operands = (given[n] for n in listed)
        product = call(ir.LINEAR, x, weight)
        rest = (given[a] if isinstance(a, fx.Node) else a for a in op.args[8:])
        fused = call(op.target, product, *operands, bias, *rest)
        return tuple(call(operator.getitem, fused, out.args[1]) for out in outputs)

    # A probe would have the size of the weight: seconds and gigabytes at real widths.
    yield Binding(op, inputs, outputs, emit, "norm_modulate", regroups=True, carries=outputs)


RULE = Rule(
    name="fuse_bias",
    version=2,
    anchors=(norm_modulate, norm_modulate_segments, gated_activation),
    propose=propose,
    compiled=False,
)
