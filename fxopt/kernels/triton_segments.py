"""Operands of norms that are rows of small tables, by an index of each token, in Triton kernels.

Shapes: G groups of R tokens with tables of their own, of N rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.norm_modulate_segments import num_segments_of
from fxopt.kernels.triton_rows import Groups, rows_of


@triton.jit
def segment_of(index, token, num_segments, mask):
    """Of tokens the row of their group's table, -1 if there is none."""
    i = tl.load(index + token, mask, other=0).to(tl.int64)
    i = tl.where(i < 0, i + num_segments, i)
    return tl.where((i >= 0) & (i < num_segments), i, -1).to(tl.int32)


# A function that returned a pointer that is None would not compile with Triton 3.6.
@triton.jit
def row_of(table, group, segment):
    """The row of a table (pointer, group stride, row stride) as an operand that all rows share."""
    return table[0] + group * table[1] + segment * table[2], 0, 0


class Segments:
    """The tokens of `x` in groups, their index, and tables as operands of the kernels."""

    def __init__(self, x: Tensor, tables: tuple[Tensor | None, ...], index: Tensor) -> None:
        self.x, self.num_segments = x, num_segments_of(*tables)
        self.groups = Groups(x, (x[..., :1, :],))
        every = x.new_empty(()).expand(*x.shape[:-2], self.num_segments, x.shape[-1])
        self.every, self.of_tables = every, Groups(every, (every[..., :1, :],))
        self.keys = Groups(every, (every,))
        index = index.view(torch.int8) if index.dtype == torch.bool else index
        self.index = index.expand(x.shape[:-1]).contiguous()

    def rows(self, t: Tensor | None) -> tuple[Tensor | None, int, int]:
        return rows_of(t, self.x, self.groups)

    def table(self, t: Tensor | None) -> tuple[Tensor | None, int, int]:
        return rows_of(t, self.every, self.of_tables)
