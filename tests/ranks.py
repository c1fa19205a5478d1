"""Processes of one gloo group, for what has to hold on several ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What a capture imports, and its tests.
CAPTURING = ["fxopt.backends.rewritten", "fxopt.passes.rules", "tests.backends.toys"]
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def spawn(folder: Path, num_ranks: int, *workers: Callable[[int], None]) -> None:
    """Run each `worker(rank)` on all ranks, one worker after another."""
    # They are forked from a server that has imported what they run: it takes seconds each.
    multiprocessing.set_forkserver_preload([__name__, "torch.distributed.fsdp", *CAPTURING])
    arguments = workers, str(folder), num_ranks
    mp.start_processes(_start, arguments, num_ranks, start_method="forkserver")


def _start(
    rank: int, workers: tuple[Callable[[int], None], ...], folder: str, num_ranks: int
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks)
    try:
        for worker in workers:
            worker(rank)
    finally:
        dist.destroy_process_group()
