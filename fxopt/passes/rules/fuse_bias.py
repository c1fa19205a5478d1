"""The bias of a linear is added, and its gradient summed, in the fused op that reads the linear.

The gradient of a bias is a sum over all tokens of a tensor that the op's backward writes anyway. A
compiler fuses that sum by itself, so the rule serves eager execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.passes import ir
from fxopt.passes.rule import Binding, Call, Reason, Rule

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
    assert ir.is_call(op, norm_modulate, norm_modulate_segments)
    linear, residual, gate, *affine, x_bias = op.args[:8]
    if residual is None or x_bias is not None:
        return
    if not ir.is_call(linear, ir.LINEAR) or len(linear.users) > 1:
        return
    x, weight, bias = (ir.arguments(linear)[name] for name in ("input", "weight", "bias"))
    if bias is None or linear in (residual, gate, *affine):
        return
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
    version=1,
    anchors=(norm_modulate, norm_modulate_segments),
    propose=propose,
    compiled=False,
)
