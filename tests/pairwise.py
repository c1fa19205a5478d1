"""Few combinations of many options that hold every pair of values of two of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Combinations by axis name; each takes a pair that is missing and then, axis by axis, the
    value that brings most others. Among equals the value used least comes first, so that the rest
    of a combination is not always the same."""
    missing = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(axes, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    used = dict.fromkeys(((a, i) for a in axes for i in range(len(axes[a]))), 0)
    rows = []
    while missing:
        # Of the missing pairs one of the two values used least; sorted, as sets have no order.
        row = dict(min(map(sorted, missing), key=lambda pair: [*(used[v] for v in pair), pair]))
        for axis in axes:
            if axis not in row:
                row[axis] = min(
                    range(len(axes[axis])),
                    key=lambda i: (
                        -sum(frozenset([(axis, i), other]) in missing for other in row.items()),
                        used[axis, i],
                    ),
                )
        missing -= set(map(frozenset, itertools.combinations(row.items(), 2)))
        for value in row.items():
            used[value] += 1
        rows.append({axis: axes[axis][row[axis]] for axis in axes})
    return rows
