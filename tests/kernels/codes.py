"""What tests of ops that write codes draw, and how they compare bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.counters import FIELDS

# Of a copy in rows and a transposed one.
FORMATS = [
    ("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
    ("e4m3/row/pow2", "e4m3/row/pow2"),
    ("e4m3/row/pow2", None),
    ("e5m2/tensor/pow2", "e4m3/row/fp32"),
    ("e4m3/row/fp32", "e5m2/tensor/fp32"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def line() -> Tensor:
    """Counters of one copy."""
    return torch.zeros(len(FIELDS), dtype=torch.int64)


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))
