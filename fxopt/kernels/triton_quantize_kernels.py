"""Triton kernels of `fxopt::quantize`, in parts that producers of its input share.

A first pass leaves the largest magnitudes of tiles, a second takes the scales from them and writes
codes; where a magnitude is known beforehand, the second pass is all. Magnitudes are compared as
integers: the bits of a NaN are larger than those of any number, so that it comes through.

A program owns a tile of BLOCK_R rows and BLOCK_C columns; r and c are its indices.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.kernels import counters as line_of
from fxopt.kernels.formats import SMALLEST_SCALE

INF_BITS = tl.constexpr(0x7F800000)
NAN_CODE = tl.constexpr(0x7F)  # of e4m3 and of e5m2
MAGNITUDE = tl.constexpr(line_of.MAGNITUDE)
SLACK = tl.constexpr(line_of.SLACK)
LARGEST_FACTOR = tl.constexpr(1 / SMALLEST_SCALE)


@triton.jit
def tile_indices(BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows r [BLOCK_R] and columns c [BLOCK_C] of the program's tile."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return r, c


@triton.jit
def load_tile(x, stride_R, stride_C, r, c, num_rows, num_columns):
    """fp32 values of a matrix, zero outside."""
    mask = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    offsets = r[:, None] * stride_R + c[None, :] * stride_C
    return tl.load(x + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def load_pieces(pieces, r, c, num_rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """`load_tile` of matrices side by side, of each (x, stride_R, stride_C, start, stop), the
    columns that it takes."""
    if len(pieces) == 1:
        x, stride_R, stride_C, _, num_columns = pieces[0]
        value = load_tile(x, stride_R, stride_C, r, c, num_rows, num_columns)
    else:
        value = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        first = tl.program_id(1) * BLOCK_C
        for k in tl.static_range(len(pieces)):
            x, stride_R, stride_C, start, stop = pieces[k]
            if (first < stop) & (first + BLOCK_C > start):
                mask = (r < num_rows)[:, None] & ((c >= start) & (c < stop))[None, :]
                offsets = r[:, None] * stride_R + (c - start)[None, :] * stride_C
                own = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
                value = tl.where(mask, own, value)
    return value


@triton.jit
def magnitude(value):
    """The bits of |value|, which are ordered as the magnitudes are."""
    return value.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def store_amax(
    value, r, c, num_rows, num_columns, row_amax, column_amax, tile_amax, column_sums
):  # fmt: skip
    """Bits of the largest magnitudes of a tile: row_amax [column tile, R], column_amax [row tile,
    C], tile_amax [row tile, column tile]; and its column_sums [row tile, C]. None for those that
    are not needed."""
    bits = magnitude(value)
    row_tile, column_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if row_amax is not None:
        tl.store(row_amax + column_tile * num_rows + r, tl.max(bits, 1), r < num_rows)
    column = row_tile * num_columns + c
    if column_amax is not None:
        tl.store(column_amax + column, tl.max(bits, 0), c < num_columns)
    if tile_amax is not None:
        tile = row_tile * tl.cdiv(num_columns, value.shape[1]) + column_tile
        tl.store(tile_amax + tile, tl.max(tl.max(bits, 1), 0))
    if column_sums is not None:
        tl.store(column_sums + column, tl.sum(value, 0), c < num_columns)


@triton.jit
def reduce(partial, num_partials, index, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Largest of partial [num_partials, size] at `index` [BLOCK]."""
    largest = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_partials, CHUNK):
        p = first + tl.arange(0, CHUNK).to(tl.int64)
        mask = (p < num_partials)[:, None] & (index < size)[None, :]
        bits = tl.load(partial + p[:, None] * size + index[None, :], mask, other=0)
        largest = tl.maximum(largest, tl.max(bits, 0))
    return largest


@triton.jit
def factor_of(bits, LARGEST: tl.constexpr, POW2: tl.constexpr):
    """What x is multiplied by, from the bits of its largest magnitude."""
    amax = tl.where(bits == 0, 1.0, bits.to(tl.float32, bitcast=True))
    factor = tl.div_rn(tl.zeros_like(amax) + LARGEST, amax)
    factor = tl.minimum(factor, LARGEST_FACTOR)
    if POW2:
        factor = (factor.to(tl.int32, bitcast=True) & INF_BITS).to(tl.float32, bitcast=True)
    factor = tl.where(bits == 0, 1.0, factor)
    return tl.where(bits >= INF_BITS, float("nan"), factor)


@triton.jit
def scale_of(factor):
    """What codes are multiplied by."""
    return tl.div_rn(tl.zeros_like(factor) + 1.0, factor)


@triton.jit
def code_of(value, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """Bytes of the FP8 values nearest to `value`, saturating; Inf and NaN are NaN.

    As bytes, since transposed stores of FP8 values were miscompiled.
    Source: https://github.com/triton-lang/triton/issues/11111
    """
    clamped = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))
    code = clamped.to(FORMAT).to(tl.uint8, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), code, NAN_CODE)


@triton.jit
def add(counter, amount):
    tl.atomic_add(counter, amount.to(tl.int64), sem="relaxed")


