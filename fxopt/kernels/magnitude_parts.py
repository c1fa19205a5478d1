"""Parts of largest magnitudes: what the first pass of a cast leaves, one of each tile.

Every program of the second pass reads those of its lines, or of the whole tensor: together the
square of what there is. Where they are many, a launch reduces them in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxopt.recipes import Operand

# A tile is 16 KB to read and 8 or 16 KB of codes. So many parts are 128 KB for a program to read
# from L2 (64 KB of columns), by arithmetic more than a launch from 8,192 tiles on; but FLUX.2's
# single block would then take 6 launches per linear, where 5 are asked. Not measured.
BLOCK_R, BLOCK_C = 64, 128
MOST_LINES, MOST_TILES = 128, 32_768


def reduced(parts: Tensor | None, most: int) -> Tensor | None:
    """Parts [P, ...] of integer bits as they are, or their largest [1, ...] if they are more."""
    return parts if parts is None or len(parts) <= most else parts.amax(0, keepdim=True)


def num_reductions(num_rows: int, num_columns: int, rows: str | None, columns: str | None) -> int:
    """How many of them the casts of a matrix take; operands are written as `Operand` is."""
    blocks = [o and Operand.parse(o).block for o in (rows, columns)]
    row_tiles, column_tiles = -(-num_rows // BLOCK_R), -(-num_columns // BLOCK_C)
    return sum((
        blocks[0] == "row" and column_tiles > MOST_LINES,
        blocks[1] == "row" and row_tiles > MOST_LINES,
        "tensor" in blocks and row_tiles * column_tiles > MOST_TILES,
    ))  # fmt: skip


def reductions_of(pieces: Sequence[Tensor], rows: str | None, columns: str | None) -> int:
    """The same of tensors side by side."""
    num_rows = pieces[0].numel() // pieces[0].shape[-1]
    return num_reductions(num_rows, sum(x.shape[-1] for x in pieces), rows, columns)
