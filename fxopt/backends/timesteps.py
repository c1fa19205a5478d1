"""Buckets of diffusion timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

MIXED = "mixed"


def bucket_of(
    timesteps: Tensor | Sequence[float] | float | None, buckets: Sequence[float]
) -> Tensor:
    """The bucket that all timesteps lie in, or the one behind the last if they lie in several.

    int64 []; on the device of the timesteps, as to look at it would wait for them.
    """
    if timesteps is None or not buckets:
        return torch.zeros((), dtype=torch.int64)
    t = torch.as_tensor(timesteps).detach().double().reshape(-1)
    index = torch.zeros_like(t, dtype=torch.int64)
    for edge in buckets:
        index += t >= edge
    least = index.amin()
    return torch.where(least == index.amax(), least, len(buckets) + 1)


def bucket_labels(buckets: Sequence[float]) -> list[str]:
    """A name for each bucket, "mixed" the last."""
    if not buckets:
        return ["all", MIXED]
    between = [f"{a:g} <= t < {b:g}" for a, b in pairwise(buckets)]
    return [f"t < {buckets[0]:g}", *between, f"t >= {buckets[-1]:g}", MIXED]
