"""What ran in a step, by name and by kind of work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fxopt.diagnose.kinds import kind
from fxopt.diagnose.trace import Columns

# Of each step; a page shows fewer, so that what is in one step is seldom left out of another.
NUM_TOP = 40


def by_name(
    work: Columns, seconds: np.ndarray, names: Sequence[str]
) -> Iterator[tuple[str, float, int]]:
    """Seconds and calls of each name.

    Args:
        work: [N] events.
        seconds: [N] of each.
        names: texts of the events' numbers.
    """
    totals = np.bincount(work.names, seconds, len(names))
    counts = np.bincount(work.names, minlength=len(names))
    for number in np.unique(work.names):
        yield names[number], float(totals[number]), int(counts[number])


def top(work: Columns, seconds: np.ndarray, names: Sequence[str]) -> list[tuple[str, float, int]]:
    """The names that took the longest."""
    return sorted(by_name(work, seconds, names), key=lambda entry: -entry[1])[:NUM_TOP]


def by_kind(work: Columns, seconds: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Seconds of each kind of work."""
    found: dict[str, float] = {}
    for name, spent, _ in by_name(work, seconds, names):
        found[kind(name)] = found.get(kind(name), 0.0) + spent
    return found


def self_time(columns: Columns) -> np.ndarray:
    """Nanoseconds of each event without the events inside it on the same thread."""
    spans = columns.spans
    lasting = spans[:, 1] - spans[:, 0]
    own = lasting.copy()
    order = np.lexsort((-spans[:, 1], spans[:, 0], columns.places))
    stack: list[int] = []
    for index in order:
        while stack and (
            columns.places[stack[-1]] != columns.places[index]
            or spans[stack[-1], 1] <= spans[index, 0]
        ):
            stack.pop()
        if stack:
            own[stack[-1]] -= lasting[index]
        stack.append(index)
    return own
