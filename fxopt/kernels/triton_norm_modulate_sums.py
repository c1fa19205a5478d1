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
from fxopt.kernels.triton_sizes import LAST, size


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
    last: Any = LAST


@triton.jit
def _column_sum(sums, first_row, num_rows, num_features, cols, mask, BLOCK_P: tl.constexpr):
    """Sum rows of partial sums, always in the same order."""
    total = tl.zeros([BLOCK_P, cols.shape[0]], tl.float32)
    if sums is not None:
        own = sums + first_row * num_features
        for first in range(0, num_rows, BLOCK_P):
            rows = first + tl.arange(0, BLOCK_P)
            offsets = rows[:, None] * num_features + cols[None, :]
            valid = (rows < num_rows)[:, None] & mask[None, :]
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
def add_group(
    s, totals, group, scale, first_row, num_rows, cols, mask, num_features, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Store the gradients of a group, the sums of which are these rows; totals with its share.

    `scale` is that of the group.
    """
    dg = _column_sum(s.gate_sums, first_row, num_rows, num_features, cols, mask, BLOCK_P)
    da = _column_sum(s.a_sums, first_row, num_rows, num_features, cols, mask, BLOCK_P)
    dc = _column_sum(s.c_sums, first_row, num_rows, num_features, cols, mask, BLOCK_P)
    dx = _column_sum(s.x_sums, first_row, num_rows, num_features, cols, mask, BLOCK_P)
    factor, affine_da = tl.zeros([cols.shape[0]], tl.float32) + 1.0, da
    if scale[0] is not None:
        factor = s.scale_offset + load(scale, group, 0, cols, mask)
    if s.weight[0] is not None:
        affine_da = da * (s.weight_offset + load(s.weight, 0, 0, cols, mask))
    if s.bias[0] is not None:
        affine_da += dc * load(s.bias, 0, 0, cols, mask)
    gate_total, weight_total, bias_total, scale_total, shift_total, x_total = totals
    gate_total = _reduced(s.dgate, gate_total, dg, group, cols, mask)
    weight_total = _reduced(s.dweight, weight_total, da * factor, group, cols, mask)
    bias_total = _reduced(s.dbias, bias_total, dc * factor, group, cols, mask)
    scale_total = _reduced(s.dscale, scale_total, affine_da, group, cols, mask)
    shift_total = _reduced(s.dshift, shift_total, dc, group, cols, mask)
    x_total = _reduced(s.dx_bias, x_total, dx, group, cols, mask)
    return gate_total, weight_total, bias_total, scale_total, shift_total, x_total


@triton.jit
def no_totals(BLOCK_D: tl.constexpr):
    zero = tl.zeros([BLOCK_D], tl.float32)
    return zero, zero, zero, zero, zero, zero


@triton.jit
def store_totals(s, totals, cols, mask):
    gate_total, weight_total, bias_total, scale_total, shift_total, x_total = totals
    _stored(s.dgate, gate_total, cols, mask)
    _stored(s.dweight, weight_total, cols, mask)
    _stored(s.dbias, bias_total, cols, mask)
    _stored(s.dscale, scale_total, cols, mask)
    _stored(s.dshift, shift_total, cols, mask)
    _stored(s.dx_bias, x_total, cols, mask)


@triton.jit
def reduce_stream(
    s, cols, mask, num_features,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_programs = size(s.num_programs)
    totals = no_totals(BLOCK_D)
    for i in range(size(s.num_groups)):
        group = tl.cast(i, tl.int64)
        totals = add_group(
            s, totals, group, s.scale, group * num_programs, num_programs,
            cols, mask, num_features, BLOCK_P,
        )  # fmt: skip
    store_totals(s, totals, cols, mask)


@triton.jit
def reduce_kernel(
    streams, num_features,
    NUM_STREAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program makes the gradients of BLOCK_D features of a stream's operands."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < num_features
    for i in tl.static_range(NUM_STREAMS):
        if tl.program_id(1) == i:
            reduce_stream(streams[i], cols, mask, num_features, BLOCK_P, BLOCK_D)
