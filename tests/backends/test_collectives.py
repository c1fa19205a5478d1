"""Blocks whose forward waits for other processes run it as often on all of them.

Shape legend: B batch, S tokens, C channels.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import fxopt
from fxopt.backends.collectives import ALONE
from tests.backends.toys import Block, captures, reasons, stack, tokens
from tests.ranks import needs_gloo, spawn

NUM_RANKS = 2


class Gathering(Block):
    """Adds what the tokens of all ranks are in the mean."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = super().forward(x_BSC)
        mean_C = x_BSC.detach().mean((0, 1))
        dist.all_reduce(mean_C)
        return x_BSC + mean_C


def train(model: torch.nn.Module, x_BSC: Tensor) -> list[Tensor]:
    model.zero_grad()
    y_BSC = model(x_BSC)
    y_BSC.square().mean().backward()
    return [y_BSC.detach(), *(p.grad.clone() for p in model.parameters())]


def worker(rank: int) -> None:
    eager = stack(Gathering)
    model = fxopt.optimize(copy.deepcopy(eager))
    # A batch of one, at other steps on each rank, is a graph of its own or another trial.
    for batches in ((2, 2), (1, 2), (3, 1), (2, 3)):
        x_BSC = tokens(batches[rank]) + rank
        for found, expected in zip(train(model, x_BSC), train(eager, x_BSC), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert fxopt.report(model).count("norm_modulate") == 2 and reasons(model) == [ALONE]
    assert captures(model) == 1


@needs_gloo
def test_a_size_that_one_rank_alone_sees_runs_no_collective_twice(tmp_path: Path) -> None:
    spawn(tmp_path, NUM_RANKS, worker)
