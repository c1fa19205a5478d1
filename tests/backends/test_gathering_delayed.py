"""Delayed scaling beside an all-gather of codes: the same training as beside one of weights."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxopt
from fxopt.backends.gathering import Gathering
from fxopt.kernels import delayed
from fxopt.recipes import RECIPES
from tests.backends.gathered_ranks import backward, batch, counted, gradients, num_gathered, shard
from tests.backends.toys import stack
from tests.ranks import needs_gloo, spawn

DELAYED = dataclasses.replace(RECIPES["fp8"], name="delayed", history=3, all_gather="fp8")
NUM_LINEARS, NUM_STEPS = 12, 6


def train(model: nn.Module, group: Any) -> list[Tensor]:
    """Losses and gradients of steps with two micro-batches, a validation between them."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(NUM_STEPS):
        size = (1.0, 4.0, 0.25)[step % 3]
        with fxopt.cast_weights_once() if step % 2 else nullcontext():
            with fxopt.at_step(step, group=group):
                found.append(backward(model, size * batch()))
            with torch.no_grad(), fxopt.at_step(10_000):
                found.append(model(batch()))
            with fxopt.at_step(step, group=group):
                found += [backward(model, size * batch(num_tokens=9)), *gradients(model)]
        optimizer.step()
        optimizer.zero_grad()
    return found


def num_known() -> list[int]:
    """Lines that have a past, by operand."""
    lines = delayed._lines.values()
    usable = [line.history.usable[line.place] for line in lines]
    return torch.tensor(usable).sum(0).tolist()


def worker(rank: int) -> None:
    assert_bit_equal(fxopt.optimize, dist.group.WORLD)
    assert_bit_equal(fxopt.swap, None)


def assert_bit_equal(door: Any, group: Any) -> None:
    expected, found = (run(door, group, gathers_codes) for gathers_codes in (False, True))
    different = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not a.equal(b)]
    assert not different, f"of {len(found)} results {different} differ"
    assert all(t.isfinite().all() for t in found)


def run(door: Any, group: Any, gathers_codes: bool) -> list[Tensor]:
    model = door(stack(), recipe=DELAYED)
    shard(model)
    with ExitStack() as scope:
        scope.enter_context(delayed.apart())
        if not gathers_codes:
            scope.enter_context(mock.patch.object(Gathering, "__call__", lambda *_: None))
        found = train(model, group)
        with counted() as collectives, fxopt.at_step(NUM_STEPS, group=group):
            backward(model)
        num_x, num_weights, num_gradients = num_known()
    assert num_x and num_gradients and not num_weights
    assert num_gathered(model) == NUM_LINEARS * gathers_codes
    # That of the weights' magnitudes, and that of all histories.
    assert collectives.num_reductions == gathers_codes + (group is not None)
    return found


@needs_gloo
def test_bits_are_those_of_weights_that_are_gathered_whole(tmp_path: Path) -> None:
    spawn(tmp_path, 2, worker)
