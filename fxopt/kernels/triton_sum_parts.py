"""Triton provider of `fxopt::sum_parts`."""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements; 4 warps read 16 bytes of bf16 a thread, twice


@triton.jit
def sum_kernel(parts, y, num_elements, BLOCK: tl.constexpr):
    """y = sum of the tuple `parts`; of a multiple of 16 elements, a thread reads 16 bytes."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(parts)):
        total += tl.load(parts[k] + i, mask, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask)


def forward(parts: Sequence[Tensor]) -> Tensor:
    """`parts` contiguous."""
    y = torch.empty_like(parts[0])
    if y.numel():
        with torch.cuda.device_of(y):
            grid = (triton.cdiv(y.numel(), BLOCK),)
            sum_kernel[grid](tuple(parts), y, y.numel(), BLOCK=BLOCK)
    return y
