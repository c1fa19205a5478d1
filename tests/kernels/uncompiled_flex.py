"""FlexAttention's own reference on CPU tensors, gradients included, for as long as a test lasts.

Its kernels with a backward are for GPUs alone, and a CPU is refused before anything runs. Behind
that refusal is the reference that PyTorch holds its kernels to, which any device runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.nn.attention import flex_attention

from fxopt.kernels import flex


@contextmanager
def on_cpu() -> Iterator[list[Any]]:
    """Yields how far back and ahead queries saw in the calls that ran; None for all keys."""
    ran: list[Any] = []

    def run(*args: Any) -> Tensor:
        ran.append(args[4] and tuple(int(side) for side in args[4]))
        return flex._flex(*args)

    with (
        patch.object(flex_attention, "_validate_device", lambda *qkv: None),
        patch.object(flex, "_compiled", lambda: run),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield ran
