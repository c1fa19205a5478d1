"""Random numbers drawn on the host, from Python or NumPy, of which a graph sees nothing."""

from __future__ import annotations

import pickle
import random
import sys
from dataclasses import dataclass
from typing import Any

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
    numpy = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    kinds = (random.Random, *of_numpy)
    owners = {id(o): o for m in module.modules() for o in (m, *type(m).__mro__)}
    held = (v for o in owners.values() for v in getattr(o, "__dict__", {}).values())
    return [pickle.dumps(v) for v in held if isinstance(v, kinds)]
