"""Triton provider of `fxopt::quantize`, `quantize_rows` and `quantize_columns`: matrices, or one,
to FP8 in two launches.

The first leaves the largest magnitudes of tiles, the second takes the scales from them and writes
all copies from one read; if a matrix has very many tiles, their magnitudes are reduced in between
(`magnitude_parts`). Where magnitudes are known beforehand, the second is all, and a small one
adds up the sums of its tiles. Producers of matrices have kernels of their own for the same steps.

The third index of the grid says which matrix; programs beyond its tiles do nothing.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_quantize as launch
from fxopt.kernels.counters import Slot
from fxopt.kernels.triton_add_up import add_up
from fxopt.kernels.triton_quantize_kernels import (
    load_pieces,
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
    """`store_amax` of matrices, each of pieces as in `load_pieces`."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            value = load_pieces(part.tile, r, c, size(part.num_rows), BLOCK_R, BLOCK_C)
            store_amax_of(part, value, r, c)


@triton.jit
def cast_kernel(
    parts, NUM_PARTS: tl.constexpr, FORMATS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of matrices, each in FORMATS of its own; and their column_sum from the
    column_sums of tiles, or those."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            num_rows, num_columns = size(part.num_rows), part.num_columns
            value = load_pieces(part.tile, r, c, num_rows, BLOCK_R, BLOCK_C)
            store_codes_of(part, value, r, c, *FORMATS[k], BLOCK_R, BLOCK_C, CHUNK)
            if part.column_sum is not None:
                num_tiles = tl.cdiv(num_rows, BLOCK_R)
                sums, total = part.column_sums, part.column_sum
                store_sum(sums, num_tiles, c, num_columns, total, BLOCK_C, CHUNK)
            elif part.column_sums is not None:
                column = tl.program_id(0).to(tl.int64) * num_columns + c
                tl.store(part.column_sums + column, tl.sum(value, 0), c < num_columns)


def quantize(
    pieces: Sequence[Sequence[Tensor]],
    formats: Sequence[launch.Formats],
    wants_sum: Sequence[bool],
    slots: Sequence[Slot],
) -> list[tuple[Tensor, ...]]:
    """Codes, scales and an empty tensor scale of each x and of its transpose; the sum of its rows.

    Args:
        pieces: of each x, side by side: [..., C] each, any strides, not empty.
        formats: of both copies, operands that `quantize.covers` holds for, or None.
        slots: counters of both copies, and what is known and seen.
    """
    matrices = [launch.of_tensors(*x) for x in pieces]
    each = zip(matrices, wants_sum, strict=True)
    totals = [m.like.new_empty(m.num_columns) if wanted else None for m, wanted in each]
    sums = [
        None if total is None else total.new_empty((launch.grid(m)[0], len(total)), dtype=FP32)
        for m, total in zip(matrices, totals, strict=True)
    ]
    is_open = [slot.known is None for slot in slots]
    own = [*compress(matrices, is_open)]
    given = [*compress(formats, is_open)], [*compress(sums, is_open)]
    measured = iter(measure(amax_kernel, own, *given) if own else [])
    amaxes = [
        next(measured) if slot.known is None else launch.Amax.known(columns, slot.known)
        for slot, (_, columns) in zip(slots, formats, strict=True)
    ]
    at_once = [t if now else None for t, now in zip(totals, is_open, strict=True)]
    pairs = cast(cast_kernel, matrices, amaxes, formats, slots, sums=sums, totals=at_once)
    pairs_of_sums = [*compress(zip(totals, sums, strict=True), [not now for now in is_open])]
    later = [(t, s) for t, s in pairs_of_sums if t is not None and s is not None]
    add_up([t for t, _ in later], [s for _, s in later])
    return [
        (*by_row, *by_column, m.like.new_empty(0) if total is None else total)
        for m, (by_row, by_column), total in zip(matrices, pairs, totals, strict=True)
    ]


def rows(
    xs: Sequence[Tensor], rows: str, columns: str | None, slots: Sequence[Slot]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Codes, scales and amax_t; no x is empty, and all magnitudes are known or none."""
    by_row, by_column = Operand.parse(rows), None if columns is None else Operand.parse(columns)
    matrices = [launch.of_tensors(x) for x in xs]
    both, of_rows = ([(by_row, o)] * len(matrices) for o in (by_column, None))
    amaxes = known(slots) or measure(amax_kernel, matrices, both)
    amax_t = [launch.amax_for(m, by_column) for m in matrices]
    pairs = cast(cast_kernel, matrices, amaxes, of_rows, slots, amax_out=amax_t)
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
    matrices = [launch.of_tensors(x) for x in xs]
    amaxes = [launch.Amax.known(by_column, a) for a in amax_t]
    slots = [Slot(columns=c) for c in counters]
    pairs = cast(cast_kernel, matrices, amaxes, [(None, by_column)] * len(matrices), slots)
    return [c.codes for _, c in pairs], [c.scales for _, c in pairs]


def known(slots: Sequence[Slot]) -> list[launch.Amax]:
    """The magnitudes that are known beforehand, of all or of none."""
    found = [slot.known for slot in slots if slot.known is not None]
    return [launch.Amax.known(None, amax) for amax in found]


def measure(
    kernel: Any,
    matrices: Sequence[launch.Matrix],
    formats: Sequence[launch.Formats],
    sums: Sequence[Tensor | None] = (),
) -> list[launch.Amax]:
    """The first pass: largest magnitudes of tiles, as far as the operands need them, or where
    these are many what they come to.

    Args:
        sums: room for the sums of the columns of tiles, or None, of each matrix.
    """
    amaxes = [launch.amax_buffers(m, *own) for m, own in zip(matrices, formats, strict=True)]
    each = zip(matrices, amaxes, sums or [None] * len(matrices), strict=True)
    parts = [_part(m, amax, of_tiles) for m, amax, of_tiles in each]
    _launch(kernel, matrices, parts, {})
    return [amax.in_few_parts() for amax in amaxes]


def cast(
    kernel: Any,
    matrices: Sequence[launch.Matrix],
    amaxes: Sequence[launch.Amax],
    formats: Sequence[launch.Formats],
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
    copies = [launch.copies_for(m, *own) for m, own in zip(matrices, formats, strict=True)]
    parts = []
    for matrix, amax, own, pair, out, slot, of_tiles, total in zip(
        matrices, amaxes, formats, copies, amax_out or absent, slots, sums or absent,
        totals or absent, strict=True,
    ):  # fmt: skip
        given = launch.copy_arguments(matrix, own[0], own[1], pair, out, slot)
        counts = tuple(map(unspecialized, amax.counts))
        parts.append(_part(matrix, amax, of_tiles, counts, given, total))
    in_formats = tuple(launch.constants(*own) for own in formats)
    _launch(kernel, matrices, parts, {"FORMATS": in_formats, "CHUNK": launch.CHUNK})
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
