"""Triton kernels of `fxopt::norm_modulate`: forward, and backward over rows.

Each serves one or more streams (text and image, say) in one launch; a program belongs to one.

Shapes: G groups of R rows share their per-group operands; D features, padded to BLOCK_D or, in the
backward, to BLOCKS; P programs per group in the backward. Every program of the backward owns rows
of one group and writes one row of partial sums, which `triton_norm_modulate_sums` adds up.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxopt.kernels.triton_quantize_kernels import magnitude, raise_to
from fxopt.kernels.triton_rows import (
    affine_of,
    gated_residual,
    load,
    mean_of,
    modulate,
    modulation_of,
    pack_row,
    store,
)
from fxopt.kernels.triton_sizes import LAST, size


class Forward(NamedTuple):
    """A stream: inputs and operands as (pointer, group stride, row stride), outputs as pointers.

    A pointer is None where there is nothing to read or to store; sizes are `unspecialized`. Codes
    and scales are those of the norm's input and of x.
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
    h_codes: Any
    h_scales: Any
    x_codes: Any
    x_scales: Any
    last: Any = LAST


class Backward(NamedTuple):
    """A stream: inputs and operands as (pointer, group stride, row stride), the rest as pointers.

    `dgate` and `dscale` hold one value per element, for operands that differ from row to row.
    The `_sums`, `[G, P, D]`, are partial sums for operands of the group: of the gate's gradient, of
    those of n's factor and addend (of the affine alone if `scale` differs per row), and of x's.
    `seen` is raised to the magnitude of x's gradient: of dx, or dh where there is no gate.
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
    seen: Any
    weight_offset: Any
    scale_offset: Any
    num_groups: Any
    num_rows: Any
    num_programs: Any
    SCALE_PER_ROW: tl.constexpr


@triton.jit
def forward_row(s, m, group, row, num_features, NORM: tl.constexpr, BLOCK_D: tl.constexpr):
    """y, h and statistics of a row of a stream, modulated by m: gate, scale and shift."""
    gate, scale, shift = m
    token = group * size(s.num_rows) + row
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_features
    value = load(s.x, group, row, cols, mask)
    if s.x_codes is not None:
        pack_row(s.x_codes, s.x_scales, value, token, num_features, cols, mask)
    if s.residual[0] is not None:
        value = gated_residual(value, s.residual, gate, s.x_bias, group, row, cols, mask)
        rounded = value.to(s.h.dtype.element_ty)
        tl.store(s.h + token * num_features + cols, rounded, mask=mask)
        value = rounded.to(tl.float32)
    pack_row(s.h_codes, s.h_scales, value, token, num_features, cols, mask)
    if NORM != "none":
        if NORM == "layer":
            kept = s.x[0] if s.residual[0] is None else s.h
            row_mean = mean_of(value, kept, num_features, mask)
            tl.store(s.mean + token, row_mean)
            value = tl.where(mask, value - row_mean, 0.0)
        row_rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / num_features + s.eps)
        tl.store(s.rstd + token, row_rstd)
        n = affine_of(value * row_rstd, s.weight, s.bias, s.weight_offset, cols, mask)
        factor = modulation_of(scale, s.scale_offset, group, row, cols, mask)
        out = modulate(n, factor, shift, group, row, cols, mask)
        tl.store(s.y + token * num_features + cols, out.to(s.y.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    streams, num_features,
    NUM_STREAMS: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program is one row."""
    token = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(NUM_STREAMS):
        num_tokens = size(streams[i].num_groups).to(tl.int64) * size(streams[i].num_rows)
        if (token >= 0) & (token < num_tokens):
            s = streams[i]
            group, row = token // size(s.num_rows), token % size(s.num_rows)
            forward_row(s, (s.gate, s.scale, s.shift), group, row, num_features, NORM, BLOCK_D)
        token -= num_tokens


@triton.jit
def _columns(i: tl.constexpr, num_features, BLOCKS):
    """Columns of piece `i` of a row, and which of them there are."""
    first = 0
    for j in tl.static_range(i):
        first += BLOCKS[j]
    cols = first + tl.arange(0, BLOCKS[i])
    return cols, cols < num_features


@triton.jit
def _normed(
    s, m, group, row, token, row_mean, row_rstd, sums, i: tl.constexpr, num_features, BLOCKS
):
    """n of a piece, its gradient, and the sums of the gradients of n's factor and addend."""
    cols, mask = _columns(i, num_features, BLOCKS)
    _, scale, shift = m
    offsets = token * num_features + cols
    _, a_sum, c_sum, _ = sums
    n = tl.where(mask, load(s.h, group, row, cols, mask) - row_mean, 0.0) * row_rstd
    factor = modulation_of(scale, s.scale_offset, group, row, cols, mask)
    if s.y is not None:
        out = affine_of(n, s.weight, s.bias, s.weight_offset, cols, mask)
        out = modulate(out, factor, shift, group, row, cols, mask)
        store(s.y, offsets, out, mask)
    dn = tl.zeros([BLOCKS[i]], tl.float32)
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
        if scale[0] is not None and not s.SCALE_PER_ROW:
            dn = dn * (s.scale_offset + load(scale, group, 0, cols, mask))
        if s.weight[0] is not None:
            dn = dn * (s.weight_offset + load(s.weight, 0, 0, cols, mask))
    return n, dn, a_sum, c_sum


