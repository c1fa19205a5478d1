"""Weights that are cast once for all micro-batches of a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.kernels.quantize import Pair, quantize_pair
from fxopt.recipes import Recipe


class _Entry(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    pair: Pair


class WeightCasts:
    """Both copies of the weights met so far, for the products of forward and backward."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str, str], _Entry] = {}
        self._is_open = True

    def close(self) -> None:
        self._is_open = False
        self._entries.clear()

    def of(self, weight: Tensor, recipe: Recipe) -> Pair | None:
        """The copies of `weight`, cast again if it was written; None where nothing may be kept."""
        traced = get_proxy_mode() is not None or is_traceable_wrapper_subclass(weight)
        if not self._is_open or traced or recipe.fprop is None or recipe.dgrad is None:
            return None
        rows, columns = recipe.fprop.b, recipe.dgrad.b
        key = id(weight), str(rows), str(columns)
        state = weight._version, weight.untyped_storage()._cdata, weight.storage_offset()
        entry = self._entries.get(key)
        if entry is None or entry.weight() is not weight or entry.state != state:
            pair = quantize_pair(weight.detach(), rows, columns)
            entry = self._entries[key] = _Entry(weakref.ref(weight), state, pair)
        return entry.pair


_active: ContextVar[WeightCasts | None] = ContextVar("active", default=None)


def active() -> WeightCasts | None:
    """The scope that runs, for an autograd node to take along: backward has a thread of its own."""
    return _active.get()


@contextmanager
def cast_weights_once() -> Iterator[None]:
    """Cast each weight once, for the forward and backward of all micro-batches inside.

        with fxopt.cast_weights_once():
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    A weight is cast again if PyTorch has recorded a write to it. Writes through `.data`, or by a
    kernel that PyTorch knows nothing of, leave no record: keep them outside. The copies take two
    bytes per element (FP8) until the end; where FSDP gathers weights anew for each use, that is the
    memory it saves. Graphs of a compiler cast where they stand.
    """
    casts = WeightCasts()
    token = _active.set(casts)
    try:
        yield
    finally:
        _active.reset(token)
        casts.close()
