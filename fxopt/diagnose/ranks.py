"""The processes that measure together: decisions that all share, a failure that all hear of.

At each decision every rank leaves its values in the launcher's store and reads those of the others.
A rank that fails leaves its error instead, so nobody waits for it; one that stays silent for too
long is named. A store needs no device and no collective, which a failed rank would leave unmatched.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

PATIENCE = 300.0  # seconds


class RankFailed(RuntimeError):
    """Another rank has failed, or has not come to a decision in time.

    Args:
        rank: which.
        error: its own, or how long it was waited for.
        where: "file.py:line" that raised; "" if it is not known.
    """

    def __init__(self, rank: int, error: str, where: str = "") -> None:
        super().__init__(f"rank {rank}: {error}")
        self.rank, self.error, self.where = rank, error, where


class Ranks:
    """This rank among the others.

    Args:
        rank, world_size: of this process, and of how many.
        store: of torch.distributed, shared by all; None for a process alone.
        patience: seconds that a decision waits for a rank.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, store: Any = None, patience: float = PATIENCE
    ) -> None:
        self.rank, self.world_size, self.store = rank, world_size, store
        self.patience = timedelta(seconds=patience)
        self.num_decisions = 0
        self.has_parted = False

    def agree(self, values: list[float]) -> list[float]:
        """The largest of each value over all ranks, so that every rank decides alike.

        Raises:
            RankFailed: if a rank has failed, or does not come.
        """
        if self.world_size == 1:
            return values
        self.store.set(self._key(self.rank), json.dumps({"values": values}))
        keys = [self._key(rank) for rank in range(self.world_size)]
        try:
            self.store.wait(keys, self.patience)
        except torch.distributed.DistError as error:
            seconds = self.patience.total_seconds()
            absent = (rank for rank, key in enumerate(keys) if not self.store.check([key]))
            raise RankFailed(
                next(absent, self.rank),
                f"has not come to decision {self.num_decisions} within {seconds:g} s",
            ) from error
        said = [json.loads(text) for text in self.store.multi_get(keys)]
        for rank, word in enumerate(said):
            if "error" in word:
                raise RankFailed(rank, word["error"], word["where"])
        self.num_decisions += 1
        return [max(each) for each in zip(*(word["values"] for word in said), strict=True)]

    def fail(self, error: str, where: str) -> None:
        """Tell the others that this rank will not come any more."""
        if self.world_size > 1:
            self.has_parted = True
            self.store.set(self._key(self.rank), json.dumps({"error": error, "where": where}))

    def failure(self) -> RankFailed | None:
        """What another rank has said of its failure: then this rank's own is only what followed."""
        for rank in range(self.world_size):
            key = self._key(rank)
            if rank != self.rank and self.store.check([key]):
                word = json.loads(self.store.get(key))
                if "error" in word:
                    return RankFailed(rank, word["error"], word["where"])
        return None

    def leave(self, code: int) -> int:
        """The exit code of this process; after a failure the process ends here and now.

        A collective that was left unmatched still has its threads, and C++ aborts a process that
        ends with them. torchrun would then kill the others, and with them who writes the record.
        """
        if self.has_parted:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    def _key(self, rank: int) -> str:
        return f"decision {self.num_decisions} of rank {rank}"


ALONE = Ranks()


@contextmanager
def joined(patience: float = PATIENCE) -> Iterator[Ranks]:
    """The ranks of torchrun, in a process group; otherwise this process alone.

    Args:
        patience: seconds that decisions and, where the backend can tell, collectives wait.
    """
    if "RANK" not in os.environ:
        yield ALONE
        return
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(iter(rendezvous("env://")))
    torch.distributed.init_process_group(
        "nccl" if has_cuda else "gloo",
        store=PrefixStore("collectives", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=patience),
    )
    try:
        yield Ranks(rank, world_size, PrefixStore("decisions", store), patience)
    finally:
        torch.distributed.destroy_process_group()
