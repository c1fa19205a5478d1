"""From samples to FAST, SLOW, SAME, INCONCLUSIVE or INVALID, with the interval that says so.

The quantity is the log-ratio of a round, (log a1 + log a2 - log b1 - log b2) / 2; its median over
the rounds is the log of the speedup. A margin divides the line in three: SAME needs the whole
interval inside the margin, FAST and SLOW the whole interval outside. What crosses is INCONCLUSIVE.
Looking at the samples again and again does not turn noise into a finding, as each verdict needs the
estimate to be off by the margin and its own uncertainty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fxopt.diagnose.protocol import Round, Samples
from fxopt.diagnose.resampling import level_change, median_interval

MARGIN = 0.015
CONFIDENCE = 0.95
# An early stop must hold at this one: many looks are many chances, and few rounds give an interval
# that is too short.
STOPPING_CONFIDENCE = 0.99
# Fewer values give no 95% interval of a median: 2 / 2^n is above 5% up to five of them.
FEWEST_ROUNDS = 6
# The burst may take at most this share of the rounds.
LONGEST_BURST = 0.5


class Label(StrEnum):
    """The answer in one word."""

    FAST = "FAST"
    SLOW = "SLOW"
    SAME = "SAME"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regressed, 3 inconclusive."""
        if self in (Label.SLOW, Label.INVALID):
            return 1
        return 3 if self is Label.INCONCLUSIVE else 0


@dataclass(frozen=True)
class Regime:
    """A stretch of rounds in which the machine kept its speed.

    Args:
        num_rounds: in it.
        baseline_s, candidate_s, reference_s: median seconds.
        speedup: median over rounds of baseline time / candidate time; above 1 is faster.
        low, high: its confidence interval.
    """

    num_rounds: int
    baseline_s: float
    candidate_s: float
    reference_s: float
    speedup: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What follows from the steady regime.

    Args:
        label: one word.
        reasons: why it is not simply what the interval says; empty if it is.
        steady: what the label is about; None if wrong results left nothing to time.
        burst: the rounds before the machine slowed down to its steady state, if it did.
        margin: a ratio within 1 / (1 + margin) and 1 + margin is no difference.
        confidence: of the intervals.
    """

    label: Label
    reasons: tuple[str, ...]
    steady: Regime | None
    burst: Regime | None
    margin: float
    confidence: float


def log_ratios(rounds: Sequence[Round]) -> list[float]:
    """Log of baseline time / candidate time in each round A B B A."""
    return [(math.log(a1 / b1) + math.log(a2 / b2)) / 2 for a1, b1, b2, a2 in rounds]


def regime(samples: Samples, rounds: slice, confidence: float = CONFIDENCE) -> Regime:
    """Medians and interval over some of the rounds."""
    chosen = samples.rounds[rounds]
    ratios = log_ratios(chosen)
    low, high = median_interval(ratios, confidence)
    return Regime(
        num_rounds=len(chosen),
        baseline_s=statistics.median(t for a1, _, _, a2 in chosen for t in (a1, a2)),
        candidate_s=statistics.median(t for _, b1, b2, _ in chosen for t in (b1, b2)),
        reference_s=statistics.median(t for pair in samples.reference[rounds] for t in pair),
        speedup=math.exp(statistics.median(ratios)),
        low=math.exp(low),
        high=math.exp(high),
    )


def burst_rounds(samples: Samples) -> int:
    """Rounds before the reference product became slower for good; 0 if it did not."""
    change = level_change([statistics.fmean(pair) for pair in samples.reference])
    if change is None or change[1] < 1 or change[0] > LONGEST_BURST * len(samples.rounds):
        return 0
    return change[0]


def label(low: float, high: float, margin: float = MARGIN) -> Label:
    """What the interval [low, high] of a speedup says against a margin."""
    if low > 1 + margin:
        return Label.FAST
    if high < 1 / (1 + margin):
        return Label.SLOW
    if low >= 1 / (1 + margin) and high <= 1 + margin:
        return Label.SAME
    return Label.INCONCLUSIVE


def is_decided(samples: Samples, margin: float = MARGIN) -> bool:
    """Whether more rounds are not needed."""
    steady = regime(samples, slice(burst_rounds(samples), None), STOPPING_CONFIDENCE)
    return label(steady.low, steady.high, margin) is not Label.INCONCLUSIVE


def judge(
    samples: Samples,
    invalid: Sequence[str] = (),
    *,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
) -> Verdict:
    """The verdict on some rounds; on none if `invalid` says why.

    Args:
        invalid: reasons for which no time counts: wrong results, an impossible speed.
    """
    if not samples.rounds:
        assert invalid
        return Verdict(Label.INVALID, tuple(invalid), None, None, margin, confidence)
    num_burst = burst_rounds(samples)
    steady = regime(samples, slice(num_burst, None), confidence)
    burst = regime(samples, slice(num_burst), confidence) if num_burst else None
    found, reasons = label(steady.low, steady.high, margin), []
    if steady.num_rounds < FEWEST_ROUNDS:
        found = Label.INCONCLUSIVE
    if found is Label.INCONCLUSIVE:
        reasons.append(
            f"the interval [{steady.low:.4f}, {steady.high:.4f}] crosses the margin of "
            f"{margin:.1%} after {steady.num_rounds} rounds; measure longer (--seconds) or on a "
            "quieter machine"
        )
    if samples.num_recompiles:
        found = Label.INCONCLUSIVE
        reasons.append(f"{samples.num_recompiles} graphs were compiled while the rounds ran")
    if invalid:
        found, reasons = Label.INVALID, [*invalid]
    return Verdict(found, tuple(reasons), steady, burst, margin, confidence)
