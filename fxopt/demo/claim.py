"""The demo's claim record: each door against eager, from the steps that the demo has just timed."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from fxopt.diagnose import environment, record
from fxopt.diagnose.memory import Memory
from fxopt.diagnose.numerics import Check, Difference, as_check, compare_all
from fxopt.diagnose.protocol import Samples, WarmUp
from fxopt.diagnose.record import Claim, Record
from fxopt.diagnose.verdict import MARGIN, judge
from fxopt.report import Report

if TYPE_CHECKING:
    from fxopt.demo.training import Run, Scale

# Pairs of steps before the first that counts: graphs are captured and compiled, memory is taken.
NUM_WARM_UP = 2


def claim_record(
    runs: Sequence[Run],
    scale: Scale,
    seed: int,
    reports: Mapping[str, Report],
    peaks: Mapping[str, Memory],
    bound: float,
) -> Record:
    """One claim per door; two steps in which the runs took turns, there and back, are a round.

    Args:
        bound: largest relative distance of the losses that passes.
    """
    eager, *others = runs
    configuration = asdict(scale) | {"seed": seed, "margin": MARGIN, "largest_gap": bound}
    claims = [
        claim(run, eager, configuration, reports[run.name], peaks, bound)
        for run in others
        if run.name in reports
    ]
    created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    place = environment.describe(torch.device("cpu"))
    return Record(record.VERSION, created, ("fxopt", "demo"), place, tuple(claims))


def claim(
    run: Run,
    eager: Run,
    configuration: Mapping[str, object],
    report: Report,
    peaks: Mapping[str, Memory],
    bound: float,
) -> Claim:
    """What `run` shows next to `eager`."""
    samples = rounds(run, eager)
    checks = gradients(run, eager), losses(run, eager, bound)
    failures = [failure for check in checks for failure in check.failures]
    timed = bool(samples.rounds or failures)
    return Claim(
        name=run.name,
        baseline="eager",
        candidate=run.name,
        configuration=configuration,
        status="complete" if timed else "interrupted",
        stop=None,
        verdict=judge(samples, failures) if timed else None,
        samples=samples,
        checks=checks,
        memory={"baseline": peaks[eager.name], "candidate": peaks[run.name]},
        manifest=report.to_dict(),
    )


def rounds(run: Run, eager: Run) -> Samples:
    """Pairs of neighbouring steps as rounds A B B A, without those of the warm-up."""
    num_pairs = min(NUM_WARM_UP, len(run.seconds) // 2)
    spent = sum(run.seconds[: 2 * num_pairs]) + sum(eager.seconds[: 2 * num_pairs])
    samples = Samples(WarmUp("limit", 2 * num_pairs, spent))
    for first in range(2 * num_pairs, len(run.seconds) - 1, 2):
        before, after = eager.seconds[first : first + 2], run.seconds[first : first + 2]
        samples.rounds.append((before[0], after[0], after[1], before[1]))
        # Eager's own step stands in for a reference product: the demo times nothing else.
        samples.reference.append((before[0], before[1]))
    return samples


def gradients(run: Run, eager: Run) -> Check:
    """The gradients of the first step, as `fxopt bench` compares those of two steps."""
    found = compare_all(eager.first_gradients, run.first_gradients, None, None)
    return as_check("before", "baseline", found)


def losses(run: Run, eager: Run, bound: float) -> Check:
    """The largest relative distance of two runs' losses at one step, as a check."""
    found, wanted = torch.tensor(run.losses), torch.tensor(eager.losses)
    distances = (found - wanted).abs() / wanted
    largest = float(distances.max())
    bias = float(((found - wanted) / wanted).mean())
    is_finite = bool(distances.isfinite().all())
    difference = Difference(
        "output loss", largest if is_finite else None, bound, None, bias if is_finite else None
    )
    failures = (
        () if difference.severity <= 1 else (f"loss: relative error {largest:.1e}, bound {bound}",)
    )
    return Check("after", "baseline", len(run.losses), 0, failures, (difference,))
