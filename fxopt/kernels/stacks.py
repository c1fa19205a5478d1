"""Tensors of one shape that lie one after the other in memory: one product reads them all.

A kernel that makes several gradients, those of queries and keys say, puts them so; the node that
multiplies them finds out by looking, as what comes in between may put others in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def empty_stacks(like: Sequence[Tensor | None]) -> list[Tensor | None]:
    """An uninitialised tensor for each, contiguous; those of one shape and dtype are a stack."""
    found: list[Tensor | None] = [None] * len(like)
    alike: dict[Any, list[tuple[int, Tensor]]] = {}
    for i, t in enumerate(like):
        if t is not None:
            # A symbolic size is not compared: that would tie a graph to the answer.
            is_sized = all(isinstance(size, int) for size in t.shape) and t.numel()
            alike.setdefault((t.shape, t.dtype) if is_sized else i, []).append((i, t))
    for members in alike.values():
        i, t = members[0]
        if len(members) == 1:
            found[i] = t.new_empty(t.shape)
            continue
        joint = t.new_empty(len(members) * t.numel())
        # No views to autograd: a write to one is none to another.
        for (i, t), part in zip(members, joint.unsafe_chunk(len(members)), strict=True):
            found[i] = part.view(t.shape)
    return found


def stacks(tensors: Sequence[Tensor | None]) -> list[tuple[list[int], Tensor]]:
    """Which of `tensors` lie one after the other, in that order, and each run of them as one.

    None in a trace: where tensors lie when it is made says nothing about where they will.
    """
    present = [(i, t) for i, t in enumerate(tensors) if t is not None]
    if len(present) < 2 or torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return []
    if not any(t.storage_offset() for _, t in present):  # each at the beginning of its own memory
        return []
    found = [(i, t) for i, t in present if _is_plain(t)]
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
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and (first.shape, first.dtype) == (second.shape, second.dtype)
        and first.storage_offset() + first.numel() == second.storage_offset()
    )


def _joint(first: Tensor, num: int) -> Tensor:
    """[num, *shape of the first]"""
    shape, strides = (num, *first.shape), (first.numel(), *first.stride())
    return torch.as_strided(first, shape, strides, first.storage_offset())
