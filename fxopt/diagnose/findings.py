"""What to change first: the largest avoidable costs of a step, each with evidence and a remedy."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxopt.diagnose.compiles import Compile
from fxopt.diagnose.phases import EXPOSED, PHASES, Step
from fxopt.diagnose.profiling import COUNTED, Profiled
from fxopt.render import quantity
from fxopt.report import Declined, Report

# Growth is a leak if at least this share of the steps grow, by at least so much on average; fewer
# steps than these grow by chance.
GROWING_STEPS, LEAST_GROWTH, FEWEST_STEPS = 0.8, 1 << 20, 4
# A rank is a straggler if its own work takes this much longer than the median rank's.
LAG = 0.05
# Below this share of a step a cost is not worth a line.
NEGLIGIBLE = 0.01

REMEDIES = {
    "data wait": "more DataLoader workers, prefetch_factor, or batches made ahead of time",
    "host-to-device": "pinned memory and non_blocking copies on a stream of their own",
    "checkpointing": "checkpoint less often, or torch.distributed.checkpoint.async_save",
    "garbage collection": "gc.freeze() after set-up and gc.collect() at chosen steps",
    "logging": "log less often, and read losses off the device once in many steps",
    "compilation": "keep what that guard looks at equal between steps, or mark it dynamic",
    EXPOSED: "overlap: larger buckets, prefetching all-gathers, or fewer bytes",
}


@dataclass(frozen=True)
class Finding:
    """One avoidable cost.

    Args:
        name: of the phase, or "leak", "straggler", "launch gaps".
        seconds: per step that removing it would save at most; infinite for what ends the run.
        evidence: the figures, in a sentence.
        remedy: what would remove it.
    """

    name: str
    seconds: float
    evidence: str
    remedy: str


def mean_walls(ranks: Sequence[Profiled]) -> dict[str, float]:
    """Seconds per step of each phase, over steps and ranks."""
    found = [step for rank in ranks for step in rank.steps]
    return {name: statistics.fmean(step.phases[name].wall for step in found) for name in PHASES}


def findings(ranks: Sequence[Profiled], report: Report | None = None) -> list[Finding]:
    """Avoidable costs, largest first.

    Args:
        report: fxopt's report on the model, if there is one.
    """
    walls = mean_walls(ranks)
    seconds = sum(walls.values())
    found = [*_leaks(ranks), *_stragglers(ranks)]
    # Ranks that wait for a slow one wait in communication: that is its cost, not the network's.
    waited = sum(f.seconds for f in found if f.name == "straggler")
    walls[EXPOSED] = max(0.0, walls[EXPOSED] - waited)
    for name, remedy in REMEDIES.items():
        if walls[name] > NEGLIGIBLE * seconds:
            evidence = f"{name}: {walls[name] / seconds:.0%} of the step{_detail(name, ranks)}"
            found.append(Finding(name, walls[name], evidence, remedy))
    found += _launch_gaps(ranks, seconds)
    found += _allocator(ranks, seconds)
    found += _glue(ranks, report)
    return sorted(found, key=lambda finding: -finding.seconds)


def _detail(name: str, ranks: Sequence[Profiled]) -> str:
    found = [step.phases[name].wall for rank in ranks for step in rank.steps]
    detail = f", at most {quantity(max(found), 's')} in one of {len(found)} steps"
    compiles = [compile for rank in ranks for compile in rank.compiles]
    if name == "compilation" and compiles:
        (function, reason), times = most_compiled(compiles)
        guard = f"its guard failed: {reason}" if reason else "for the first time"
        detail += f"; {len(compiles)} compilations, {times} of them of {function}, {guard}"
    return detail


def most_compiled(compiles: Sequence[Compile]) -> tuple[tuple[str, str], int]:
    """The function compiled most often with the last guard that failed, and how often."""
    times = Counter(compile.function for compile in compiles)
    function, count = times.most_common(1)[0]
    reason = next(c.reason for c in reversed(compiles) if c.function == function)
    return (function, reason), count


def _leaks(ranks: Sequence[Profiled]) -> Iterator[Finding]:
    for rank in ranks:
        growth = np.diff(np.asarray(rank.held_bytes, dtype=float))
        if len(growth) < FEWEST_STEPS or np.mean(growth > 0) < GROWING_STEPS:
            continue
        per_step = float(np.median(growth))
        # A graph compiled in every step stays in memory: that is the cost of compilation.
        always_compiles = len(rank.compiles) >= len(growth)
        if per_step >= LEAST_GROWTH and not always_compiles:
            evidence = (
                f"memory of rank {rank.rank} grows by {quantity(per_step, 'B')} per step, in "
                f"{np.mean(growth > 0):.0%} of {len(growth)} steps"
            )
            remedy = (
                "look for tensors that outlive their step: losses kept with their graph, lists of "
                "outputs (loss.item() or loss.detach() instead)"
            )
            yield Finding("leak", math.inf, evidence, remedy)
            return


def _stragglers(ranks: Sequence[Profiled]) -> Iterator[Finding]:
    if len(ranks) < 2:
        return
    own = {rank.rank: own_seconds(rank) for rank in ranks}
    slowest = max(own, key=own.__getitem__)
    others = [seconds for rank, seconds in own.items() if rank != slowest]
    lag = own[slowest] - statistics.median(others)
    if lag < LAG * statistics.median(others):
        return
    spread = spreads(ranks)
    phase = max((p for p in PHASES if p != EXPOSED), key=lambda name: spread[name][0])
    yield Finding(
        "straggler",
        lag,
        f"rank {slowest} needs {quantity(lag, 's')} more of its own work per step than the median "
        f"of the others, most of it in {phase}; they wait for it in communication",
        f"look at rank {slowest}: its machine (clocks, other processes) and its share of the data",
    )


def own_seconds(rank: Profiled) -> float:
    """Median seconds per step that are not exposed communication."""
    return statistics.median(step.seconds - step.phases[EXPOSED].wall for step in rank.steps)


def spreads(ranks: Sequence[Profiled]) -> dict[str, tuple[float, int]]:
    """By phase: maximum minus median over the ranks of the mean seconds, and the maximum's rank."""
    found = {}
    for name in PHASES:
        means = {r.rank: statistics.fmean(s.phases[name].wall for s in r.steps) for r in ranks}
        slowest = max(means, key=means.__getitem__)
        found[name] = (means[slowest] - statistics.median(means.values()), slowest)
    return found


