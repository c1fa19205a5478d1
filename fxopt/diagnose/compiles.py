"""Graphs that were compiled, and the guard that failed each time, from Dynamo's structured log.

It is the log that TORCH_TRACE writes to files; here a handler of it keeps what matters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch._logging._internal import trace_log


@dataclass(frozen=True)
class Compile:
    """One compilation of one function.

    Args:
        function: "name at file.py:line".
        reason: the guard that failed for every graph there was; "" the first time.
        seconds: that it took.
    """

    function: str
    reason: str
    seconds: float


class _Handler(logging.Handler):
    def __init__(self, found: list[Compile]) -> None:
        super().__init__()
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        metrics = getattr(record, "metadata", {}).get("compilation_metrics")
        if metrics is None or not metrics.get("co_name"):
            return
        place = f"{Path(metrics['co_filename']).name}:{metrics['co_firstlineno']}"
        reason = " ".join((metrics.get("recompile_reason") or "").split())
        # "0/1: " in front of it numbers the graph that it guards.
        reason = reason.partition(": ")[2] or reason
        seconds = metrics.get("entire_frame_compile_time_s") or 0.0
        self.found.append(Compile(f"{metrics['co_name']} at {place}", reason, seconds))


@contextmanager
def compiles() -> Iterator[list[Compile]]:
    """Inside, the list gains an entry with every compilation."""
    found: list[Compile] = []
    handler = _Handler(found)
    trace_log.addHandler(handler)
    try:
        yield found
    finally:
        trace_log.removeHandler(handler)
