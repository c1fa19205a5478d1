"""Triton provider of `fxopt::quantize_rows` and `fxopt::quantize_columns`: matrices in one launch.

The third index of the grid says which matrix; programs beyond its tiles do nothing.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_quantize as launch
from fxopt.kernels.counters import Slot
from fxopt.kernels.formats import Quantized
from fxopt.kernels.triton_quantize_kernels import (
    load_tile,
    store_amax,
    store_codes,
    tile_indices,
)
from fxopt.recipes import Operand


@triton.jit
def is_inside(num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether the program's tile has anything of a matrix of this size."""
    first_row, first_column = tl.program_id(0) * BLOCK_R, tl.program_id(1) * BLOCK_C
    return (first_row < num_rows) & (first_column < num_columns)


@triton.jit
def amax_kernel(matrices, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """`store_amax` of matrices (x, row stride, column stride, R, C, its three buffers)."""
    for k in tl.static_range(len(matrices)):
        m = matrices[k]
        if (tl.program_id(2) == k) & is_inside(m[3], m[4], BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            value = load_tile(m[0], m[1], m[2], r, c, m[3], m[4])
            store_amax(value, r, c, m[3], m[4], m[5], m[6], m[7], None)


@triton.jit
def cast_kernel(
    matrices,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of matrices, its arguments from num_rows on behind (x, row, column stride)."""
    for k in tl.static_range(len(matrices)):
        m = matrices[k]
        if (tl.program_id(2) == k) & is_inside(m[3], m[4], BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            value = load_tile(m[0], m[1], m[2], r, c, m[3], m[4])
            store_codes(
                value, r, c, m[3], m[4], m[5], m[6], m[7], m[8], m[9], m[10], m[11], m[12],
                m[13], m[14], m[15], m[16], m[17], m[18], m[19], m[20],
                FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
            )  # fmt: skip


def rows(
    xs: Sequence[Tensor], rows: str, columns: str | None, slots: Sequence[Slot]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Codes, scales and amax_t; no x is empty, and all magnitudes are known or none."""
    by_row, by_column = Operand.parse(rows), None if columns is None else Operand.parse(columns)
    matrices = [launch.of_tensor(x.reshape(-1, x.shape[-1])) for x in xs]
    known = [slot.known for slot in slots if slot.known is not None]
    amaxes = [launch.Amax.known(None, amax) for amax in known]
    if not known:
        amaxes = [launch.amax_buffers(m, by_row, by_column) for m in matrices]
        pairs = zip(matrices, amaxes, strict=True)
        arguments = [(*m.arguments, m.num_rows, m.num_columns, *amax) for m, amax in pairs]
        _launch(amax_kernel, matrices, arguments, {})
    amax_t = [launch.amax_for(m, by_column) for m in matrices]
    copies = _cast(matrices, amaxes, by_row, None, amax_t, slots)
    kept = [launch.present(a, x) for a, x in zip(amax_t, xs, strict=True)]
    return [c.codes for c in copies], [c.scales for c in copies], kept


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
    copies = _cast(matrices, amaxes, None, by_column, [None] * len(xs), slots)
    return [c.codes for c in copies], [c.scales for c in copies]


def _cast(
    matrices: Sequence[launch.Matrix],
    amaxes: Sequence[launch.Amax],
    by_row: Operand | None,
    by_column: Operand | None,
    amax_t: Sequence[Tensor | None],
    slots: Sequence[Slot],
) -> list[Quantized]:
    """The one copy of each matrix that there is an operand for."""
    arguments, copies = [], []
    for matrix, amax, out, slot in zip(matrices, amaxes, amax_t, slots, strict=True):
        pair = launch.copies_for(matrix, by_row, by_column)
        copies += [copy for copy in pair if copy is not None]
        cast = launch.cast_arguments(matrix, amax, by_row, by_column, pair, out, slot)
        arguments.append((*matrix.arguments, *cast))
    _launch(
        cast_kernel,
        matrices,
        arguments,
        launch.settings(by_row, by_column) | {"CHUNK": launch.CHUNK},
    )
    return copies


def _launch(
    kernel: Any,
    matrices: Sequence[launch.Matrix],
    arguments: Sequence[tuple[Any, ...]],
    constants: dict[str, Any],
) -> None:
    grids = [launch.grid(matrix, None, None) for matrix in matrices]
    grid = max(g[0] for g in grids), max(g[1] for g in grids), len(matrices)
    with torch.cuda.device_of(matrices[0].like):
        kernel[grid](tuple(arguments), **constants, **launch.BLOCKS)
