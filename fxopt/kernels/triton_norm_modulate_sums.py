"""Triton kernel of `fxopt::norm_modulate` that makes gradients of operands from partial sums.

It adds the P rows of partial sums of every group in fixed order, so no atomics are needed.

Shapes: G groups, P programs per group, D features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxopt.kernels.triton_rows import load, store
from fxopt.kernels.triton_sizes import size


class Reduce(NamedTuple):
    """A stream's operands (pointer, group stride, row stride), sums, gradients (pointer, stride).

    The group stride of a gradient is None where all groups share the operand.
    """

    weight: Any
    bias: Any
    scale: Any
    gate_sums: Any
    a_sums: Any
    c_sums: Any
    x_sums: Any
    dgate: Any
    dweight: Any
    dbias: Any
    dscale: Any
    dshift: Any
    dx_bias: Any
    weight_offset: Any
    scale_offset: Any
    num_groups: Any
    num_programs: Any


@triton.jit
def _column_sum(sums, group, num_programs, num_features, cols, mask, BLOCK_P: tl.constexpr):
    """Sum `[G, P, D]` partial sums of one group over P, always in the same order."""
    total = tl.zeros([BLOCK_P, cols.shape[0]], tl.float32)
    if sums is not None:
        own = sums + group * num_programs * num_features
        for first in range(0, num_programs, BLOCK_P):
            programs = first + tl.arange(0, BLOCK_P)
            offsets = programs[:, None] * num_features + cols[None, :]
            valid = (programs < num_programs)[:, None] & mask[None, :]
            total += tl.load(own + offsets, mask=valid, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _reduced(out, total, value, group, cols, mask):
    """Store a gradient of its group, given as (pointer, group stride), or go on adding it up."""
    if out[0] is not None and out[1] is not None:
        store(out[0], group * out[1] + cols, value, mask)
    return total + value


@triton.jit
def _stored(out, total, cols, mask):
    """Store a gradient that all groups share; its group stride is None."""
    if out[1] is None:
        store(out[0], cols, total, mask)


@triton.jit
def _reduce_stream(
    s, cols, mask, num_features,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_programs = size(s.num_programs)
    zero = tl.zeros([BLOCK_D], tl.float32)
    gate_total, weight_total, bias_total = zero, zero, zero
    scale_total, shift_total, x_total = zero, zero, zero
    for i in range(size(s.num_groups)):
        group = tl.cast(i, tl.int64)
        dg = _column_sum(s.gate_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        da = _column_sum(s.a_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        dc = _column_sum(s.c_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        dx = _column_sum(s.x_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        factor, affine_da = zero + 1.0, da
        if s.scale[0] is not None:
            factor = s.scale_offset + load(s.scale, group, 0, cols, mask)
        if s.weight[0] is not None:
            affine_da = da * (s.weight_offset + load(s.weight, 0, 0, cols, mask))
        if s.bias[0] is not None:
            affine_da += dc * load(s.bias, 0, 0, cols, mask)
        gate_total = _reduced(s.dgate, gate_total, dg, group, cols, mask)
        weight_total = _reduced(s.dweight, weight_total, da * factor, group, cols, mask)
        bias_total = _reduced(s.dbias, bias_total, dc * factor, group, cols, mask)
        scale_total = _reduced(s.dscale, scale_total, affine_da, group, cols, mask)
        shift_total = _reduced(s.dshift, shift_total, dc, group, cols, mask)
        x_total = _reduced(s.dx_bias, x_total, dx, group, cols, mask)
    _stored(s.dgate, gate_total, cols, mask)
    _stored(s.dweight, weight_total, cols, mask)
    _stored(s.dbias, bias_total, cols, mask)
    _stored(s.dscale, scale_total, cols, mask)
    _stored(s.dshift, shift_total, cols, mask)
    _stored(s.dx_bias, x_total, cols, mask)


@triton.jit
def reduce_kernel(
    streams, num_features,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program makes the gradients of BLOCK_D features of a stream's operands."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < num_features
    for i in tl.static_range(len(streams)):
        if tl.program_id(1) == i:
            _reduce_stream(streams[i], cols, mask, num_features, BLOCK_P, BLOCK_D)
