"""What all idioms are spelled from: copies, casts, sums and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rewriting import Written

Pick = Callable[..., Any]
Spelling = tuple[nn.Module, list[Tensor]]

H, d = 3, 8
D = H * d
EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)


def copied(pick: Pick) -> Callable[[Tensor], Tensor]:
    """What leaves a tensor as it is."""
    return pick(
        "copy",
        lambda x: x,
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: x.to(x.dtype),
        lambda x: x.view(x.shape),
        lambda x: x.reshape(x.shape),
        lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: x.transpose(0, 1).transpose(0, 1),
        lambda x: F.dropout(x, 0.0),
        lambda x: x[:],
    )


def upcast(pick: Pick) -> Callable[[Tensor], Tensor]:
    return pick(
        "upcast",
        lambda x: x,
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.type(torch.float32),
        lambda x: x.to(dtype=torch.float32),
    )


def downcast(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """downcast(x, like): x in the dtype of `like`."""
    return pick(
        "downcast",
        lambda x, like: x.to(like.dtype),
        lambda x, like: x.type_as(like),
        lambda x, like: x.to(like),
        lambda x, like: x.type(like.dtype),
    )


def times(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    return pick(
        "times",
        lambda a, b: a * b,
        lambda a, b: b * a,
        lambda a, b: a.mul(b),
        lambda a, b: torch.mul(b, a),
        lambda a, b: torch.multiply(a, b),
    )


def plus(pick: Pick) -> Callable[[Any, Any], Tensor]:
    return pick(
        "plus",
        lambda a, b: a + b,
        lambda a, b: b + a,
        lambda a, b: torch.add(a, b),
        lambda a, b: torch.add(b, a) if isinstance(b, Tensor) else a.add(b),
    )


def one_plus(pick: Pick) -> Callable[[Tensor], Tensor]:
    return pick(
        "one plus",
        lambda s: 1 + s,
        lambda s: s + 1.0,
        lambda s: s.add(1),
        lambda s: torch.add(s, 1),
        lambda s: torch.add(torch.ones_like(s), s),
    )


def wrapped(pick: Pick, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward as it is, or in a region without autocast."""

    def off(m: nn.Module, *inputs: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(m, *inputs)

    return pick(
        "wrapper",
        forward,
        forward,
        off,
    )


def finished(
    pick: Pick, forward: Callable[..., Any], inputs: list[Tensor], **parameters: Tensor
) -> Spelling:
    module = Written(wrapped(pick, forward), **parameters)
    module.requires_grad_(pick("weights", True, False))
    return module, inputs


def split_heads(pick: Pick) -> Callable[[Tensor], Tensor]:
    """[B, S, n * d] to [B, S, n, d]."""
    return pick(
        "heads",
        lambda x: x.unflatten(-1, (-1, d)),
        lambda x: x.unflatten(2, (x.shape[-1] // d, d)),
        lambda x: x.view(x.shape[0], -1, x.shape[-1] // d, d),
        lambda x: x.reshape(*x.shape[:-1], -1, d),
        lambda x: x.view(x.size(0), x.size(1), -1, d),
    )
