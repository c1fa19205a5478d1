"""Calls of one block run side by side; what puts other tensors in the place of its own runs alone.

A capture and its check do, in the module itself: a call beside them would read fake tensors, or
give gradients to copies.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

# A capture replaces attributes of PyTorch's classes for its time, and tracing is not for threads.
CAPTURING = threading.RLock()
_THREAD = threading.local()


class Turns:
    """Of one block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()
        self._alone: int | None = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A call: waits while another thread is alone."""
        own, depth = threading.get_ident(), getattr(_THREAD, "depth", 0)
        with self._changed:
            self._changed.wait_for(lambda: self._alone in (None, own) or own in self._inside)
            self._inside[own] += 1
        _THREAD.depth = depth + 1
        try:
            yield
        finally:
            _THREAD.depth = depth
            with self._changed:
                self._inside[own] -= 1
                if not self._inside[own]:
                    del self._inside[own]
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """A capture: waits for the calls and captures of other threads; whether it may begin.

        It may not if it would have to wait inside of a call: two such would wait for each other.
        """
        own, may_wait = threading.get_ident(), not getattr(_THREAD, "depth", 0)
        if not CAPTURING.acquire(blocking=may_wait):
            yield False
            return
        try:
            with self._changed:
                before, begins = self._alone, may_wait or not self._others(own)
                if begins:
                    self._alone = own
                    self._changed.wait_for(lambda: not self._others(own))
            try:
                yield begins
            finally:
                with self._changed:
                    self._alone = before
                    self._changed.notify_all()
        finally:
            CAPTURING.release()

    def _others(self, own: int) -> bool:
        return any(thread != own for thread in self._inside)
