"""Triton provider of `fxopt::quantize` for FP8 with one scale for a tensor or a row: two launches.

The first leaves the largest magnitudes of tiles, the second takes the scales from them and writes
both copies from one read. Where a magnitude is known beforehand, the second is all, and a small one
adds up the sums of its tiles. Producers of the matrix have kernels of their own for the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.counters import UNWATCHED, Slot
from fxopt.kernels.formats import FORMATS, Quantized, padded_columns
from fxopt.kernels.triton_add_up import add_up
from fxopt.kernels.triton_quantize_kernels import amax_kernel, cast_kernel
from fxopt.recipes import Operand

BLOCK_R, BLOCK_C = 64, 128
CHUNK = 32  # partial magnitudes that are reduced at a time
NUM_WARPS = 8
BLOCKS = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": NUM_WARPS}


class Amax(NamedTuple):
    """Bits of largest magnitudes, int32, or None where not needed.

    rows [., R], columns [., C] and tensor [.]: of parts, for the reader to reduce.
    """

    rows: Tensor | None
    columns: Tensor | None
    tensor: Tensor | None

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many parts each has."""
        rows, columns, tensor = self
        lengths = [0 if t is None else t.shape[0] for t in (rows, columns)]
        return lengths[0], lengths[1], 0 if tensor is None else tensor.numel()

    def of(self, columns: Operand) -> Tensor:
        """One fp32 magnitude for each column or for the tensor, as the operand has scales."""
        parts = self.columns if columns.block == "row" else self.tensor
        assert parts is not None
        return parts.amax(0, keepdim=parts.dim() == 1).view(torch.float32)

    @staticmethod
    def known(operand: Operand | None, amax_t: Tensor) -> Amax:
        """The magnitudes for the transposed copy, or for both if they share a scale; from an
        earlier pass, or an earlier step."""
        bits = amax_t.view(torch.int32)
        of_row = operand is not None and operand.block == "row"
        return Amax(None, bits.view(1, -1) if of_row else None, None if of_row else bits)


class Matrix(NamedTuple):
    """What is quantized: a kernel's arguments that make its tiles, and its size.

    `constants` are compile-time constants, and launch options other than BLOCKS.
    """

    arguments: Sequence[Any]
    num_rows: int
    num_columns: int
    like: Tensor
    constants: dict[str, Any]


def of_tensor(x_RC: Tensor) -> Matrix:
    num_rows, num_columns = x_RC.shape
    return Matrix((x_RC, *x_RC.stride()), num_rows, num_columns, x_RC, {})


def quantize(
    x_RC: Tensor,
    rows: Operand | None,
    columns: Operand | None,
    wants_sum: bool = False,
    slot: Slot = UNWATCHED,
) -> list[Tensor]:
    """Codes, scales and an empty tensor scale of x and then of its transpose; the sum of the rows.

    Args:
        x_RC: any strides, not empty.
        rows, columns: operands that `covers` holds for, or None.
        slot: counters of both copies, and what is known and seen of x.
    """
    matrix = of_tensor(x_RC)
    num_tiles = grid(matrix, rows, columns)[0]
    sums = column_sum = None
    if wants_sum:
        sums = x_RC.new_empty((num_tiles, x_RC.shape[1]), dtype=torch.float32)
        column_sum = x_RC.new_empty(x_RC.shape[1])
    if slot.known is None:
        amax = measure(amax_kernel, matrix, rows, columns, (sums,))
        pair = cast(cast_kernel, matrix, amax, rows, columns, None, (sums, column_sum), slot)
    else:
        amax = Amax.known(None, slot.known)
        pair = cast(cast_kernel, matrix, amax, rows, columns, None, (sums, None), slot)
        if sums is not None and column_sum is not None:
            add_up([column_sum], [sums])
    return [*pair[0], *pair[1], x_RC.new_empty(0) if column_sum is None else column_sum]


def measure(
    kernel: Any,
    matrix: Matrix,
    rows: Operand | None,
    columns: Operand | None,
    more: Sequence[Tensor | None] = (),
) -> Amax:
    """The first pass: largest magnitudes of tiles, as far as the operands need them."""
    amax = amax_buffers(matrix, rows, columns)
    sizes = matrix.num_rows, matrix.num_columns
    with torch.cuda.device_of(matrix.like):
        kernel[grid(matrix, rows, columns)](
            *matrix.arguments, *sizes, *amax, *more, **BLOCKS | matrix.constants
        )
    return amax


