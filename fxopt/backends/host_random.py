"""Random numbers drawn on the host, from Python or NumPy, of which a graph sees nothing."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any


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
