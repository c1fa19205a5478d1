"""Tensors of one shape that lie one after the other in memory: one product reads them all.

A kernel that makes several gradients, those of queries and keys say, puts them so; the node that
multiplies them finds out by looking, as what comes in between may put others in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def empty_stacks(like: Sequence[Tensor | None]) -> list[Tensor | None]:
    """An uninitialised tensor for each, contiguous; those of one shape and dtype are a stack."""
    found: list[Tensor | None] = [None if t is None else t.new_empty(t.shape) for t in like]
    # A symbolic size is not compared: that would tie a graph to the answer.
    sized = {
        i: (t.shape, t.dtype)
        for i, t in enumerate(like)
        if t is not None and all(isinstance(size, int) for size in t.shape)
    }
    for kind in dict.fromkeys(sized.values()):
        members = [i for i, other in sized.items() if other == kind]
        if len(members) > 1:
            joint = found[members[0]].new_empty((len(members), *kind[0]))  # type: ignore[union-attr]
            for place, i in enumerate(members):
                found[i] = joint[place]
    return found


def stacks(tensors: Sequence[Tensor | None]) -> list[tuple[list[int], Tensor]]:
    """Which of `tensors` lie one after the other, in that order, and each run of them as one."""
    found = [(i, t) for i, t in enumerate(tensors) if t is not None and _is_plain(t)]
    runs: list[list[tuple[int, Tensor]]] = []
    for i, t in sorted(found, key=lambda pair: pair[1].storage_offset()):
        run = next((run for run in runs if _follows(run[-1][1], t)), None)
        if run is None:
            runs.append([(i, t)])
        else:
            run.append((i, t))
    return [([i for i, _ in run], _joint(run[0][1], len(run))) for run in runs if len(run) > 1]


def _is_plain(t: Tensor) -> bool:
    """Not one of a subclass: a tracer's, say, has no memory to speak of."""
    return type(t) in (Tensor, FakeTensor) and t.is_contiguous() and t.numel() > 0


def _follows(first: Tensor, second: Tensor) -> bool:
    return (
        (first.shape, first.dtype) == (second.shape, second.dtype)
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() + first.numel() == second.storage_offset()
    )


def _joint(first: Tensor, num: int) -> Tensor:
    """[num, *shape of the first]"""
    shape, strides = (num, *first.shape), (first.numel(), *first.stride())
    return torch.as_strided(first, shape, strides, first.storage_offset())
