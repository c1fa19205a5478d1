"""Loops of `fxopt::norm_modulate` for a CPU: where they apply, and their arguments.

Shapes: D features, R rows that share their modulation, G groups of such rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.cpp import ABSENT, Loop, Triple, have_shape, is_plain, pointer

NORMS = {"none": 0, "layer": 1, "rms": 2}
Allocate = Callable[[], tuple[Tensor, ...]]
OPERANDS = "3q3q3q3q2d"
FORWARD = Loop("norm_modulate", f"4qd3q3q{OPERANDS}4q")
BACKWARD = Loop("norm_modulate_backward", f"4q3q3q3q3q{OPERANDS}2q3q" + 6 * "3q")


def forward(args: Sequence[Any], outputs: Allocate) -> tuple[Tensor, ...] | None:
    """y, h, mean and rstd of `norm_modulate`; None where these loops are not for its arguments."""
    x, residual, *operands, norm, eps, weight_offset, scale_offset, h_dtype, dtype = args
    is_fp32 = h_dtype == dtype == torch.float32
    if not (is_fp32 and is_plain(x, residual, *operands) and have_shape(x.shape, residual)):
        return None
    sizes = _sizes(x, operands)
    packed = None if sizes is None else _operands(operands, x, sizes[0])
    if sizes is None or packed is None:
        return None
    kept, found = [_strided(t) for t in (x, residual)], outputs()
    rows = [field for t in kept for field in _rows(t, sizes)]
    of_operands = *packed, weight_offset, scale_offset
    written = [pointer(t) for t in found]
    FORWARD(*sizes, x.shape[-1], NORMS[norm], eps, *rows, *of_operands, *written)
    return found


def backward(
    args: Sequence[Any], wants: Sequence[bool], outputs: Allocate
) -> tuple[Tensor, ...] | None:
    """What `norm_modulate_backward` returns; None where these loops are not for its arguments."""
    *tensors, mean, rstd, norm, weight_offset, scale_offset, dtype, _, _ = args
    (grad_y, grad_h, h, x), operands = tensors[:4], tensors[4:]
    if dtype is not torch.float32 or not is_plain(*tensors):
        return None
    x = x if wants[0] else None
    if not have_shape(h.shape, grad_y, grad_h, x) or (wants[0] and x is None):
        return None
    sizes = _sizes(h, operands)
    packed = None if sizes is None else _operands(operands, h, sizes[0])
    if sizes is None or packed is None:
        return None
    read = grad_y, grad_h, h if norm != "none" else None, x
    kept, found = [_strided(t) for t in read], outputs()
    num_features, rows = h.shape[-1], [field for t in kept for field in _rows(t, sizes)]
    dh, dx, dgate, dweight, dbias, dscale, dshift, dx_bias, y = found
    sums = [
        field
        for t in (dgate, dscale, dshift, dweight, dbias, dx_bias)
        for field in (pointer(t), num_features if t.numel() > num_features else 0, 0)
    ]
    statistics = pointer(mean), pointer(rstd)
    written = [pointer(t) for t in (dh, dx, y)]
    of_operands = *packed, weight_offset, scale_offset
    BACKWARD(*sizes, num_features, NORMS[norm], *rows, *of_operands, *statistics, *written, *sums)
    return found


def _sizes(x: Tensor, operands: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """Groups and rows in each; None of no elements."""
    if x.numel() == 0:
        return None
    num_rows = math.prod(x.shape[:-1])
    if x.dim() < 3:
        varies = any(t is not None and t.dim() == 2 and t.shape[0] > 1 for t in operands)
        return (num_rows, 1) if varies else (1, num_rows)
    return x.shape[0], num_rows // x.shape[0]


def _strided(t: Tensor | None) -> Tensor | None:
    """`t`, or a copy of what `_rows` has no words for."""
    if t is None or t.is_contiguous() or (t.dim() == 3 and t.stride(2) == 1):
        return t
    return t.contiguous()


def _rows(t: Tensor | None, sizes: tuple[int, int]) -> Triple:
    """Where the rows of each group are."""
    if t is None:
        return ABSENT
    if t.dim() == 3:
        return t.data_ptr(), t.stride(0), t.stride(1)
    num_features = t.shape[-1]
    return t.data_ptr(), sizes[1] * num_features, num_features


def _operands(operands: Sequence[Tensor | None], x: Tensor, num_groups: int) -> list[int] | None:
    """gate, scale, shift, then weight, bias and x_bias; None of one that is no row for each group,
    nor one for all."""
    gate, weight, bias, scale, shift, x_bias = operands
    num_features, found = x.shape[-1], list[int]()
    for t in (gate, scale, shift):
        if t is None:
            found += ABSENT
        elif t.shape[-1] != num_features or (num_features > 1 and t.stride(-1) != 1):
            return None
        elif t.numel() == num_features:
            found += t.data_ptr(), 0, 0
        elif t.dim() == x.dim() and t.shape[0] * num_features == t.numel() and num_groups > 1:
            found += t.data_ptr(), t.stride(0), 0
        else:
            return None
    for t in (weight, bias, x_bias):
        if t is not None and (t.numel() != num_features or not t.is_contiguous()):
            return None
        found.append(pointer(t))
    return found
