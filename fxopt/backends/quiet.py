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
    known = [logging.getLogger("torch"), *logging.root.manager.loggerDict.values()]
    named = [logger for logger in known if isinstance(logger, logging.Logger)]
    levels = {logger: logger.level for logger in named if _is_torch(logger)}
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
