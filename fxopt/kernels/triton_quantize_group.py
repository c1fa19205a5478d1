"""Triton provider of `fxopt::quantize`, `quantize_rows` and `quantize_columns`: matrices, or one,
to FP8 in two launches.

The first leaves the largest magnitudes of tiles, the second takes the scales from them and writes
all copies from one read. Where magnitudes are known beforehand, the second is all, and a small one
adds up the sums of its tiles. Producers of matrices have kernels of their own for the same steps.

The third index of the grid says which matrix; programs beyond its tiles do nothing.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_quantize as launch
from fxopt.kernels.counters import Slot
from fxopt.kernels.triton_add_up import add_up
from fxopt.kernels.triton_quantize_kernels import (
    load_tile,
    store_amax,
    store_codes,
    store_sum,
    tile_indices,
)
from fxopt.kernels.triton_sizes import LAST, size, unspecialized
from fxopt.recipes import Operand

FP32 = torch.float32


class Part(NamedTuple):
    """A matrix of a launch; None for what is not wanted, rows and counts are `unspecialized`.

    tile: what its tiles are made of. amax, column_sums: of tiles. counts: parts of each of amax.
    copies: the arguments of `store_codes` behind amax. column_sum: of all rows.
    """

    tile: Any
    num_rows: Any
    num_columns: Any
    amax: Any
    column_sums: Any
    counts: Any = None
    copies: Any = None
    column_sum: Any = None
    last: Any = LAST


@triton.jit
def has_tile(part, k, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether the program has a tile, and one of the k-th part."""
    first_row, first_column = tl.program_id(0) * BLOCK_R, tl.program_id(1) * BLOCK_C
    is_inside = (first_row < size(part.num_rows)) & (first_column < part.num_columns)
    return (tl.program_id(2) == k) & is_inside


@triton.jit
def store_amax_of(part, value, r, c):
    """`store_amax` of a tile of a part."""
    num_rows, sums = size(part.num_rows), part.column_sums
    store_amax(value, r, c, num_rows, part.num_columns, *part.amax, sums)


