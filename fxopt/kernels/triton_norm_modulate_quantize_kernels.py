"""Triton kernels of `fxopt::norm_modulate_quantize` and of its transposed copy.

A row's largest magnitude is known to the program that owns the row: rows with scales of their own
are normed, rounded and cast in one pass, and so are all rows where the magnitude behind their one
scale is known beforehand; else a second pass casts where they share one scale.
The transposed copy is cast tile by tile from the norm's input and its statistics.

Shapes: M tokens are G groups of R rows that share per-group operands; K features; P programs.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxopt.kernels.triton_gated_activation_kernels import PACKED
from fxopt.kernels.triton_quantize_group import has_tile, store_codes_of
from fxopt.kernels.triton_quantize_kernels import (
    code_of,
    count,
    factor_of,
    magnitude,
    raise_to,
    scale_of,
    tile_indices,
)
from fxopt.kernels.triton_rows import (
    affine_of,
    gated_residual,
    load,
    mean_of,
    modulate,
    modulation_of,
    pack_row,
)
from fxopt.kernels.triton_saving import FORMAT as PACKED_FORMAT
from fxopt.kernels.triton_segments import row_of, segment_of
from fxopt.kernels.triton_sizes import LAST, size


class Stream(NamedTuple):
    """Rows of a launch: inputs and operands as (pointer, group stride, row stride), the rest as
    pointers, None where not wanted; sizes are `unspecialized`.

    column_amax [P, K] and tensor_amax [P] are bits of the largest magnitudes that a program met.
    All rows are scaled by the magnitude known [1] if it is there; seen [1] is raised to the
    magnitudes. Gate and scale are tables if there is an index [M], and the shift if it has one too.
    The last codes and scales are those of the norm's input and of x, that `fxopt::pack` makes.
    """

    x: Any
    residual: Any
    gate: Any
    weight: Any
    bias: Any
    scale: Any
    shift: Any
    x_bias: Any
    h: Any
    mean: Any
    rstd: Any
    codes: Any
    scales: Any
    column_amax: Any
    tensor_amax: Any
    counters: Any
    known: Any
    seen: Any
    eps: Any
    weight_offset: Any
    scale_offset: Any
    num_tokens: Any
    num_rows: Any
    num_programs: Any
    index: Any
    index_of_shift: Any
    num_segments: Any
    h_codes: Any
    h_scales: Any
    x_codes: Any
    x_scales: Any
    last: Any = LAST


@triton.jit
def normed_row(s, token, num_features, cols, mask, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """y of a row in fp32, rounded to DTYPE and zero outside; stores h and the statistics."""
    group, row = token // size(s.num_rows), token % size(s.num_rows)
    gate, scale, shift = s.gate, s.scale, s.shift
    if s.index is not None:
        segment = segment_of(s.index, token, size(s.num_segments), True)
        of_token = tl.maximum(segment, 0)
        gate = s.gate if s.gate[0] is None else row_of(s.gate, group, of_token)
        scale = s.scale if s.scale[0] is None else row_of(s.scale, group, of_token)
        if s.index_of_shift is not None and s.shift[0] is not None:
            shift = row_of(s.shift, group, of_token)
    value = load(s.x, group, row, cols, mask)
    if s.x_codes is not None:
        pack_row(s.x_codes, s.x_scales, value, token, num_features, cols, mask)
    if s.residual[0] is not None:
        value = gated_residual(value, s.residual, gate, s.x_bias, group, row, cols, mask)
    if s.index is not None:
        value = tl.where(segment >= 0, value, float("nan"))
    if s.residual[0] is not None:
        rounded = value.to(s.h.dtype.element_ty)
        tl.store(s.h + token * num_features + cols, rounded, mask=mask)
        value = rounded.to(tl.float32)
    pack_row(s.h_codes, s.h_scales, value, token, num_features, cols, mask)
    if NORM == "layer":
        kept = s.x[0] if s.residual[0] is None else s.h
        row_mean = mean_of(value, kept, num_features, mask)
        tl.store(s.mean + token, row_mean)
        value = tl.where(mask, value - row_mean, 0.0)
    row_rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / num_features + s.eps)
    tl.store(s.rstd + token, row_rstd)
    n = affine_of(value * row_rstd, s.weight, s.bias, s.weight_offset, cols, mask)
    factor = modulation_of(scale, s.scale_offset, group, row, cols, mask)
    y = modulate(n, factor, shift, group, row, cols, mask)
    return tl.where(mask, y.to(DTYPE).to(tl.float32), 0.0)


@triton.jit
def _rows(
    s, program, num_features, padded_columns,
    NORM: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr,
    POW2: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `program`, `program + num_programs`, ... of a stream."""
    cols = tl.arange(0, BLOCK_K)
    mask = cols < num_features
    largest = tl.zeros([BLOCK_K], tl.int32)
    if s.known is not None:
        factor = factor_of(tl.load(s.known), LARGEST, POW2)
        tl.store(s.scales, scale_of(factor), program == 0)
    for token in range(program, size(s.num_tokens), size(s.num_programs)):
        y = normed_row(s, token, num_features, cols, mask, NORM, DTYPE)
        bits = magnitude(y)
        largest = tl.maximum(largest, bits)
        if s.codes is not None:
            if s.known is None:
                factor = factor_of(tl.max(bits, 0), LARGEST, POW2)
                tl.store(s.scales + token, scale_of(factor))
            scaled = tl.where(mask, y * factor, 0.0)
            code = code_of(scaled, LARGEST, FORMAT)
            if s.counters is not None:
                count(s.counters, y, scaled, code, factor, token == 0, LARGEST)
            tl.store(s.codes + token * padded_columns + cols, code, mask=cols < padded_columns)
    if s.column_amax is not None:
        tl.store(s.column_amax + program * num_features + cols, largest, mask=mask)
    if s.tensor_amax is not None:
        tl.store(s.tensor_amax + program, tl.max(largest, 0))
    if s.seen is not None:
        raise_to(s.seen, tl.max(largest, 0))


