"""Two things timed against each other: in turn, A B B A, so that drift falls on both alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """How fast a candidate is.

    Args:
        baseline, candidate: seconds, one entry per pair of neighbouring runs.
    """

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def log_ratios(self) -> list[float]:
        pairs = zip(self.baseline, self.candidate, strict=True)
        return [math.log(before / after) for before, after in pairs]

    @property
    def speedup(self) -> float:
        """Median over the pairs of baseline time / candidate time: above 1 is faster."""
        return math.exp(statistics.median(self.log_ratios))

    @property
    def interval(self) -> tuple[float, float]:
        """Bootstrap confidence interval of `speedup`, at `CONFIDENCE`."""
        ratios, generator = self.log_ratios, random.Random(0)
        medians = sorted(
            statistics.median(generator.choices(ratios, k=len(ratios)))
            for _ in range(NUM_RESAMPLES)
        )
        tail = round((1 - CONFIDENCE) / 2 * NUM_RESAMPLES)
        return math.exp(medians[tail]), math.exp(medians[-1 - tail])


def compare(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    num_pairs: int,
    num_warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Run both `num_pairs` times in turn, the first of a pair last in the next.

    Args:
        baseline, candidate: functions without arguments that finish their work before they return.
        num_warmup: runs of each before the first that counts.
        clock: seconds.
    """
    functions = (baseline, candidate)
    for function in functions * num_warmup:
        function()
    seconds: tuple[list[float], list[float]] = ([], [])
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for pair in range(num_pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                start = clock()
                functions[which]()
                seconds[which].append(clock() - start)
    finally:
        if was_enabled:
            gc.enable()
    return Comparison(tuple(seconds[0]), tuple(seconds[1]))
