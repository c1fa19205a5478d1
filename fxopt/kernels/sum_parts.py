"""sum_parts: tensors of one shape added in one pass, rounded once."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from fxopt.kernels.registration import opmath_of, register


def native(parts: list[Tensor]) -> Tensor:
    """y = sum of parts, accumulated in fp32 (fp64 for fp64) in the order of the list.

    Args:
        parts: at least one; same shape, dtype and device, contiguous.

    Returns y in their dtype, rounded once: pairwise sums would round after each.
    """
    first, *others = parts
    total = first.to(opmath_of(first), copy=True)
    return reduce(lambda sum, part: sum.add_(part), others, total).to(first.dtype)


def triton(parts: list[Tensor]) -> Tensor:
    from fxopt.kernels import triton_sum_parts

    in_fp64 = parts[0].dtype == torch.float64
    return native(parts) if in_fp64 else triton_sum_parts.forward(parts)


sum_parts = register(
    "sum_parts(Tensor[] parts) -> Tensor",
    native=native,
    fake=lambda parts: parts[0].new_empty(parts[0].shape),
    triton=triton,
)