@triton.jit
def rows_kernel(
    streams, num_features, padded_columns, NUM_STREAMS: tl.constexpr,
    NORM: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr,
    POW2: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of rows with a scale each, or their magnitudes; a program belongs to one stream."""
    program = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(NUM_STREAMS):
        num_programs = size(streams[i].num_programs)
        if (program >= 0) & (program < num_programs):
            _rows(
                streams[i], program, num_features, padded_columns,
                NORM, DTYPE, FORMAT, LARGEST, POW2, BLOCK_K,
            )  # fmt: skip
        program -= num_programs


@triton.jit
def _operand_tile(t, group, row, c, mask):
    """fp32 tile of an operand as `triton_rows` has it; the columns of codes are one block."""
    offsets = group[:, None] * t[1] + row[:, None] * t[2] + c[None, :]
    value = tl.load(t[0] + offsets, mask, other=0)
    if len(t) > 3:
        tl.static_assert(c.shape[0] == PACKED)
        at = group * t[4] + row * t[5] + tl.program_id(1)
        scale = tl.load(t[3] + at, tl.max(mask.to(tl.int32), 1) > 0, other=0.0)
        value = value.to(PACKED_FORMAT, bitcast=True).to(tl.float32) * scale[:, None]
        value = value.to(t[6].dtype.element_ty)
    return value.to(tl.float32)


@triton.jit
def normed_tile(
    h, weight, bias, scale, shift, mean, rstd, group_rows, weight_offset, scale_offset,
    index, index_of_shift, num_segments, r, c, num_rows, num_columns, DTYPE: tl.constexpr,
):  # fmt: skip
    """fp32 tile of y, made from the norm's input h and its statistics; zero outside.

    h and the operands are (pointer, group stride, row stride); mean is None for an RMSNorm. Both
    indices as in `Stream`; the rstd of a token without a row is NaN.
    """
    group, row = r // size(group_rows), r % size(group_rows)
    row_of_scale, row_of_shift = row, row
    if index is not None:
        segment = segment_of(index, r, size(num_segments), r < num_rows)
        row_of_scale = tl.maximum(segment, 0)
        if index_of_shift is not None:
            row_of_shift = row_of_scale
    mask = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    y = _operand_tile(h, group, row, c, mask)
    if mean is not None:
        y = y - tl.load(mean + r, r < num_rows, other=0.0)[:, None]
    y = y * tl.load(rstd + r, r < num_rows, other=0.0)[:, None]
    if weight[0] is not None:
        y = y * (weight_offset + _operand_tile(weight, group, row, c, mask))
    if bias[0] is not None:
        y = y + _operand_tile(bias, group, row, c, mask)
    if scale[0] is not None:
        y = y * (scale_offset + _operand_tile(scale, group, row_of_scale, c, mask))
    if shift[0] is not None:
        y = y + _operand_tile(shift, group, row_of_shift, c, mask)
    return tl.where(mask, y.to(DTYPE).to(tl.float32), 0.0)


@triton.jit
def tiles_kernel(
    parts, NUM_PARTS: tl.constexpr, FORMATS: tl.constexpr, DTYPE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of y of each part."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            y = normed_tile(*part.tile, r, c, size(part.num_rows), part.num_columns, DTYPE)
            store_codes_of(part, y, r, c, *FORMATS[k], BLOCK_R, BLOCK_C, CHUNK)
