"""Machines with a clock of their own: lasting noise, spikes, throttling; no real time passes."""

from __future__ import annotations

import math
import random

from fxopt.diagnose.protocol import Plan, Samples, measure
from fxopt.diagnose.verdict import Verdict, is_decided, judge

PLAN = Plan()


class Machine:
    """A synthetic device whose speed wanders.

    Args:
        white: standard deviation of noise that is drawn anew for each call.
        lasting: standard deviation of autocorrelated noise, an AR(1) process in time.
        memory: seconds after which lasting noise has decayed to 1 / e.
        spikes: share of calls that take half as long again.
        throttling: seconds between changes of the clock, on average; 0 for none. A throttled clock
            takes 15% longer.
        drift: relative slow-down per second.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        white: float = 0.0,
        lasting: float = 0.0,
        memory: float = 1.0,
        spikes: float = 0.0,
        throttling: float = 0.0,
        drift: float = 0.0,
    ) -> None:
        self.random = random.Random(seed)
        self.white, self.lasting, self.memory, self.spikes = white, lasting, memory, spikes
        self.throttling, self.drift = throttling, drift
        self.clock, self.level, self.throttled = 0.0, self.random.gauss(0, lasting), False
        self.compiled, self.held = 0, 0
        self.calls: list[str] = []

    def spend(self, seconds: float) -> float:
        decay = math.exp(-seconds / self.memory)
        self.level = decay * self.level + self.random.gauss(
            0, self.lasting * math.sqrt(1 - decay * decay)
        )
        if self.throttling and self.random.random() < seconds / self.throttling:
            self.throttled = not self.throttled
        taken = seconds * math.exp(self.level + self.random.gauss(0, self.white))
        taken *= (1.15 if self.throttled else 1) * (1 + self.drift * self.clock)
        taken *= 1.5 if self.random.random() < self.spikes else 1
        self.clock += taken
        return taken

    def step(self, name: str, seconds: float):
        def call() -> None:
            self.calls.append(name)
            self.spend(seconds)

        return call

    def now(self) -> float:
        return self.clock

    def seconds(self, step, num_calls: int, flush: bool) -> float:
        start = self.clock
        for _ in range(num_calls):
            step()
        return (self.clock - start) / num_calls

    def reference(self) -> float:
        return self.spend(0.002)

    def readings(self) -> dict[str, float]:
        return {}

    def num_recompiles(self) -> int:
        return self.compiled

    def held_bytes(self) -> int:
        return self.held

    def forget_held(self) -> str:
        return ""

    def agree(self, values: list[float]) -> list[float]:
        return values


def compare(machine: Machine, before: float, after: float, plan: Plan = PLAN) -> Samples:
    """Samples of two steps that last `before` and `after` seconds."""
    samples = Samples()
    steps = machine.step("A", before), machine.step("B", after)
    measure(*steps, machine, plan, samples, is_decided)
    return samples


def verdict(machine: Machine, before: float, after: float, plan: Plan = PLAN) -> Verdict:
    return judge(compare(machine, before, after, plan))
