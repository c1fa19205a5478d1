"""Two records of one thing, before and after: did its speedup change?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fxopt.diagnose.errors import InvalidRecord, RecordsDiffer
from fxopt.diagnose.record import Claim, Record
from fxopt.diagnose.resampling import medians
from fxopt.diagnose.verdict import Label, burst_rounds, label, log_ratios

# What two records may differ in: the change itself, and its time.
FREE = {"commit", "fxopt_commit"}


@dataclass(frozen=True)
class Change:
    """One case in two records.

    Args:
        name: of the case.
        label: FAST if the candidate gained on its baseline, SLOW if it lost.
        old, new: speedups.
        ratio, low, high: new / old and its confidence interval.
    """

    name: str
    label: Label
    old: float
    new: float
    ratio: float
    low: float
    high: float


def compare(old: Record, new: Record) -> list[Change]:
    """The change of every case; each record's speedup is against its own interleaved baseline.

    Raises:
        RecordsDiffer: naming the first field in which environment or configuration differ.
        InvalidRecord: if a claim in it is not complete.
    """
    _require_equal("environment", old.environment, new.environment)
    earlier = {claim.name: claim for claim in old.claims}
    later = {claim.name: claim for claim in new.claims}
    if earlier.keys() != later.keys():
        raise RecordsDiffer("the set of cases", sorted(earlier), sorted(later))
    return [_change(earlier[name], later[name]) for name in earlier]


def _require_equal(where: str, old: object, new: object) -> None:
    for name, before, after in _differences(where, old, new):
        raise RecordsDiffer(name, before, after)


def _differences(where: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if key not in FREE:
                yield from _differences(f"{where}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield where, old, new


def _change(old: Claim, new: Claim) -> Change:
    _require_equal(f"{old.name}: configuration", old.configuration, new.configuration)
    _require_equal(f"{old.name}: baseline", old.baseline, new.baseline)
    draws: list[np.ndarray] = []
    centres: list[float] = []
    for claim in (old, new):
        if claim.status != "complete" or not claim.samples.rounds or claim.verdict is None:
            raise InvalidRecord(claim.name, f"its claim is {claim.status} and was not timed")
        ratios = log_ratios(claim.samples.rounds[burst_rounds(claim.samples) :])
        draws.append(medians(ratios, seed=len(draws)))
        centres.append(float(np.median(ratios)))
    assert new.verdict is not None
    tail = (1 - new.verdict.confidence) / 2
    low, high = (math.exp(q) for q in np.quantile(draws[1] - draws[0], [tail, 1 - tail]))
    found = label(low, high, new.verdict.margin)
    if new.verdict.label is Label.INVALID:
        found = Label.INVALID
    first, second = math.exp(centres[0]), math.exp(centres[1])
    return Change(old.name, found, first, second, second / first, low, high)


def text(changes: list[Change]) -> str:
    """One line per case."""
    width = max(len(change.name) for change in changes)
    return "\n".join(
        f"{c.name:{width}}  {c.label:12}  {c.old:.3f}x -> {c.new:.3f}x, "
        f"ratio {c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}]"
        for c in changes
    )
