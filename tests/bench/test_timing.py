"""The comparison of two timings: what it estimates, and that drift does not fool it."""

import random

import pytest

from bench.timing import Comparison, compare


class Machine:
    """A clock that runs slower the longer it runs, and functions that advance it."""

    def __init__(self, drift: float = 0.0, noise: float = 0.0, seed: int = 0) -> None:
        self.now, self.drift, self.noise = 0.0, drift, noise
        self.calls: list[str] = []
        self.random = random.Random(seed)

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            jitter = self.random.lognormvariate(0, self.noise)
            self.now += seconds * (1 + self.drift * len(self.calls)) * jitter

        return run

    def compare(self, before: float, after: float, num_pairs: int) -> Comparison:
        return compare(
            self.work("A", before),
            self.work("B", after),
            num_pairs=num_pairs,
            num_warmup=1,
            clock=self.clock,
        )


def test_runs_are_interleaved_a_b_b_a():
    machine = Machine()
    machine.compare(1, 1, num_pairs=4)
    assert "".join(machine.calls) == "AB" + "ABBAABBA"


def test_the_speedup_is_baseline_over_candidate():
    # Without noise all pairs agree; the tolerance is fp64 rounding through log and exp.
    assert Machine().compare(3, 2, num_pairs=5).speedup == pytest.approx(1.5, rel=1e-12)


def test_a_steady_drift_cancels():
    comparison = Machine(drift=0.01).compare(1, 1, num_pairs=40)
    # Each pair is off by about 1 part in 100, in turn up and down; the median of an even number of
    # pairs averages the two middle ones, where what is left is second order in the drift.
    assert comparison.speedup == pytest.approx(1, abs=1e-3)


def test_an_interval_covers_the_truth_and_shrinks():
    covered = []
    for seed in range(40):
        low, high = Machine(noise=0.1, seed=seed).compare(1, 1, num_pairs=30).interval
        covered.append(low <= 1 <= high)
    # 95% of 40 is 38; fewer than 34 has a probability below 0.1%.
    assert sum(covered) >= 34
    few = Machine(noise=0.1).compare(1, 1, num_pairs=20).interval
    many = Machine(noise=0.1).compare(1, 1, num_pairs=320).interval
    assert many[1] - many[0] < few[1] - few[0]


def test_a_real_difference_is_outside_the_interval():
    low, _ = Machine(noise=0.05).compare(1.2, 1, num_pairs=40).interval
    assert low > 1