def _launch_gaps(ranks: Sequence[Profiled], seconds: float) -> Iterator[Finding]:
    steps = [step for rank in ranks for step in rank.steps]
    working = ("forward", "backward", "optimizer")
    idle = statistics.fmean(sum(step.phases[name].idle for name in working) for step in steps)
    if idle > NEGLIGIBLE * seconds:
        longest = max((gap for step in steps for gap in step.gaps), default=0.0)
        evidence = (
            f"the device is idle for {idle / seconds:.0%} of the step while the host is in "
            f"forward, backward or optimizer; longest gap {quantity(longest, 's')}"
        )
        yield Finding("launch gaps", idle, evidence, "torch.compile, or CUDA graphs")


def _allocator(ranks: Sequence[Profiled], seconds: float) -> Iterator[Finding]:
    spent = statistics.fmean(step.allocating for rank in ranks for step in rank.steps)
    if spent > NEGLIGIBLE * seconds:
        counts = {k: statistics.fmean(r.allocator.get(k, 0) for r in ranks) for k in COUNTED}
        listed = ", ".join(f"{name} {count:g}" for name, count in counts.items() if count)
        evidence = (
            f"the host spends {spent / seconds:.0%} of the step in cudaMalloc and cudaFree, which "
            f"wait for the device; per step without the profiler: {listed or 'none of either'}"
        )
        remedy = (
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, equal shapes, or less memory in use"
        )
        yield Finding("allocator", spent, evidence, remedy)


def _glue(ranks: Sequence[Profiled], report: Report | None) -> Iterator[Finding]:
    """What fxopt's report says about kernels that only move memory."""
    if report is None:
        return
    steps = [step for rank in ranks for step in rank.steps]
    glue = statistics.fmean(step.kinds.get("glue", 0.0) for step in steps)
    mean = statistics.fmean(step.seconds for step in steps)
    before = report.totals.get("glue_bytes_before", 0)
    saved = 1 - report.totals.get("glue_bytes_after", 0) / before if before else 0.0
    for blocks, entries in _declined(report).items():
        own, num_kernels = _glue_within(steps, blocks)
        measured = (
            f"glue in the forward of these blocks: {own / mean:.0%} of the step, {num_kernels:.0f} "
            "kernels or ops per block; "
            if own
            else f"glue: {glue / mean:.0%} of the step; "
        )
        rules = list(dict.fromkeys(entry.rule for entry in entries))
        reasons = dict.fromkeys(reason for entry in entries for reason in entry.reasons[:1])
        remedies = dict.fromkeys(entry.remedy for entry in entries if entry.remedy)
        where = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
        evidence = (
            f"{measured}rule{'s' * (len(rules) > 1)} {', '.join(rules)} declined at {len(blocks)} "
            f"blocks ({where}): {'; '.join(reasons)}"
        )
        yield Finding("declined", own, evidence, "; ".join(remedies) or "see fxopt.report(model)")
    if saved > 0 and not report.applied:
        yield Finding(
            "glue",
            saved * glue,
            f"glue: {glue / mean:.0%} of the step; fxopt would leave {1 - saved:.0%} of its bytes",
            "fxopt.optimize(model)",
        )


def _glue_within(steps: Sequence[Step], blocks: Sequence[str]) -> tuple[float, float]:
    """Seconds of glue per step in the forward of these blocks, and kernels per block."""
    found = [
        spent
        for step in steps
        for part, spent in step.glue.items()
        if any(f"{block}.".startswith(f"{part}.") for block in blocks)
    ]
    if not found:
        return 0.0, 0.0
    return sum(s for s, _ in found) / len(steps), statistics.fmean(number for _, number in found)


def _declined(report: Report) -> dict[tuple[str, ...], list[Declined]]:
    """What was declined, together where it was at the same blocks: they have one cost."""
    where: dict[tuple[str, tuple[str, ...]], dict[str, Declined]] = {}
    for entry in report.declined:
        where.setdefault((entry.rule, entry.reasons), {})[entry.fqn] = entry
    found: dict[tuple[str, ...], list[Declined]] = {}
    for blocks in where.values():
        found.setdefault(tuple(blocks), []).append(next(iter(blocks.values())))
    return found
