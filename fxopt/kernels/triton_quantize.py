"""What Triton kernels that cast matrices to FP8 are given: sizes, buffers, constants.

For one scale for a tensor or a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import magnitude_parts
from fxopt.kernels.counters import Slot
from fxopt.kernels.formats import FORMATS, Quantized, padded_columns
from fxopt.kernels.magnitude_parts import BLOCK_C, BLOCK_R
from fxopt.recipes import Operand

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

    def in_few_parts(self) -> Amax:
        """With no more parts of each than every program may read."""
        most = magnitude_parts.MOST_LINES, magnitude_parts.MOST_LINES, magnitude_parts.MOST_TILES
        return Amax(*(magnitude_parts.reduced(t, n) for t, n in zip(self, most, strict=True)))

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


def of_tensors(*pieces: Tensor) -> Matrix:
    """Tensors side by side: of each the kernel gets strides, first column and last + 1."""
    pieces_RC = [x.reshape(-1, x.shape[-1]) for x in pieces]
    stops = [*accumulate(x.shape[1] for x in pieces_RC)]
    each = zip(pieces_RC, [0, *stops], stops, strict=False)
    arguments = [(x, *x.stride(), start, stop) for x, start, stop in each]
    return Matrix(arguments, len(pieces_RC[0]), stops[-1], pieces_RC[0], {})


def amax_buffers(matrix: Matrix, rows: Operand | None, columns: Operand | None) -> Amax:
    """Room for the largest magnitudes of tiles, as far as the operands need them."""
    num_tiles = grid(matrix)
    operands = [o for o in (rows, columns) if o is not None]
    is_row, is_column = (o is not None and o.block == "row" for o in (rows, columns))
    has_tensor = any(o.block == "tensor" for o in operands)
    shapes = (
        ((num_tiles[1], matrix.num_rows), is_row),
        ((num_tiles[0], matrix.num_columns), is_column),
        ((num_tiles[0] * num_tiles[1],), has_tensor),
    )
    return Amax(*(_bits(matrix.like, shape) if needed else None for shape, needed in shapes))


Formats = tuple[Operand | None, Operand | None]  # how a copy and the transposed one are quantized
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


def copy_arguments(
    matrix: Matrix,
    rows: Operand | None,
    columns: Operand | None,
    copies: Copies,
    amax_out: Tensor | None,
    slot: Slot,
) -> tuple[Any, ...]:
    """The arguments of `store_codes` behind the magnitudes."""
    return (
        *pointers(copies[0]),
        *pointers(copies[1]),
        None if amax_out is None else amax_out.view(torch.int32),
        0 if columns is None else padded_size(columns, matrix.num_rows),
        padded_size(rows, matrix.num_columns),
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


def grid(matrix: Matrix) -> tuple[int, int]:
    """Tiles of the matrix; what it is padded with lies in the last ones."""
    return triton.cdiv(matrix.num_rows, BLOCK_R), triton.cdiv(matrix.num_columns, BLOCK_C)


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


def constants(rows: Operand | None, columns: Operand | None) -> tuple[object, ...]:
    """The same in the order of `store_codes`."""
    found = settings(rows, columns)
    return tuple(found[name + end] for name in ("FORMAT", "LARGEST", "POW2") for end in ("", "_T"))


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
