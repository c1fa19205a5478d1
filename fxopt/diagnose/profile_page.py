"""A profile as text, JSON and one self-contained page."""

from __future__ import annotations

import dataclasses
import html as markup
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fxopt.diagnose.findings import Finding, mean_walls, spreads
from fxopt.diagnose.holding import Peak
from fxopt.diagnose.phases import PHASES
from fxopt.diagnose.profile_timeline import STYLE as TIMELINE_STYLE
from fxopt.diagnose.profile_timeline import timeline
from fxopt.diagnose.profiling import Profiled
from fxopt.render import quantity

NUM_NAMED = 3
NUM_COMPILES = 15
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: left }
th { border-bottom: 2px solid #888 } .scroll { overflow-x: auto } td + td { text-align: right }
td { white-space: nowrap }
td.name { overflow-wrap: anywhere; text-align: left; white-space: normal; min-width: 8rem }
li { margin: .5rem 0 }
"""


def summary(ranks: Sequence[Profiled], found: Sequence[Finding]) -> dict[str, Any]:
    """Everything as plain data."""
    walls = mean_walls(ranks)
    seconds = sum(walls.values())
    return {
        "version": "fxopt.profile/1",
        "step_s": seconds,
        "phases_s": walls,
        "phases_share": {name: wall / seconds for name, wall in walls.items()},
        "spread_s": {
            name: {"maximum_minus_median": spread, "rank": rank}
            for name, (spread, rank) in spreads(ranks).items()
        },
        "findings": [
            dataclasses.asdict(f) | {"seconds": f.seconds if math.isfinite(f.seconds) else None}
            for f in found
        ],
        "overhead": {rank.rank: rank.profiled_s / rank.plain_s - 1 for rank in ranks},
        "ranks": [dataclasses.asdict(rank) for rank in ranks],
    }


def to_json(ranks: Sequence[Profiled], found: Sequence[Finding]) -> str:
    """The summary as JSON."""
    return json.dumps(summary(ranks, found), indent=1, allow_nan=False) + "\n"


def text(ranks: Sequence[Profiled], found: Sequence[Finding]) -> str:
    """For a terminal."""
    walls = mean_walls(ranks)
    seconds = sum(walls.values())
    lines = [f"step: {quantity(seconds, 's')}, mean of {len(ranks[0].steps)} steps, "
             f"{len(ranks)} rank(s)"]  # fmt: skip
    for name, wall in walls.items():
        if wall:
            bar = "#" * round(40 * wall / seconds)
            lines.append(f"  {name:22} {wall / seconds:6.1%}  {quantity(wall, 's'):>8}  {bar}")
    lines += _memory_lines(ranks)
    lines += ["", "largest avoidable costs"]
    lines += [f"  {i}. {line}" for i, line in enumerate(named(found), start=1)] or ["  none found"]
    return "\n".join([*lines, "", overhead(ranks), *(f"trace: {r.trace}" for r in ranks)])


def _memory_lines(ranks: Sequence[Profiled]) -> list[str]:
    largest = largest_peak(ranks)
    if largest is None:
        return []
    rank, peak = largest
    held = [f"{quantity(size, 'B')} {name} ({phase})" for phase, name, size in peak.owners[:3]]
    return ["", memory_peak(rank, peak), f"  held by {', '.join(held)}"]


def largest_peak(ranks: Sequence[Profiled]) -> tuple[int, Peak] | None:
    """The rank whose memory grows the most within a step, and how."""
    peaks = [(rank.rank, rank.peak) for rank in ranks if rank.peak is not None]
    return max(peaks, key=lambda found: found[1].num_bytes, default=None)


def memory_peak(rank: int, peak: Peak) -> str:
    """A peak in a sentence."""
    pool = f", of {quantity(peak.reserved, 'B')} reserved" if peak.reserved else ""
    return (
        f"memory: at most {quantity(peak.num_bytes, 'B')} more than at the start of the step{pool} "
        f"(rank {rank}, {peak.at:.0%} into the step, in {peak.phase}); "
        f"{peak.num_allocations} allocations"
    )


def named(found: Sequence[Finding]) -> list[str]:
    """The first findings, each with what would remove it."""
    return [f"{f.evidence}. Remedy: {f.remedy}" for f in found[:NUM_NAMED]]


def overhead(ranks: Sequence[Profiled]) -> str:
    """What the profiler itself cost, measured against steps without it."""
    worst = max(ranks, key=lambda rank: rank.profiled_s / rank.plain_s)
    return (
        f"the profiler made a step {worst.profiled_s / worst.plain_s - 1:+.0%} longer on rank "
        f"{worst.rank} ({quantity(worst.plain_s, 's')} -> {quantity(worst.profiled_s, 's')}); "
        "figures include that"
    )


def html(ranks: Sequence[Profiled], found: Sequence[Finding]) -> str:
    """One page without scripts or anything from elsewhere."""
    walls = mean_walls(ranks)
    seconds = sum(walls.values())
    items = "".join(f"<li>{markup.escape(line)}</li>" for line in named(found)) or "<li>none found"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fxopt profile</title><style>{STYLE}{TIMELINE_STYLE}</style>"
        f"<h1>A step takes {quantity(seconds, 's')}</h1>"
        f"<p>{markup.escape(overhead(ranks))}</p>"
        f"<h2>Largest avoidable costs</h2><ol>{items}</ol>"
        f"<h2>Timeline</h2>{timeline(ranks)}"
        f"<h2>Phases</h2>{_phases(ranks)}<h2>Kernels by kind and phase</h2>{_kinds(ranks)}"
        f"<h2>Longest kernels and ops</h2>{_top(ranks)}{_memory(ranks)}{_compiles(ranks)}</html>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(
        f'<tr><td class="name">{markup.escape(row[0])}</td>'
        + "".join(f"<td>{markup.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _phases(ranks: Sequence[Profiled]) -> str:
    steps = [step for rank in ranks for step in rank.steps]
    seconds, spread = statistics.fmean(step.seconds for step in steps), spreads(ranks)
    rows = []
    for name in PHASES:
        wall, host, device, idle = (
            statistics.fmean(getattr(step.phases[name], part) for step in steps)
            for part in ("wall", "host", "device", "idle")
        )
        if wall or host or device:
            times = [quantity(t, "s") for t in (wall, host, device, idle)]
            lag, rank = spread[name]
            slowest = f"{quantity(lag, 's')} (rank {rank})" if len(ranks) > 1 else ""
            rows.append((name, f"{wall / seconds:.1%}", *times, slowest))
    columns = ("phase", "share", "of the step", "host", "device", "device idle", "max - median")
    return _table(columns, rows)


def _kinds(ranks: Sequence[Profiled]) -> str:
    steps = [step for rank in ranks for step in rank.steps]
    spent: Counter[tuple[str, str]] = Counter()
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.kinds)
        for name, phase in step.phases.items():
            spent.update({(kind, name): seconds for kind, seconds in phase.kinds.items()})
    phases = [name for name in PHASES if any(found == name for _, found in spent)]

    def cell(seconds: float) -> str:
        return quantity(seconds / len(steps), "s") if seconds else ""

    rows = [
        (kind, cell(seconds), *(cell(spent[kind, name]) for name in phases))
        for kind, seconds in total.most_common()
    ]
    communication = sum(step.communication for step in steps)
    if communication:
        hidden = sum(step.overlapped for step in steps) / communication
        rows.append(("communication behind compute", f"{hidden:.0%}", *("" for _ in phases)))
    return _table(("kind", "per step", *phases), rows)


def _memory(ranks: Sequence[Profiled]) -> str:
    largest = largest_peak(ranks)
    if largest is None:
        return ""
    rank, peak = largest
    rows = [(name, phase, quantity(size, "B")) for phase, name, size in peak.owners]
    table = _table(("taken in this step by", "in", "held at the peak"), rows)
    return f"<h2>Memory</h2><p>{markup.escape(memory_peak(rank, peak))}</p>{table}"


def _compiles(ranks: Sequence[Profiled]) -> str:
    found = [compile for rank in ranks for compile in rank.compiles]
    if not found:
        return ""
    times = Counter((compile.function, compile.reason) for compile in found)
    rows = [
        (function, reason or "first time", str(count))
        for (function, reason), count in times.most_common(NUM_COMPILES)
    ]
    return f"<h2>Compilations</h2>{_table(('function', 'guard that failed', 'times'), rows)}"


def _top(ranks: Sequence[Profiled]) -> str:
    spent: dict[str, float] = {}
    calls: Counter[str] = Counter()
    num_steps = sum(len(rank.steps) for rank in ranks)
    for rank in ranks:
        for step in rank.steps:
            for name, seconds, count in step.top:
                spent[name] = spent.get(name, 0.0) + seconds
                calls[name] += count
    rows = [
        (name, quantity(seconds / num_steps, "s"), f"{calls[name] / num_steps:.1f}")
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1])[:15]
    ]
    return _table(("name", "per step", "calls"), rows)
