"""Exporting reports on itself; what matters goes to the report. All but torch speaks on."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from torch.export import _trace

from fxopt.backends.reads import replaced


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, without the loggers of torch, and without the graphs that `torch.export`
    prints where it fails."""
    top = logging.getLogger("torch")
    named = [v for v in logging.root.manager.loggerDict.values() if isinstance(v, logging.Logger)]
    # The others have the level of one above. Each that is set empties the caches of all loggers.
    own = [logger for logger in named if logger.level and _is_torch(logger)]
    levels = {logger: logger.level for logger in (top, *own)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), replaced(_trace, "print", _silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _is_torch(logger: logging.Logger) -> bool:
    return logger.name.partition(".")[0] == "torch"


def _silent(*_: Any, **__: Any) -> None:
    pass
