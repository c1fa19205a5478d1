"""Triton kernel of `fxopt::linear_cross_entropy`: softmax, loss and gradient of rows of logits.

Shape suffixes: C rows, V logits of a row.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time; 8 warps read 16 bytes of bf16 a thread, twice
NUM_WARPS = 8


@triton.jit(do_not_specialize=["ignore_index"])
def softmax_kernel(
    logits,
    targets,
    coefficient,
    losses,
    row_stride,
    num_columns,
    ignore_index,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss, then its gradient in place of its logits."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    # Per lane; -inf would make NaN of a lane that has seen nothing but -inf.
    top = tl.full([BLOCK], -3.4e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    picked = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        at = start + columns
        value = tl.load(logits + at, at < num_columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
        picked = tl.where(at == target, value, picked)
    highest = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp(top - highest), 0)
    counts = target != ignore_index
    # A target that is none is never silent.
    is_class = (target >= 0) & (target < num_columns)
    chosen = tl.where(is_class, tl.sum(picked, 0), float("nan"))
    # Below the largest logit: what is added to that rounds the others off.
    tl.store(losses + row, tl.where(counts, tl.log(row_total) - (chosen - highest), 0.0))
    if WANTS_GRADIENT:
        factor = tl.where(is_class, tl.load(coefficient), float("nan"))
        factor = tl.where(counts, factor, 0.0)
        for start in range(0, num_columns, BLOCK):
            at = start + columns
            mask = at < num_columns
            value = tl.load(logits + at, mask, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(value - highest) / row_total - tl.where(at == target, 1.0, 0.0)
            gradient = gradient * factor
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask)


def softmax(
    logits_CV: Tensor,
    target_C: Tensor,
    coefficient: Tensor,
    ignore_index: int,
    loss_C: Tensor,
    wants_gradient: bool,
) -> None:
    """`linear_cross_entropy.softmax_native` in one launch; logits contiguous along V."""
    if logits_CV.numel() == 0:
        return
    with torch.cuda.device_of(logits_CV):
        softmax_kernel[(len(logits_CV),)](
            *(logits_CV, target_C, coefficient, loss_C),
            *(logits_CV.stride(0), logits_CV.shape[1], ignore_index),
            WANTS_GRADIENT=wants_gradient,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