@triton.jit
def raise_to(counter, value):
    tl.atomic_max(counter, value.to(counter.dtype.element_ty), sem="relaxed")


@triton.jit
def count(counters, value, scaled, code, factor, is_first, LARGEST: tl.constexpr):
    """Add values and their codes to the counters [8] of `kernels/counters.py`.

    value, scaled: before and after the multiplication by `factor`, which is broadcast to them.
    is_first: whether these are the first of all values.
    """
    magnitudes = magnitude(value)
    nonzero = magnitudes != 0
    underflowed = nonzero & ((code & 0x7F) == 0)
    saturated = tl.abs(scaled) > LARGEST * SLACK
    scale_bits = tl.zeros_like(magnitudes) + magnitude(scale_of(factor))
    add(counters, tl.where(is_first, 1, 0))
    add(counters + 1, tl.sum(nonzero.to(tl.int32)))
    add(counters + 2, tl.sum(underflowed.to(tl.int32)))
    add(counters + 3, tl.sum(saturated.to(tl.int32)))
    add(counters + 4, tl.sum((magnitudes >= INF_BITS).to(tl.int32)))
    raise_to(counters + 5, tl.max(magnitudes))
    raise_to(counters + 6, tl.max(tl.where(nonzero, scale_bits, 0)))
    raise_to(counters + 7, tl.max(tl.where(nonzero, MAGNITUDE - scale_bits, 0)))


@triton.jit
def scaled_codes(
    value, of_tensor, partials, num_partials, line, num_lines, is_first, scales, counters,
    AXIS: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr, POW2: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Codes of a tile, by a scale for each line across AXIS if there are partials of lines, else
    by that of the tensor; the first program along AXIS stores the scales. `count` if there are
    counters."""
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    if partials is not None:
        bits = reduce(partials, num_partials, line, num_lines, BLOCK, CHUNK)
        factor = factor_of(bits, LARGEST, POW2)
        tl.store(scales + line, scale_of(factor), (line < num_lines) & is_first)
        factor = tl.expand_dims(factor, AXIS)
    else:
        factor = factor_of(of_tensor, LARGEST, POW2)
        tl.store(scales, scale_of(factor), first)
    scaled = value * factor
    code = code_of(scaled, LARGEST, FORMAT)
    if counters is not None:
        count(counters, value, scaled, code, factor, first, LARGEST)
    return code


@triton.jit
def store_codes(
    value, r, c, num_rows, num_columns, num_row_partials, num_column_partials, num_tiles,
    row_amax, column_amax, tile_amax, codes, scales, codes_t, scales_t, amax,
    padded_rows, padded_columns, counters, counters_t, seen,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """codes [R, padded C] and codes_t [C, padded R] of a tile with their scales; and
    amax, that of the columns [C] if there are parts of it, else that of the tensor [1]. seen [1] is
    raised to the magnitudes of the tile. None for what is not wanted."""
    if seen is not None:
        raise_to(seen, tl.max(tl.max(magnitude(value), 1), 0))
    of_tensor = tl.full([], 0, tl.int32)
    if tile_amax is not None:
        of_tensor = tl.max(reduce(tile_amax, num_tiles, tl.zeros([1], tl.int64), 1, 1, 1024), 0)
    if amax is not None:
        if column_amax is None:
            tl.store(amax, of_tensor, (tl.program_id(0) == 0) & (tl.program_id(1) == 0))
        elif tl.program_id(0) == 0:
            bits = reduce(column_amax, num_column_partials, c, num_columns, BLOCK_C, CHUNK)
            tl.store(amax + c, bits, c < num_columns)
    if codes is not None:
        is_first = tl.program_id(1) == 0
        code = scaled_codes(
            value, of_tensor, row_amax, num_row_partials, r, num_rows, is_first, scales,
            counters, 1, FORMAT, LARGEST, POW2, BLOCK_R, CHUNK,
        )  # fmt: skip
        mask = (r < num_rows)[:, None] & (c < padded_columns)[None, :]
        tl.store(codes + r[:, None] * padded_columns + c[None, :], code, mask)
    if codes_t is not None:
        is_first = tl.program_id(0) == 0
        code = scaled_codes(
            value, of_tensor, column_amax, num_column_partials, c, num_columns, is_first, scales_t,
            counters_t, 0, FORMAT_T, LARGEST_T, POW2_T, BLOCK_C, CHUNK,
        )  # fmt: skip
        mask = (c < num_columns)[:, None] & (r < padded_rows)[None, :]
        tl.store(codes_t + c[:, None] * padded_rows + r[None, :], tl.trans(code), mask)


@triton.jit
def store_sum(
    column_sums, num_partials, c, num_columns, out, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Add up column_sums [num_partials, C], always in the same order, in the first row of tiles."""
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, num_partials, CHUNK):
            p = first + tl.arange(0, CHUNK).to(tl.int64)
            mask = (p < num_partials)[:, None] & (c < num_columns)[None, :]
            part = tl.load(column_sums + p[:, None] * num_columns + c[None, :], mask, other=0.0)
            total += tl.sum(part, 0)
        tl.store(out + c, total.to(out.dtype.element_ty), c < num_columns)
