"""Random numbers drawn on the host, from Python or NumPy, of which a graph sees nothing."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class HostRandom:
    """The states of both generators; `numpy` is None where NumPy is not loaded."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None

    @staticmethod
    def now() -> HostRandom:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return HostRandom(random.getstate(), None)
        kind, key, *rest = numpy.random.get_state()
        return HostRandom(random.getstate(), (kind, tuple(key.tolist()), *rest))

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def of_generators(module: nn.Module) -> list[bytes]:
    """The states of generators that `module`, what is in it, or their classes hold."""
    return [pickle.dumps(g) for g in _held(module) if not isinstance(g, torch.Generator)]


@contextmanager
def same_generators(module: nn.Module) -> Iterator[None]:
    """Leave those generators, and PyTorch's among them, as they are found."""
    kept = [(g, _state(g)) for g in _held(module)]
    try:
        yield
    finally:
        for generator, state in kept:
            _set_state(generator, state)


def _held(module: nn.Module) -> list[Any]:
    numpy = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    kinds = (random.Random, torch.Generator, *of_numpy)
    owners = {id(o): o for m in module.modules() for o in (m, *type(m).__mro__)}
    held = (v for o in owners.values() for v in getattr(o, "__dict__", {}).values())
    # The system's entropy has no state.
    return [v for v in held if isinstance(v, kinds) and not isinstance(v, random.SystemRandom)]


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
