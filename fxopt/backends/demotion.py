"""Demotion: GEMMs whose operands lose too much run in the model's own dtype, until they lose less.

Decided from the counters of telemetry's samples, summed over all ranks: all decide the same. A
sample's sums are read when the next sample begins, long after they were made.

Shapes: P linears.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxopt.errors import NoTelemetry
from fxopt.gemms import GEMMS
from fxopt.kernels.counters import ADDED, FIELDS

# By GEMM: (operand, copy) of what it reads, as `telemetry` numbers them.
READS = (((0, 0), (1, 0)), ((2, 0), (1, 1)), ((2, 1), (0, 1)))
NONZERO, UNDERFLOWED, SATURATED = (
    FIELDS.index(name) for name in ("nonzero", "underflowed", "saturated")
)


@dataclass(frozen=True)
class Hysteresis:
    """When a GEMM is demoted and when it is promoted again.

    demote_above, promote_below: share of an operand's nonzero values that underflow or saturate.
    patience: samples in a row that it takes.
    group: the ranks that decide together; None for all.
    """

    demote_above: float
    promote_below: float
    patience: int
    group: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.promote_below < self.demote_above <= 1:
            bounds = f"demote_above is {self.demote_above}, promote_below {self.promote_below}"
            raise NoTelemetry(bounds, "give shares, 0 <= promote_below < demote_above <= 1")
        if self.patience < 1:
            raise NoTelemetry(f"patience is {self.patience}", "give a number of samples, 1 or more")


class Demotions:
    """Which GEMMs of which linears are demoted now."""

    def __init__(self, rule: Hysteresis, num_linears: int) -> None:
        self.rule = rule
        self.demoted = torch.zeros(num_linears, len(GEMMS), dtype=torch.bool)
        self.streaks = torch.zeros(num_linears, len(GEMMS), dtype=torch.int64)
        self.names: dict[int, set[str]] = {}  # the same by linear, for the host
        self.sample: Tensor | None = None
        self.sums: tuple[Tensor, torch.cuda.Event | None] | None = None

    def add(self, counters: Tensor) -> None:
        """Take up what was counted [P, operand, copy, field] in the sample that is going on."""
        added = counters[..., :ADDED]
        self.sample = added.clone() if self.sample is None else self.sample + added.to(self.sample)

    def end_sample(self) -> None:
        """Decide on the sample before the one that ends here, and sum up this one over ranks."""
        if self.sums is not None:
            sums, event = self.sums
            if event is not None:
                event.synchronize()
            self.decide(shares(sums))
            self.sums = None
        if self.sample is None:
            return
        if dist.is_initialized():
            dist.all_reduce(self.sample, group=self.rule.group)
        event = torch.cuda.Event() if self.sample.is_cuda else None
        self.sums = self.sample.to("cpu", non_blocking=True), event
        if event is not None:
            event.record(torch.cuda.current_stream(self.sample.device))
        self.sample = None

    def decide(self, lost: Tensor) -> None:
        """Count samples in a row by lost [P, GEMM], NaN for what was not measured."""
        below, above = lost < self.rule.promote_below, lost > self.rule.demote_above
        turns = torch.where(self.demoted, below, above)
        streaks = torch.where(turns, self.streaks + 1, 0)
        self.streaks = torch.where(lost.isnan(), self.streaks, streaks)
        turned = self.streaks >= self.rule.patience
        self.demoted ^= turned
        self.streaks.masked_fill_(turned, 0)
        self.names = {}
        for linear, gemm in self.demoted.nonzero().tolist():
            self.names.setdefault(linear, set()).add(GEMMS[gemm])

    def of(self, linears: Iterable[int]) -> set[str]:
        """GEMMs that are demoted for one of these linears, which run them together."""
        return set().union(*(self.names.get(linear, ()) for linear in linears))


def shares(sums: Tensor) -> Tensor:
    """What the worse operand of each GEMM loses [P, GEMM], from counters [P, operand, copy, field].

    Linears on one input share x's counters, which the first of them has.
    """
    lost = (sums[..., UNDERFLOWED] + sums[..., SATURATED]).double() / sums[..., NONZERO]
    found = [torch.stack([lost[:, i, j] for i, j in reads], -1) for reads in READS]
    worse = torch.stack(found, 1).nan_to_num(-1.0).amax(-1)
    return torch.where(worse < 0, torch.nan, worse)
