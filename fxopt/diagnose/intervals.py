"""Sets of instants as sorted, disjoint intervals: [N, 2] arrays of starts and ends, int64.

Whole nanoseconds, because what touches must touch exactly: phases have to add up.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Intervals = np.ndarray
EMPTY: Intervals = np.empty((0, 2), dtype=np.int64)


def union(intervals: Intervals) -> Intervals:
    """The set that any intervals [N, 2] cover, in any order and overlapping as they may."""
    kept = intervals[intervals[:, 1] > intervals[:, 0]]
    if not len(kept):
        return EMPTY
    kept = kept[np.argsort(kept[:, 0], kind="stable")]
    reach = np.maximum.accumulate(kept[:, 1])
    first = np.r_[True, kept[1:, 0] > reach[:-1]]
    starts = np.flatnonzero(first)
    ends = np.r_[starts[1:] - 1, len(kept) - 1]
    return np.column_stack([kept[starts, 0], reach[ends]])


def joined(sets: Iterable[Intervals]) -> Intervals:
    """The union of several sets."""
    found = list(sets)
    return union(np.concatenate(found)) if found else EMPTY


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """Instants in both sets."""
    if not len(a) or not len(b):
        return EMPTY
    # Each interval of `a` meets a run of neighbours in `b`.
    first = np.searchsorted(b[:, 1], a[:, 0], side="right")
    last = np.searchsorted(b[:, 0], a[:, 1], side="left")
    counts = np.maximum(last - first, 0)
    of_a = np.repeat(np.arange(len(a)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    of_b = np.repeat(first, counts) + offsets
    return np.column_stack([np.maximum(a[of_a, 0], b[of_b, 0]), np.minimum(a[of_a, 1], b[of_b, 1])])


def difference(a: Intervals, b: Intervals) -> Intervals:
    """Instants in `a` and not in `b`."""
    if not len(a) or not len(b):
        return a
    limits = np.iinfo(np.int64)
    edges = np.r_[limits.min, b.ravel(), limits.max].reshape(-1, 2)
    return intersection(a, edges[edges[:, 1] > edges[:, 0]])


def seconds(intervals: Intervals) -> float:
    """Length of a set."""
    return 1e-9 * float((intervals[:, 1] - intervals[:, 0]).sum())


def contains(a: Intervals, moments: np.ndarray) -> np.ndarray:
    """Which moments [N] lie in a set; an interval holds its start and not its end."""
    if not len(a):
        return np.zeros(len(moments), dtype=bool)
    at = np.searchsorted(a[:, 0], moments, side="right") - 1
    inside: np.ndarray = (at >= 0) & (moments < a[np.maximum(at, 0), 1])
    return inside


def lengths_within(a: Intervals, edges: np.ndarray) -> np.ndarray:
    """Length of a set between each edge [N + 1] and the next."""
    if not len(a):
        return np.zeros(len(edges) - 1)
    ends = np.cumsum(a[:, 1] - a[:, 0])
    up_to = np.column_stack([np.r_[0, ends[:-1]], ends]).ravel()
    inside: np.ndarray = np.diff(np.interp(edges, a.ravel(), up_to))
    return inside
