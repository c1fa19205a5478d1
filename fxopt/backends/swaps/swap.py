"""What a swap is: a forward that may stand for a module's own, and the inputs that prove it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Unfit(Exception):
    """A fused forward does not cover this module; the message says why."""


class Draw:
    """A seeded source of small inputs on the CPU, in the dtype of a module's matrices."""

    B, S, T = 2, 5, 3  # samples, tokens, tokens of the second stream

    def __init__(self, module: nn.Module) -> None:
        parameters = [p for p in module.parameters() if p.is_floating_point()]
        matrices = [p for p in parameters if p.dim() == 2]
        first = next(iter((*matrices, *parameters)), None)
        self.dtype = torch.get_default_dtype() if first is None else first.dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        # The offset keeps means away from zero: a LayerNorm is then no RMSNorm.
        return (x + 0.3).to(self.dtype)

    def tables(self, *shape: int) -> tuple[Tensor, Tensor]:
        """cos and sin of random angles, in fp32 as models make them."""
        angle = torch.randn(shape, generator=self.generator, device="cpu")
        return angle.cos(), angle.sin()


Arguments = dict[str, Any]


@dataclass(frozen=True)
class Swap:
    """A candidate to stand for the forward of one kind of module.

    name: tells hypotheses about one module apart.
    forward: `forward(module, **arguments)`; raises Unfit where it does not apply.
    examples: small arguments for a module; one dict for each set of arguments that it is given.
    constants: arguments that get no gradient (tables, masks).
    passed_on: arguments that go to the attention function as they are, whatever they hold.
    """

    name: str
    forward: Callable[..., Any]
    examples: Callable[[Any, Draw], Iterator[Arguments]]
    constants: tuple[str, ...] = ()
    passed_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A swap for the blocks whose forward is that of one of `classes` (dotted names)."""

    classes: tuple[str, ...]
    swap: Swap
