"""Two steps timed in one process: a warm-up that ends on evidence, then rounds of A B B A.

Drift that is linear over a round cancels in it. Every other round is B A A B, so that no step
always comes first. A reference matrix product is timed around each round: it leaves its caches to
whoever comes first, and as it knows nothing of either step, it shows when the machine itself
changed its speed.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fxopt.diagnose.resampling import level_change

Step = Callable[[], object]
Round = tuple[float, float, float, float]

# Rounds of the warm-up that must show neither recompiles nor growth nor a change of level.
WINDOW = 8
# A sample lasts at least this long; calls of shorter steps are repeated within it.
SHORTEST_SAMPLE = 5e-3  # seconds
# Growth of the allocator, in bytes per round, that counts as none.
NO_GROWTH = 1 << 20
# Between two looks at the samples their number grows by this factor.
GROWTH = 1.25


class Device(Protocol):
    """What the protocol asks of the machine; tests bring one with a clock of their own."""

    def now(self) -> float:
        """Seconds of a clock that only advances."""

    def seconds(self, step: Step, num_calls: int, flush: bool) -> float:
        """Seconds per call; `flush` empties the caches ahead of each call, outside the time."""

    def reference(self) -> float:
        """Seconds of a fixed matrix product."""

    def readings(self) -> dict[str, float]:
        """Clocks, power and temperature, as far as they can be read."""

    def num_recompiles(self) -> int:
        """Graphs that were compiled so far."""

    def held_bytes(self) -> int:
        """What the allocator has taken from the system; on a CPU the most since `forget_held`."""

    def forget_held(self) -> str:
        """Begin anew where only the most that was ever held is known; why it cannot, or ""."""

    def agree(self, values: list[float]) -> list[float]:
        """The largest of each value over all ranks, so that every rank decides alike."""


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        min_rounds, min_seconds: both pass before the first look; other processes disturb for
            stretches of time, which many short samples in a row would all share.
        max_rounds, seconds: either ends the timing.
        min_warmup, warmup_seconds: least and most seconds of the warm-up.
        flush: empty the caches before every call: for kernels, not for steps.
    """

    min_rounds: int = 16
    min_seconds: float = 4.0
    max_rounds: int = 2000
    seconds: float = 120.0
    min_warmup: float = 1.0
    warmup_seconds: float = 60.0
    flush: bool = False


@dataclass
class WarmUp:
    """How the warm-up ended.

    Args:
        ended: "evidence", or "limit" if time ran out before there was any; "" while it runs.
        num_rounds: calls of each step.
        seconds: that it took.
        num_recompiles: during it.
        blind: why growth of memory may not have shown; "" if it did.
    """

    ended: str = ""
    num_rounds: int = 0
    seconds: float = 0.0
    num_recompiles: int = 0
    blind: str = ""


@dataclass
class Samples:
    """What was measured; filled while it is measured, so that a failure keeps what came before.

    Args:
        rounds: seconds per call, [num_rounds, 4]: A, its neighbour B, the other B, its neighbour A.
        reference: seconds of the reference product before and after each round.
        readings: clocks and power after each round, where they can be read.
        num_calls: calls in one sample.
        num_recompiles: graphs compiled while the rounds ran.
    """

    warmup: WarmUp = field(default_factory=WarmUp)
    rounds: list[Round] = field(default_factory=list)
    reference: list[tuple[float, float]] = field(default_factory=list)
    readings: list[dict[str, float]] = field(default_factory=list)
    num_calls: int = 1
    num_recompiles: int = 0


def measure(
    baseline: Step,
    candidate: Step,
    device: Device,
    plan: Plan,
    samples: Samples,
    decided: Callable[[Samples], bool],
) -> None:
    """Warm up, then add rounds to `samples` until `decided` or the plan's limits say stop.

    Args:
        baseline, candidate: functions without arguments.
        decided: looks at the samples now and then; must not depend on anything but them, because
            every rank asks for itself.
    """
    with _collector_at_rest():
        shortest = warm_up(baseline, candidate, device, plan, samples.warmup)
        samples.num_calls = max(1, math.ceil(SHORTEST_SAMPLE / max(shortest, 1e-9)))
        start, compiled = device.now(), device.num_recompiles()
        look = plan.min_rounds
        while True:
            _add_round(baseline, candidate, device, plan.flush, samples)
            elapsed, recompiles = device.agree(
                [device.now() - start, device.num_recompiles() - compiled]
            )
            samples.num_recompiles = int(recompiles)
            num_rounds = len(samples.rounds)
            if num_rounds >= plan.max_rounds or elapsed >= plan.seconds:
                return
            if num_rounds >= look and elapsed >= plan.min_seconds:
                if decided(samples):
                    return
                look = math.ceil(GROWTH * num_rounds)
                gc.collect()


def _add_round(
    baseline: Step, candidate: Step, device: Device, flush: bool, samples: Samples
) -> None:
    before = device.reference()
    swapped = len(samples.rounds) % 2 == 1
    outer, inner = (candidate, baseline) if swapped else (baseline, candidate)
    if samples.num_calls > 1:
        outer()  # the reference product has emptied the caches, which a short step would notice
    taken = [
        device.seconds(step, samples.num_calls, flush) for step in (outer, inner, inner, outer)
    ]
    if swapped:
        taken = [taken[1], taken[0], taken[3], taken[2]]
    values = device.agree([*taken, before, device.reference()])
    samples.rounds.append((values[0], values[1], values[2], values[3]))
    samples.reference.append((values[4], values[5]))
    samples.readings.append(device.readings())


def warm_up(baseline: Step, candidate: Step, device: Device, plan: Plan, progress: WarmUp) -> float:
    """Call both in turn until the last `WINDOW` rounds are quiet; the shorter step's seconds.

    Quiet: nothing was compiled, the allocator did not grow, and the times of both steps keep their
    level.
    """
    start, compiled, progress.blind = device.now(), device.num_recompiles(), device.forget_held()
    history: list[list[float]] = []
    while True:
        times = [device.seconds(step, 1, False) for step in (baseline, candidate)]
        counts = [device.num_recompiles() - compiled, device.held_bytes(), device.now() - start]
        history.append(device.agree([*times, *counts]))
        progress.num_rounds = len(history)
        progress.num_recompiles, progress.seconds = int(history[-1][2]), history[-1][4]
        quiet = history[-1][4] >= plan.min_warmup and is_quiet(history)
        if quiet or history[-1][4] >= plan.warmup_seconds:
            progress.ended = "evidence" if quiet else "limit"
            last = history[-WINDOW:]
            return min(statistics.median(row[column] for row in last) for column in (0, 1))


def is_quiet(history: list[list[float]]) -> bool:
    """Whether the last `WINDOW` rows (two times, graphs compiled, bytes held) show no change."""
    if len(history) <= WINDOW:
        return False
    last = history[-WINDOW:]
    _, _, compiled, held, *_ = zip(*last, strict=True)
    grown = max(held) - min(held)
    flat = all(level_change([row[column] for row in last]) is None for column in (0, 1))
    return len(set(compiled)) == 1 and grown <= NO_GROWTH and flat


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Python's collector would run in the middle of a sample; here it runs between looks."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
