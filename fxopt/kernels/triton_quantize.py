"""Triton provider of `fxopt::quantize` for FP8 with one scale for a tensor or a row: two launches.

The first leaves the largest magnitudes of tiles, the second takes the scales from them and writes
both copies from one read. Magnitudes are compared as integers: the bits of a NaN are larger than
those of any number, so that it comes through.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.formats import FORMATS, SMALLEST_SCALE, Quantized, padded_columns
from fxopt.recipes import Operand

BLOCK_R, BLOCK_C = 64, 128
CHUNK = 32  # partial magnitudes that are reduced at a time
NUM_WARPS = 8

INF_BITS = tl.constexpr(0x7F800000)
NAN_CODE = tl.constexpr(0x7F)  # of e4m3 and of e5m2
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
LARGEST_FACTOR = tl.constexpr(1 / SMALLEST_SCALE)


def covers(operand: Operand) -> bool:
    """Whether these kernels quantize like this."""
    return operand.block in ("tensor", "row") and not operand.stochastic


@triton.jit
def load_tile(
    x, stride_R, stride_C, num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """fp32 values, zero outside, and the indices r [BLOCK_R], c [BLOCK_C] of the program's tile."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    offsets = r[:, None] * stride_R + c[None, :] * stride_C
    return tl.load(x + offsets, mask, other=0.0).to(tl.float32), r, c


