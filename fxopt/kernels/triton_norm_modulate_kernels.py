"""Triton kernels of `fxopt::norm_modulate`: forward, backward over rows, and sums of partial sums.

Each serves one or more streams (text and image, say) in one launch; a program belongs to one.

Shapes: G groups of R rows share their per-group operands; D features, padded to BLOCK_D; P programs
per group in the backward. Every program of the backward owns rows of one group and writes one row
of partial sums; the last kernel adds the P rows, in fixed order, so no atomics are needed, and
makes all gradients of operands from the sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxopt.kernels.triton_rows import (
    affine_of,
    gated_residual,
    load,
    mean_of,
    modulate,
    modulation_of,
    norm_backward,
    store,
)
from fxopt.kernels.triton_sizes import size


class Forward(NamedTuple):
    """A stream: inputs and operands as (pointer, group stride, row stride), outputs as pointers.

    A pointer is None where there is nothing to read or to store; sizes are `unspecialized`.
    """

    x: Any
    residual: Any
    gate: Any
    weight: Any
    bias: Any
    scale: Any
    shift: Any
    x_bias: Any
    y: Any
    h: Any
    mean: Any
    rstd: Any
    eps: Any
    weight_offset: Any
    scale_offset: Any
    num_groups: Any
    num_rows: Any


class Backward(NamedTuple):
    """A stream: inputs and operands as (pointer, group stride, row stride), the rest as pointers.

    `dgate` and `dscale` hold one value per element, for operands that differ from row to row.
    The `_sums`, `[G, P, D]`, are partial sums for operands of the group: of the gate's gradient, of
    those of n's factor and addend (of the affine alone if `scale` differs per row), and of x's.
    Each is None where not wanted.
    """

    grad_y: Any
    grad_h: Any
    h: Any
    x: Any
    gate: Any
    weight: Any
    bias: Any
    scale: Any
    shift: Any
    x_bias: Any
    mean: Any
    rstd: Any
    dh: Any
    dx: Any
    dgate: Any
    dscale: Any
    y: Any
    gate_sums: Any
    a_sums: Any
    c_sums: Any
    x_sums: Any
    weight_offset: Any
    scale_offset: Any
    num_groups: Any
    num_rows: Any
    num_programs: Any
    SCALE_PER_ROW: tl.constexpr


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
def _forward_row(s, token, num_features, NORM: tl.constexpr, BLOCK_D: tl.constexpr):
    group, row = token // size(s.num_rows), token % size(s.num_rows)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_features
    if s.residual[0] is not None:
        value = gated_residual(s.x, s.residual, s.gate, s.x_bias, group, row, cols, mask)
        rounded = value.to(s.h.dtype.element_ty)
        tl.store(s.h + token * num_features + cols, rounded, mask=mask)
        value = rounded.to(tl.float32)
    else:
        value = load(s.x, group, row, cols, mask)
    if NORM != "none":
        if NORM == "layer":
            kept = s.x[0] if s.residual[0] is None else s.h
            row_mean = mean_of(value, kept, num_features, mask)
            tl.store(s.mean + token, row_mean)
            value = tl.where(mask, value - row_mean, 0.0)
        row_rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / num_features + s.eps)
        tl.store(s.rstd + token, row_rstd)
        n = affine_of(value * row_rstd, s.weight, s.bias, s.weight_offset, cols, mask)
        factor = modulation_of(s.scale, s.scale_offset, group, row, cols, mask)
        out = modulate(n, factor, s.shift, group, row, cols, mask)
        tl.store(s.y + token * num_features + cols, out.to(s.y.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(streams, num_features, NORM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program is one row."""
    token = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(streams)):
        num_tokens = size(streams[i].num_groups).to(tl.int64) * size(streams[i].num_rows)
        if (token >= 0) & (token < num_tokens):
            _forward_row(streams[i], token, num_features, NORM, BLOCK_D)
        token -= num_tokens


@triton.jit
def _backward_rows(
    s, group, program, num_features,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows `program`, `program + num_programs`, ... of a group."""
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_features
    num_rows, num_programs = size(s.num_rows), size(s.num_programs)
    gate_sum = tl.zeros([BLOCK_D], tl.float32)
    a_sum = tl.zeros([BLOCK_D], tl.float32)
    c_sum = tl.zeros([BLOCK_D], tl.float32)
    x_sum = tl.zeros([BLOCK_D], tl.float32)
    for row in range(program, num_rows, num_programs):
        token = group * num_rows + row
        offsets = token * num_features + cols
        dvalue = tl.zeros([BLOCK_D], tl.float32)
        if s.grad_h[0] is not None:
            dvalue = load(s.grad_h, group, row, cols, mask)
        if NORM != "none":
            row_rstd = tl.load(s.rstd + token)
            n = load(s.h, group, row, cols, mask)
            if NORM == "layer":
                n = tl.where(mask, n - tl.load(s.mean + token), 0.0)
            n = n * row_rstd
            factor = modulation_of(s.scale, s.scale_offset, group, row, cols, mask)
            if s.y is not None:
                out = affine_of(n, s.weight, s.bias, s.weight_offset, cols, mask)
                out = modulate(out, factor, s.shift, group, row, cols, mask)
                store(s.y, offsets, out, mask)
            if s.grad_y[0] is not None:
                dn = load(s.grad_y, group, row, cols, mask)
                if s.dscale is not None:
                    affine = affine_of(n, s.weight, s.bias, s.weight_offset, cols, mask)
                    store(s.dscale, offsets, dn * affine, mask)
                if s.SCALE_PER_ROW:
                    dn = dn * factor
                if s.a_sums is not None:
                    a_sum += dn * n
                    c_sum += dn
                if s.scale[0] is not None and not s.SCALE_PER_ROW:
                    dn = dn * (s.scale_offset + load(s.scale, group, 0, cols, mask))
                if s.weight[0] is not None:
                    dn = dn * (s.weight_offset + load(s.weight, 0, 0, cols, mask))
                dvalue += norm_backward(dn, n, num_features, NORM) * row_rstd
        store(s.dh, offsets, dvalue, mask)
        if s.gate_sums is not None or s.dgate is not None:
            value = load(s.x, group, row, cols, mask)
            if s.x_bias[0] is not None:
                value += load(s.x_bias, 0, 0, cols, mask)
            store(s.dgate, offsets, dvalue * value, mask)
            if s.gate_sums is not None:
                gate_sum += dvalue * value
        if s.gate[0] is not None:
            dvalue *= load(s.gate, group, row, cols, mask)
        store(s.dx, offsets, dvalue, mask)
        if s.x_sums is not None:
            x_sum += dvalue
    partial = (group * num_programs + program) * num_features + cols
    store(s.gate_sums, partial, gate_sum, mask)
    store(s.a_sums, partial, a_sum, mask)
    store(s.c_sums, partial, c_sum, mask)
    store(s.x_sums, partial, x_sum, mask)


@triton.jit
def backward_kernel(streams, num_features, NORM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program strides over the rows of one group."""
    program = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(streams)):
        num_programs = size(streams[i].num_programs)
        total = size(streams[i].num_groups) * num_programs
        if (program >= 0) & (program < total):
            _backward_rows(
                streams[i], program // num_programs, program % num_programs,
                num_features, NORM, BLOCK_D,
            )  # fmt: skip
        program -= total


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
