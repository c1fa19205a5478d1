"""What the Triton kernels of norms do to a row, which is one program's: D features, in fp32.

Operands are (pointer, group stride, row stride), a pointer None where there is no operand. Of codes
as `fxopt::pack` makes them there are as well the same three of their scales, and a pointer to what
has the dtype of their values; kernels tell them by their length.

Shapes: G groups of R rows share their per-group operands; D features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.triton_gated_activation_kernels import PACKED
from fxopt.kernels.triton_quantize_kernels import code_of, factor_of, magnitude, scale_of
from fxopt.kernels.triton_saving import FORMAT, LARGEST


def varies_per_row(t: Tensor | None) -> bool:
    """Whether an operand differs from row to row."""
    return t is not None and t.dim() > 1 and t.shape[-2] != 1


class Groups:
    """The rows of `x` as G groups of R rows, such that no operand differs within a group."""

    def __init__(self, x: Tensor, operands: Sequence[Tensor | None]) -> None:
        num_varying = max(num_varying_dims(t, x.dim()) for t in operands)
        varying, common = x.shape[:num_varying], x.shape[num_varying:-1]
        self.num_groups, self.num_rows = math.prod(varying), math.prod(common)
        self.num_features = x.shape[-1]
        self.operand_shape = [*varying, *[1] * len(common), self.num_features]

    def reduce(self, grad_GD: Tensor, operand: Tensor) -> Tensor:
        """Sum a gradient per group to the shape of its operand."""
        return grad_GD.reshape(self.operand_shape).sum_to_size(operand.shape)


def num_varying_dims(operand: Tensor | None, rank: int) -> int:
    """Number of leading dims up to the last one, D aside, over which an operand varies."""
    if operand is None:
        return 0
    sizes = [1] * (rank - operand.dim()) + list(operand.shape)
    return max((i + 1 for i, size in enumerate(sizes[:-1]) if size != 1), default=0)


def groups_of(x: Tensor, operands: Sequence[Tensor | None]) -> Groups:
    """The rows of `x` in groups; operands that differ from row to row have a stride for that."""
    return Groups(x, [None if varies_per_row(t) else t for t in operands])


def rows_of(t: Tensor | None, x: Tensor, groups: Groups) -> tuple[Tensor | None, int, int]:
    """View an input or operand as `[G, R, D]`: its pointer, group stride and row stride."""
    if t is None:
        return None, 0, 0
    t_GRD = t.expand(x.shape).reshape(groups.num_groups, groups.num_rows, x.shape[-1])
    if t_GRD.stride(-1) != 1:
        t_GRD = t_GRD.contiguous()
    return t_GRD, t_GRD.stride(0), t_GRD.stride(1)


def packed_rows_of(
    t: Tensor | None, scales: Tensor | None, like: Tensor | None, x: Tensor, groups: Groups
) -> tuple[Any, ...]:
    """`rows_of` of a tensor of x's shape, or of its codes; like: of the dtype of their values."""
    if t is None or scales is None:
        return rows_of(t, x, groups)
    scales_GRc = scales.view(groups.num_groups, groups.num_rows, scales.shape[-1])
    codes, *strides = rows_of(t, x, groups)
    assert codes is not None
    return codes.view(torch.uint8), *strides, scales_GRc, *scales_GRc.stride()[:2], like


def pointers_of(rooms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Where `pack_row` leaves codes and scales of the norm's input and of x, of a call that may
    have no such rooms; codes as bytes."""
    h_codes, h_scales, x_codes, x_scales = rooms or [None] * 4
    h_codes, x_codes = (t if t is None else t.view(torch.uint8) for t in (h_codes, x_codes))
    return [h_codes, h_scales, x_codes, x_scales]


@triton.jit
def load(t, group, row, cols, mask):
    """Row of an operand in fp32, given as above."""
    value = tl.load(t[0] + group * t[1] + row * t[2] + cols, mask=mask, other=0)
    if len(t) > 3:
        # Always inside, so without a mask, whose registers would be spilled.
        block = tl.where(mask, cols, 0) // PACKED
        scale = tl.load(t[3] + group * t[4] + row * t[5] + block)
        value = value.to(FORMAT, bitcast=True).to(tl.float32) * scale
        value = value.to(t[6].dtype.element_ty)
    return value.to(tl.float32)


@triton.jit
def pack_row(codes, scales, value, token, num_features, cols, mask):
    """Store codes [M, D] and scales [M, c] of a row as `fxopt::pack` makes them, if there are."""
    if codes is not None:
        BLOCK: tl.constexpr = PACKED if value.shape[0] > PACKED else value.shape[0]
        value = tl.where(mask, value, 0.0)
        blocks = tl.reshape(value, [value.shape[0] // BLOCK, BLOCK])
        factor = factor_of(tl.max(magnitude(blocks), 1), LARGEST, False)
        code = code_of(blocks * factor[:, None], LARGEST, FORMAT)
        tl.store(codes + token * num_features + cols, tl.reshape(code, [value.shape[0]]), mask)
        num_blocks = tl.cdiv(num_features, PACKED)
        block = tl.arange(0, value.shape[0] // BLOCK)
        tl.store(scales + token * num_blocks + block, scale_of(factor), block < num_blocks)


@triton.jit
def store(t, offsets, value, mask):
    """Store where there is something to store to."""
    if t is not None:
        tl.store(t + offsets, value.to(t.dtype.element_ty), mask=mask)


@triton.jit
def gated_residual(value, residual, gate, x_bias, group, row, cols, mask):
    """residual + gate * (value + x_bias)"""
    if x_bias[0] is not None:
        value += load(x_bias, 0, 0, cols, mask)
    if gate[0] is not None:
        value = value * load(gate, group, row, cols, mask)
    return value + load(residual, group, row, cols, mask)


@triton.jit
def mean_of(value, stored, num_features, mask):
    """Mean of a row, which is kept at the pointer `stored`."""
    total = tl.sum(value, 0)
    row_mean = total / num_features
    # `/` is off by up to 2 ulp, which would give a row of one value a variance. What it left is
    # divided again; exact division takes more registers.
    row_mean += tl.fma(-row_mean, num_features * 1.0, total) / num_features
    if stored.dtype.element_ty == tl.float32:
        # What the sum rounded off.
        row_mean += tl.sum(tl.where(mask, value - row_mean, 0.0), 0) / num_features
    return row_mean


@triton.jit
def affine_of(n, weight, bias, weight_offset, cols, mask):
    if weight[0] is not None:
        n = n * (weight_offset + load(weight, 0, 0, cols, mask))
    if bias[0] is not None:
        n = n + load(bias, 0, 0, cols, mask)
    return n


@triton.jit
def modulation_of(scale, scale_offset, group, row, cols, mask):
    if scale[0] is not None:
        return scale_offset + load(scale, group, row, cols, mask)
    else:
        return 1.0


@triton.jit
def modulate(n, factor, shift, group, row, cols, mask):
    n = n * factor
    if shift[0] is not None:
        n = n + load(shift, group, row, cols, mask)
    return n