@triton.jit
def store_codes_of(
    part, value, r, c,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """`store_codes` of a tile of a part."""
    num_row_partials, num_column_partials, num_tiles = part.counts
    store_codes(
        value, r, c, size(part.num_rows), part.num_columns,
        size(num_row_partials), size(num_column_partials), size(num_tiles),
        *part.amax, *part.copies,
        FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
    )  # fmt: skip


@triton.jit
def amax_kernel(
    parts, NUM_PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """`store_amax` of matrices (x, row stride, column stride)."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            value = load_tile(*part.tile, r, c, size(part.num_rows), part.num_columns)
            store_amax_of(part, value, r, c)


@triton.jit
def cast_kernel(
    parts, NUM_PARTS: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of matrices; and their column_sum from the column_sums of tiles, or those."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            num_rows, num_columns = size(part.num_rows), part.num_columns
            value = load_tile(*part.tile, r, c, num_rows, num_columns)
            store_codes_of(
                part, value, r, c,
                FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
            )  # fmt: skip
            if part.column_sum is not None:
                num_tiles = tl.cdiv(num_rows, BLOCK_R)
                sums, total = part.column_sums, part.column_sum
                store_sum(sums, num_tiles, c, num_columns, total, BLOCK_C, CHUNK)
            elif part.column_sums is not None:
                column = tl.program_id(0).to(tl.int64) * num_columns + c
                tl.store(part.column_sums + column, tl.sum(value, 0), c < num_columns)


def quantize(
    xs: Sequence[Tensor],
    rows: Operand | None,
    columns: Operand | None,
    wants_sum: Sequence[bool],
    slots: Sequence[Slot],
) -> list[tuple[Tensor, ...]]:
    """Codes, scales and an empty tensor scale of each x and of its transpose; the sum of its rows.

    Args:
        xs: [..., C], any strides, not empty.
        rows, columns: operands that `quantize.covers` holds for, or None.
        slots: counters of both copies, and what is known and seen; all magnitudes are known or
            none.
    """
    matrices = [launch.of_tensor(x.reshape(-1, x.shape[-1])) for x in xs]
    totals = [x.new_empty(x.shape[-1]) if w else None for x, w in zip(xs, wants_sum, strict=True)]
    sums = [
        None if total is None else total.new_empty((launch.grid(m)[0], len(total)), dtype=FP32)
        for m, total in zip(matrices, totals, strict=True)
    ]
    amaxes = known(slots)
    if amaxes:
        pairs = cast(cast_kernel, matrices, amaxes, rows, columns, slots, sums=sums)
        add_up(*([t for t in given if t is not None] for given in (totals, sums)))
    else:
        amaxes = measure(amax_kernel, matrices, rows, columns, sums)
        pairs = cast(cast_kernel, matrices, amaxes, rows, columns, slots, sums=sums, totals=totals)
    return [
        (*by_row, *by_column, x.new_empty(0) if total is None else total)
        for x, (by_row, by_column), total in zip(xs, pairs, totals, strict=True)
    ]


def rows(
    xs: Sequence[Tensor], rows: str, columns: str | None, slots: Sequence[Slot]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Codes, scales and amax_t; no x is empty, and all magnitudes are known or none."""
    by_row, by_column = Operand.parse(rows), None if columns is None else Operand.parse(columns)
    matrices = [launch.of_tensor(x.reshape(-1, x.shape[-1])) for x in xs]
    amaxes = known(slots) or measure(amax_kernel, matrices, by_row, by_column)
    amax_t = [launch.amax_for(m, by_column) for m in matrices]
    pairs = cast(cast_kernel, matrices, amaxes, by_row, None, slots, amax_out=amax_t)
    kept = [launch.present(a, x) for a, x in zip(amax_t, xs, strict=True)]
    return [c.codes for c, _ in pairs], [c.scales for c, _ in pairs], kept


def columns(
    xs: Sequence[Tensor],
    columns: str,
    amax_t: Sequence[Tensor],
    counters: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and scales of the transposed copies, in one pass."""
    by_column = Operand.parse(columns)
    matrices = [launch.of_tensor(x.reshape(-1, x.shape[-1])) for x in xs]
    amaxes = [launch.Amax.known(by_column, a) for a in amax_t]
    slots = [Slot(columns=c) for c in counters]
    pairs = cast(cast_kernel, matrices, amaxes, None, by_column, slots)
    return [c.codes for _, c in pairs], [c.scales for _, c in pairs]


def known(slots: Sequence[Slot]) -> list[launch.Amax]:
    """The magnitudes that are known beforehand, of all or of none."""
    found = [slot.known for slot in slots if slot.known is not None]
    return [launch.Amax.known(None, amax) for amax in found]


def measure(
    kernel: Any,
    matrices: Sequence[launch.Matrix],
    rows: Operand | None,
    columns: Operand | None,
    sums: Sequence[Tensor | None] = (),
) -> list[launch.Amax]:
    """The first pass: largest magnitudes of tiles, as far as the operands need them.

    Args:
        sums: room for the sums of the columns of tiles, or None, of each matrix.
    """
    amaxes = [launch.amax_buffers(m, rows, columns) for m in matrices]
    each = zip(matrices, amaxes, sums or [None] * len(matrices), strict=True)
    parts = [_part(m, amax, of_tiles) for m, amax, of_tiles in each]
    _launch(kernel, matrices, parts, {})
    return amaxes


def cast(
    kernel: Any,
    matrices: Sequence[launch.Matrix],
    amaxes: Sequence[launch.Amax],
    rows: Operand | None,
    columns: Operand | None,
    slots: Sequence[Slot],
    *,
    amax_out: Sequence[Tensor | None] = (),
    sums: Sequence[Tensor | None] = (),
    totals: Sequence[Tensor | None] = (),
) -> list[launch.Pair]:
    """The second pass: codes and scales of the copies, empty where there is no operand.

    Args:
        slots: counters of both copies, and where to record the magnitudes.
        amax_out: fp32, where to put what later scales of the columns come from, or None.
        sums: those of the rows of tiles, to be read if there are `totals`, else to be written.
    """
    absent = [None] * len(matrices)
    copies = [launch.copies_for(m, rows, columns) for m in matrices]
    parts = []
    for matrix, amax, pair, out, slot, of_tiles, total in zip(
        matrices, amaxes, copies, amax_out or absent, slots, sums or absent, totals or absent,
        strict=True,
    ):  # fmt: skip
        given = launch.copy_arguments(matrix, rows, columns, pair, out, slot)
        counts = tuple(map(unspecialized, amax.counts))
        parts.append(_part(matrix, amax, of_tiles, counts, given, total))
    constants = launch.settings(rows, columns) | {"CHUNK": launch.CHUNK}
    _launch(kernel, matrices, parts, constants)
    return [launch.filled(m, pair) for m, pair in zip(matrices, copies, strict=True)]


def _part(matrix: launch.Matrix, amax: launch.Amax, *others: Any) -> Part:
    num_rows = unspecialized(matrix.num_rows)
    return Part(tuple(matrix.arguments), num_rows, matrix.num_columns, tuple(amax), *others)


def _launch(
    kernel: Any,
    matrices: Sequence[launch.Matrix],
    parts: Sequence[Part],
    constants: dict[str, Any],
) -> None:
    grids = [launch.grid(matrix) for matrix in matrices]
    grid = max(g[0] for g in grids), max(g[1] for g in grids), len(matrices)
    options = launch.BLOCKS | matrices[0].constants
    with torch.cuda.device_of(matrices[0].like):
        kernel[grid](tuple(parts), NUM_PARTS=len(parts), **constants, **options)