@triton.jit
def _gated(s, gate, group, row, token, dvalue, sums, i: tl.constexpr, num_features, BLOCKS):
    """Store the gradients of h and x of a piece; the sums of those of the gate and of x."""
    cols, mask = _columns(i, num_features, BLOCKS)
    offsets = token * num_features + cols
    gate_sum, _, _, x_sum = sums
    if s.grad_h[0] is not None:
        dvalue += load(s.grad_h, group, row, cols, mask)
    store(s.dh, offsets, dvalue, mask)
    if s.gate_sums is not None or s.dgate is not None:
        value = load(s.x, group, row, cols, mask)
        if s.x_bias[0] is not None:
            value += load(s.x_bias, 0, 0, cols, mask)
        store(s.dgate, offsets, dvalue * value, mask)
        if s.gate_sums is not None:
            gate_sum += dvalue * value
    if gate[0] is not None:
        dvalue *= load(gate, group, row, cols, mask)
    store(s.dx, offsets, dvalue, mask)
    if s.x_sums is not None:
        x_sum += dvalue
    if s.seen is not None:
        dtype = s.dh.dtype.element_ty if gate[0] is None else s.dx.dtype.element_ty
        rounded = tl.where(mask, dvalue.to(dtype).to(tl.float32), 0.0)
        raise_to(s.seen, tl.max(magnitude(rounded), 0))  # kept from row to row it spilled
    return gate_sum, x_sum


@triton.jit
def backward_row(s, m, group, row, sums, num_features, NORM: tl.constexpr, BLOCKS):
    """Store the gradients of a row; the sums with its share, `sums` being those before it."""
    token = group * size(s.num_rows) + row
    row_mean, row_rstd, along_n, along_1 = 0.0, 0.0, 0.0, 0.0
    if NORM != "none":
        row_rstd = tl.load(s.rstd + token)
    if NORM == "layer":
        row_mean = tl.load(s.mean + token)
    pieces = ()
    for i in tl.static_range(len(BLOCKS)):
        if NORM != "none":
            piece = _normed(
                s, m, group, row, token, row_mean, row_rstd, sums[i], i, num_features, BLOCKS
            )
            along_n += tl.sum(piece[1] * piece[0], 0)
            if NORM == "layer":
                along_1 += tl.sum(piece[1], 0)
            pieces += (piece,)
    found = ()
    for i in tl.static_range(len(BLOCKS)):
        _, a_sum, c_sum, _ = sums[i]
        dvalue = tl.zeros([BLOCKS[i]], tl.float32)
        if NORM != "none":
            n, dn, a_sum, c_sum = pieces[i]
            dvalue = (dn - n * (along_n / num_features) - along_1 / num_features) * row_rstd
        gate_sum, x_sum = _gated(
            s, m[0], group, row, token, dvalue, sums[i], i, num_features, BLOCKS
        )
        found += ((gate_sum, a_sum, c_sum, x_sum),)
    return found


@triton.jit
def backward_rows(s, group, program, num_features, NORM: tl.constexpr, BLOCKS):
    """Rows `program`, `program + num_programs`, ... of a group."""
    sums = no_sums(BLOCKS)
    m = s.gate, s.scale, s.shift
    for row in range(program, size(s.num_rows), size(s.num_programs)):
        sums = backward_row(s, m, group, row, sums, num_features, NORM, BLOCKS)
    store_sums(s, group * size(s.num_programs) + program, sums, num_features, BLOCKS)


@triton.jit
def no_sums(BLOCKS):
    """The sums of each piece before the first row."""
    sums = ()
    for i in tl.static_range(len(BLOCKS)):
        zero = tl.zeros([BLOCKS[i]], tl.float32)
        sums += ((zero, zero, zero, zero),)
    return sums


@triton.jit
def store_sums(s, at, sums, num_features, BLOCKS):
    """Write row `at` of the partial sums."""
    for i in tl.static_range(len(BLOCKS)):
        cols, mask = _columns(i, num_features, BLOCKS)
        partial = at * num_features + cols
        store(s.gate_sums, partial, sums[i][0], mask)
        store(s.a_sums, partial, sums[i][1], mask)
        store(s.c_sums, partial, sums[i][2], mask)
        store(s.x_sums, partial, sums[i][3], mask)


@triton.jit
def backward_kernel(streams, num_features, NUM_STREAMS: tl.constexpr, NORM: tl.constexpr, BLOCKS):
    """One program strides over the rows of one group; BLOCKS are powers of two that add up to D."""
    program = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(NUM_STREAMS):
        num_programs = size(streams[i].num_programs)
        total = size(streams[i].num_groups) * num_programs
        if (program >= 0) & (program < total):
            backward_rows(
                streams[i], program // num_programs, program % num_programs,
                num_features, NORM, BLOCKS,
            )  # fmt: skip
        program -= total
