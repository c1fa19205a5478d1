"""Statistics of timings: the interval of a median, and where the level of a series changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 1000
# A change of level below this share is left in the series.
SHIFT = 0.03
# Fewest samples on either side of a change.
LEAST = 4


def medians(values: Sequence[float], seed: int = 0) -> np.ndarray:
    """Medians of `NUM_RESAMPLES` bootstrap resamples of a series.

    Circular blocks of about n^(1/3) neighbours are drawn instead of single values, because noise of
    a machine lasts longer than one sample.

    Args:
        values: in the order in which they were measured; at least one.

    Source: Politis and Romano, "A Circular Block-Resampling Procedure for Stationary Data", 1992.
    """
    series = np.asarray(values, dtype=float)
    length = max(1, round(len(series) ** (1 / 3)))
    num_blocks = -(-len(series) // length)
    starts = np.random.default_rng(seed).integers(0, len(series), (NUM_RESAMPLES, num_blocks, 1))
    drawn = ((starts + np.arange(length)) % len(series)).reshape(NUM_RESAMPLES, -1)
    resampled: np.ndarray = np.median(series[drawn[:, : len(series)]], axis=1)
    return resampled


def median_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of a series, see `medians`."""
    low, high = np.quantile(medians(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def level_change(seconds: Sequence[float]) -> tuple[int, float] | None:
    """Where a series of times changes its level the most, and the factor; None if it is flat.

    The split is the least-squares one of the logarithms. It counts if the medians are `SHIFT` apart
    and the quartiles of the two sides do not overlap.

    Args:
        seconds: positive, in order.
    """
    series = np.log(np.asarray(seconds, dtype=float))
    if len(series) < 2 * LEAST:
        return None
    before = np.arange(LEAST, len(series) - LEAST + 1)
    sums = np.cumsum(series)
    means = sums[before - 1] / before
    means_after = (sums[-1] - sums[before - 1]) / (len(series) - before)
    gain = (means - means_after) ** 2 * before * (len(series) - before)
    split = int(before[np.argmax(gain)])
    first, second = series[:split], series[split:]
    slower, faster = (second, first) if means[split - LEAST] < second.mean() else (first, second)
    factor = float(np.exp(np.median(second) - np.median(first)))
    apart = np.quantile(slower, 0.25) > np.quantile(faster, 0.75)
    return (split, factor) if apart and abs(np.log(factor)) > np.log1p(SHIFT) else None
