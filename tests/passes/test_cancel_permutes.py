"""Permutes that undo a transposition are taken out, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.passes import ir
from fxopt.passes.cancel_permutes import cancel_permutes

SWAPPED = [0, 2, 1, 3]


def cancelled(forward: Callable[[Tensor], Tensor]) -> int:
    x = torch.randn(2, 3, 4, 5)
    gm = make_fx(forward, tracing_mode="fake")(x)
    before = len(gm.graph.nodes)
    cancel_permutes(gm.graph)
    ir.eliminate_dead_code(gm.graph)
    gm.recompile()
    found, expected = gm(x), forward(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    return before - len(gm.graph.nodes)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.transpose(1, 2).permute(SWAPPED) + 1,
        lambda x: x.transpose(-3, -2).permute(SWAPPED) + 1,
        lambda x: x.permute(SWAPPED).permute(0, -2, -3, -1) + 1,
        lambda x: x.permute(3, 0, 1, 2).permute(1, 2, 3, 0) + 1,
    ],
    ids=["transpose", "negative", "permutes", "cycle"],
)
def test_what_undoes_another_is_taken_out(forward: Callable[[Tensor], Tensor]):
    assert cancelled(forward) == 2


def test_what_others_read_stays():
    def forward(x: Tensor) -> Tensor:
        swapped = x.transpose(1, 2)
        return swapped.permute(SWAPPED).sum() + swapped.cumsum(1)

    assert cancelled(forward) == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.transpose(1, 3).permute(SWAPPED) + 1,
        lambda x: x.permute(3, 0, 1, 2).permute(3, 0, 1, 2) + 1,
        lambda x: x.transpose(1, 2).contiguous().permute(SWAPPED) + 1,
        lambda x: x.permute(SWAPPED) + 1,
    ],
    ids=["other dims", "cycle twice", "copy between", "alone"],
)
def test_others_are_left(forward: Callable[[Tensor], Tensor]):
    assert cancelled(forward) == 0