def amax_buffers(matrix: Matrix, rows: Operand | None, columns: Operand | None) -> Amax:
    """Room for the largest magnitudes of tiles, as far as the operands need them."""
    num_tiles = grid(matrix, rows, columns)
    operands = [o for o in (rows, columns) if o is not None]
    is_row, is_column = (o is not None and o.block == "row" for o in (rows, columns))
    has_tensor = any(o.block == "tensor" for o in operands)
    shapes = (
        ((num_tiles[1], matrix.num_rows), is_row),
        ((num_tiles[0], matrix.num_columns), is_column),
        ((num_tiles[0] * num_tiles[1],), has_tensor),
    )
    return Amax(*(_bits(matrix.like, shape) if needed else None for shape, needed in shapes))


def cast(
    kernel: Any,
    matrix: Matrix,
    amax: Amax,
    rows: Operand | None,
    columns: Operand | None,
    amax_out: Tensor | None = None,
    more: Sequence[Tensor | None] = (),
    slot: Slot = UNWATCHED,
) -> Pair:
    """The second pass: codes and scales of the copies, empty where there is no operand.

    Args:
        amax_out: fp32, where to put what later scales of the columns come from, or None.
        slot: counters of both copies, and where to record the magnitudes.
    """
    copies = copies_for(matrix, rows, columns)
    with torch.cuda.device_of(matrix.like):
        kernel[grid(matrix, rows, columns)](
            *matrix.arguments,
            *cast_arguments(matrix, amax, rows, columns, copies, amax_out, slot),
            *more,
            **settings(rows, columns),
            **BLOCKS | matrix.constants,
            CHUNK=CHUNK,
        )
    return filled(matrix, copies)


Pair = tuple[Quantized, Quantized]
Copies = tuple[Quantized | None, Quantized | None]


def copies_for(matrix: Matrix, rows: Operand | None, columns: Operand | None) -> Copies:
    """Room for both copies."""
    num_rows, num_columns = matrix.num_rows, matrix.num_columns
    return (
        copy_for(matrix.like, rows, num_rows, num_columns),
        copy_for(matrix.like, columns, num_columns, num_rows),
    )


def filled(matrix: Matrix, copies: Copies) -> Pair:
    """Both copies, empty where there is none."""
    of_rows, of_columns = copies
    return of_rows or nothing(matrix.like), of_columns or nothing(matrix.like)


def cast_arguments(
    matrix: Matrix,
    amax: Amax,
    rows: Operand | None,
    columns: Operand | None,
    copies: Copies,
    amax_out: Tensor | None,
    slot: Slot,
) -> tuple[Any, ...]:
    """The arguments of `store_codes`, from num_rows on."""
    num_rows, num_columns = matrix.num_rows, matrix.num_columns
    return (
        num_rows,
        num_columns,
        *amax.counts,
        *amax,
        *pointers(copies[0]),
        *pointers(copies[1]),
        None if amax_out is None else amax_out.view(torch.int32),
        0 if columns is None else padded_size(columns, num_rows),
        padded_size(rows, num_columns),
        slot.rows,
        slot.columns,
        slot.seen,
    )


def amax_for(matrix: Matrix, columns: Operand | None) -> Tensor | None:
    """Where a cast is to put the magnitudes for a later transposed copy."""
    if columns is None:
        return None
    size = matrix.num_columns if columns.block == "row" else 1
    return matrix.like.new_empty(size, dtype=torch.float32)


def present(amax_t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if amax_t is None else amax_t


def grid(matrix: Matrix, rows: Operand | None, columns: Operand | None) -> tuple[int, int]:
    """Tiles of the padded matrix."""
    return (
        triton.cdiv(padded_size(columns, matrix.num_rows), BLOCK_R),
        triton.cdiv(padded_size(rows, matrix.num_columns), BLOCK_C),
    )


def settings(rows: Operand | None, columns: Operand | None) -> dict[str, object]:
    """Compile-time constants of the casts."""
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


def copy_for(x: Tensor, operand: Operand | None, num_rows: int, size: int) -> Quantized | None:
    """An uninitialized copy of a matrix of this size."""
    if operand is None:
        return None
    dtype = FORMATS[operand.format].dtype
    return Quantized(
        x.new_empty((num_rows, padded_columns(operand, size)), dtype=dtype),
        x.new_empty((num_rows if operand.block == "row" else 1, 1), dtype=torch.float32),
        x.new_empty(0, dtype=torch.float32),
    )


def nothing(x: Tensor) -> Quantized:
    return Quantized(*(x.new_empty(0, dtype=torch.float32) for _ in range(3)))


def pointers(copy: Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if copy is None else (copy.codes.view(torch.uint8), copy.scales)


def _bits(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=torch.int32)