@triton.jit(do_not_specialize=["num_rows"])
def amax_kernel(
    x,
    stride_R,
    stride_C,
    num_rows,
    num_columns,
    row_amax,
    column_amax,
    tile_amax,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Bits of the largest magnitudes: row_amax [column tile, R], column_amax [row tile, C],
    tile_amax [row tile, column tile]; None for those that are not needed."""
    value, r, c = load_tile(x, stride_R, stride_C, num_rows, num_columns, BLOCK_R, BLOCK_C)
    bits = value.to(tl.int32, bitcast=True) & MAGNITUDE
    if row_amax is not None:
        row = row_amax + tl.program_id(1).to(tl.int64) * num_rows + r
        tl.store(row, tl.max(bits, 1), r < num_rows)
    if column_amax is not None:
        column = column_amax + tl.program_id(0).to(tl.int64) * num_columns + c
        tl.store(column, tl.max(bits, 0), c < num_columns)
    if tile_amax is not None:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(tile_amax + tile, tl.max(tl.max(bits, 1), 0))


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
def code_of(value, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """Bytes of the FP8 values nearest to `value`, saturating; NaN stays.

    As bytes, since transposed stores of FP8 values were miscompiled.
    Source: https://github.com/triton-lang/triton/issues/11111
    """
    clamped = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))
    code = clamped.to(FORMAT).to(tl.uint8, bitcast=True)
    return tl.where(value != value, NAN_CODE, code)


@triton.jit
def scaled_codes(
    value,
    of_tensor,
    partials,
    num_partials,
    line,
    num_lines,
    is_first,
    scales,
    AXIS: tl.constexpr,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Codes of a tile, by a scale for each line across AXIS if there are partials of lines, else
    by that of the tensor; the first program along AXIS stores the scales."""
    if partials is not None:
        bits = reduce(partials, num_partials, line, num_lines, BLOCK, CHUNK)
        factor = factor_of(bits, LARGEST, POW2)
        scale = tl.div_rn(tl.zeros_like(factor) + 1.0, factor)
        tl.store(scales + line, scale, (line < num_lines) & is_first)
        factor = tl.expand_dims(factor, AXIS)
    else:
        factor = factor_of(of_tensor, LARGEST, POW2)
        scale = tl.div_rn(tl.zeros_like(factor) + 1.0, factor)
        tl.store(scales, scale, (tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    return code_of(value * factor, LARGEST, FORMAT)


@triton.jit(do_not_specialize=["num_rows", "num_row_tiles"])
def cast_kernel(
    x,
    stride_R,
    stride_C,
    num_rows,
    num_columns,
    num_row_tiles,
    row_amax,
    column_amax,
    tile_amax,
    codes,
    scales,
    codes_t,
    scales_t,
    padded_rows,
    padded_columns,
    FORMAT: tl.constexpr,
    FORMAT_T: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_T: tl.constexpr,
    POW2: tl.constexpr,
    POW2_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """codes [R, padded C] and codes_t [C, padded R] with their scales; None for no copy."""
    value, r, c = load_tile(x, stride_R, stride_C, num_rows, num_columns, BLOCK_R, BLOCK_C)
    num_column_tiles = tl.num_programs(1)
    of_tensor = tl.full([], 0, tl.int32)
    if tile_amax is not None:
        num_tiles = num_row_tiles * num_column_tiles
        of_tensor = tl.max(reduce(tile_amax, num_tiles, tl.zeros([1], tl.int64), 1, 1, 1024), 0)
    if codes is not None:
        is_first = tl.program_id(1) == 0
        code = scaled_codes(
            value, of_tensor, row_amax, num_column_tiles, r, num_rows, is_first, scales,
            1, FORMAT, LARGEST, POW2, BLOCK_R, CHUNK,
        )  # fmt: skip
        mask = (r < num_rows)[:, None] & (c < padded_columns)[None, :]
        tl.store(codes + r[:, None] * padded_columns + c[None, :], code, mask)
    if codes_t is not None:
        is_first = tl.program_id(0) == 0
        code = scaled_codes(
            value, of_tensor, column_amax, num_row_tiles, c, num_columns, is_first, scales_t,
            0, FORMAT_T, LARGEST_T, POW2_T, BLOCK_C, CHUNK,
        )  # fmt: skip
        mask = (c < num_columns)[:, None] & (r < padded_rows)[None, :]
        tl.store(codes_t + c[:, None] * padded_rows + r[None, :], tl.trans(code), mask)


def quantize(x_RC: Tensor, rows: Operand | None, columns: Operand | None) -> list[Tensor]:
    """Codes, scales and an empty tensor scale of x and then of its transpose.

    Args:
        x_RC: any strides, not empty.
        rows, columns: operands that `covers` holds for, or None.
    """
    num_rows, num_columns = x_RC.shape
    grid = (
        triton.cdiv(padded_size(columns, num_rows), BLOCK_R),
        triton.cdiv(padded_size(rows, num_columns), BLOCK_C),
    )
    operands = [o for o in (rows, columns) if o is not None]
    is_row, is_column = (o is not None and o.block == "row" for o in (rows, columns))
    amax = [
        x_RC.new_empty(shape, dtype=torch.int32) if needed else None
        for shape, needed in (
            ((grid[1], num_rows), is_row),
            ((grid[0], num_columns), is_column),
            (grid, any(o.block == "tensor" for o in operands)),
        )
    ]
    of_rows = _copy(x_RC, rows, num_rows, num_columns)
    of_columns = _copy(x_RC, columns, num_columns, num_rows)
    source = (x_RC, *x_RC.stride(), num_rows, num_columns)
    blocks = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(x_RC):
        amax_kernel[grid](*source, *amax, **blocks)
        cast_kernel[grid](
            *source,
            grid[0],
            *amax,
            *_pointers(of_rows),
            *_pointers(of_columns),
            padded_size(columns, num_rows),
            padded_size(rows, num_columns),
            **settings(rows, columns),
            CHUNK=CHUNK,
            **blocks,
        )
    empty = x_RC.new_empty(0, dtype=torch.float32)
    return [t for q in (of_rows, of_columns) for t in (q or (empty, empty.clone(), empty.clone()))]


def settings(rows: Operand | None, columns: Operand | None) -> dict[str, object]:
    """Compile-time constants of `cast_kernel`."""
    found: dict[str, object] = {}
    for operand, suffix in ((rows, ""), (columns, "_T")):
        format = FORMATS["e4m3" if operand is None else operand.format]
        is_e5m2 = format.dtype is torch.float8_e5m2
        found[f"FORMAT{suffix}"] = tl.float8e5 if is_e5m2 else tl.float8e4nv
        found[f"LARGEST{suffix}"] = format.largest
        found[f"POW2{suffix}"] = operand is not None and operand.scale == "pow2"
    return found


def padded_size(operand: Operand | None, size: int) -> int:
    return size if operand is None else padded_columns(operand, size)


def _copy(x: Tensor, operand: Operand | None, num_rows: int, size: int) -> Quantized | None:
    if operand is None:
        return None
    dtype = FORMATS[operand.format].dtype
    return Quantized(
        x.new_empty((num_rows, padded_columns(operand, size)), dtype=dtype),
        x.new_empty((num_rows if operand.block == "row" else 1, 1), dtype=torch.float32),
        x.new_empty(0, dtype=torch.float32),
    )


def _pointers(copy: Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if copy is None else (copy.codes.view(torch.uint8), copy.scales)
