"""A caller may write in place to the slices that a block returns, as it may in eager.

Shape legend: B batch, S tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.backends.toys import Block, assert_like_eager, tokens
from tests.families import FAMILIES, seeded

NUM_TEXT = 2


class Residual(Block):
    """Slices of what nobody else reads: FLUX.1's single block."""

    def whole(self, x_BSC: Tensor) -> Tensor:
        return super().forward(x_BSC)

    def forward(self, x_BSC: Tensor) -> tuple[Tensor, ...]:
        x_BSC = self.whole(x_BSC)
        return x_BSC[:, :NUM_TEXT], x_BSC[:, NUM_TEXT:]


class ReadElsewhere(Residual):
    def forward(self, x_BSC: Tensor) -> tuple[Tensor, ...]:
        x_BSC = self.whole(x_BSC)
        return x_BSC[:, :NUM_TEXT], x_BSC[:, NUM_TEXT:], x_BSC.mean()


class OfAView(Residual):
    def whole(self, x_BSC: Tensor) -> Tensor:
        return super().whole(x_BSC).flip(1).transpose(0, 1).transpose(0, 1)


class Written(nn.Module):
    """Scales the pieces in place between two blocks."""

    def __init__(self, make: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([make() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            text, image, *rest = block(x)
            text.mul_(1.5)
            image.add_(0.5)
            x = torch.cat([text, image, *(t.expand(len(x), 1, x.shape[2]) for t in rest)], 1)
        return x


@pytest.mark.parametrize(
    "make, gradient",
    [
        (Residual, "UnsafeSplitWithSizesBackward0"),
        (ReadElsewhere, "SliceBackward0"),
        (OfAView, "SliceBackward0"),
    ],
    ids=["residual", "read elsewhere", "of a view"],
)
def test_returned_slices_can_be_written(make: type[nn.Module], gradient: str) -> None:
    model, eager = seeded(lambda: Written(make))(), seeded(lambda: Written(make))()
    fxopt.optimize(model)
    found = {type(t.grad_fn).__name__ for t in model.blocks[0](tokens())[:2]}
    assert found == {gradient} and fxopt.report(model).count("norm_modulate")
    assert_like_eager(model, eager)


def test_flux_trains_where_its_tokens_are_written() -> None:
    """Some control nets add what they found to the tokens in place."""
    flux = FAMILIES["flux"]
    inputs = flux.inputs(2, 16, torch.float32)

    def add_in_place(module: nn.Module, args: Any, tokens: tuple[Tensor, ...]) -> None:
        for t in tokens:
            t.add_(0.1)

    model, eager = flux.build(), flux.build()
    fxopt.optimize(model)
    for each in (model, eager):
        for block in each.single_transformer_blocks:
            block.register_forward_hook(add_in_place)
    assert_like_eager(model, eager, inputs)
