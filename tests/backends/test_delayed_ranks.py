"""Delayed scaling on two processes: lines outlive FSDP2's gathers, a group shares magnitudes."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import fxopt
from fxopt.kernels import delayed
from fxopt.recipes import RECIPES
from tests.backends.test_fsdp import WORLD_SIZE, shard, step
from tests.backends.toys import stack, tokens
from tests.ranks import needs_gloo, spawn

DELAYED = replace(RECIPES["fp8"], name="delayed", history=4)


def worker(rank: int) -> None:
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16)):
        lines_outlive_gathers(rank, policy)
    magnitudes_are_of_the_group(rank)


def lines_outlive_gathers(rank: int, policy: MixedPrecisionPolicy) -> None:
    """Who meets the same batch again scales as by itself: a line that is lost would show at once,
    as its weight would be refused or wait for a past."""
    gc.collect()
    x = tokens(batch=4).chunk(WORLD_SIZE)[rank]
    current, model = (fxopt.optimize(stack(num_blocks=1), recipe=r) for r in ("fp8", DELAYED))
    for m in (current, model):
        shard(m, policy)
    expected_loss, expected = step(current, x)
    num_linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    for number in range(4):
        with fxopt.at_step(number):
            loss, gradients = step(model, x)
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(gradients[name], g) for name, g in expected.items())
        lines = [line for line in delayed._lines.values() if line.weight() is not None]
        assert len(lines) == num_linears, len(lines)
        assert all(line.is_known(delayed.WEIGHT) for line in lines) == (number > 0)


def magnitudes_are_of_the_group(rank: int) -> None:
    """Of rank 1 the input, and with it every gradient, is larger."""
    x = tokens(batch=4).chunk(WORLD_SIZE)[rank] * (1 + 3 * rank)
    found = {}
    for group in (None, dist.group.WORLD):
        model = fxopt.optimize(stack(num_blocks=1), recipe=DELAYED)
        for number in range(2):
            with fxopt.at_step(number, group=group), counted() as calls:
                step(model, x)
            assert calls.call_count == (0 if group is None else 1)
        everywhere: list[Any] = [None] * WORLD_SIZE
        dist.all_gather_object(everywhere, known(model))
        found[group] = everywhere
    alone, together = found.values()
    assert not torch.equal(*alone)
    assert torch.equal(*together) and torch.equal(together[0], torch.maximum(*alone))


def known(model: nn.Module) -> Tensor:
    """Magnitudes by linear and operand."""
    weights = {id(p) for p in model.parameters()}
    lines = [line for line in delayed._lines.values() if id(line.weight()) in weights]
    return torch.stack([line.history.known[line.place] for line in lines])


def counted() -> Any:
    return mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce)


@needs_gloo
def test_on_two_processes(tmp_path: Path) -> None:
    spawn(tmp_path, WORLD_SIZE, worker)
