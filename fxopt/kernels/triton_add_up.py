"""Triton kernel that adds up partial sums: gradients of parameters, in one launch for all.

Always in the same order, so that no atomics are needed.
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

from fxopt.kernels.triton_sizes import size, unspecialized

ROWS, COLS = 32, 128  # of a tile of partial sums


class Sum(NamedTuple):
    """A parameter's gradient [WIDTH] and its partial sums [rows, WIDTH]."""

    out: Any
    partial: Any
    WIDTH: tl.constexpr


@triton.jit
def add_up_kernel(sums, num_partials, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums of the partial sums of every parameter; a program owns COLS elements of one."""
    program = tl.program_id(0)
    for i in tl.static_range(len(sums)):
        num_programs = tl.cdiv(sums[i].WIDTH, COLS)
        cols = program * COLS + tl.arange(0, COLS)[None, :]
        mask = cols < sums[i].WIDTH
        if (program >= 0) & (program < num_programs):
            total = tl.zeros((ROWS, COLS), sums[i].partial.dtype.element_ty)
            for start in tl.range(0, size(num_partials[i]), ROWS):
                rows = start + tl.arange(0, ROWS)[:, None]
                inside = mask & (rows < size(num_partials[i]))
                total += tl.load(
                    sums[i].partial + rows * sums[i].WIDTH + cols, mask=inside, other=0.0
                )
            total = tl.sum(total, axis=0, keep_dims=True)
            tl.store(sums[i].out + cols, total.to(sums[i].out.dtype.element_ty), mask=mask)
        program -= num_programs


def add_up(outs: Sequence[Tensor], partials: Sequence[Tensor]) -> None:
    """Write to each of `outs` the sum of its partial sums [rows, *shape of out], contiguous."""
    sums = tuple(
        Sum(out, partial, tl.constexpr(out.numel()))
        for out, partial in zip(outs, partials, strict=True)
    )
    if sums:
        num_partials = tuple(unspecialized(len(partial)) for partial in partials)
        grid = (sum(triton.cdiv(out.numel(), COLS) for out in outs),)
        with torch.cuda.device_of(outs[0]):
            add_up_kernel[grid](sums, num_partials, ROWS=ROWS, COLS=COLS)
