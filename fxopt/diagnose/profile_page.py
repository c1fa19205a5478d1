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
from fxopt.diagnose.phases import PHASES, Step
from fxopt.diagnose.profiling import Profiled
from fxopt.render import quantity

NUM_NAMED = 3
COLOURS = (
    *("#b35900", "#8250df", "#0a7ea4", "#1a7f37", "#0969da", "#cf222e", "#bf8700", "#a40e72"),
    *("#57606a", "#6e4c13", "#9a3412", "#d0d7de"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: left }
th { border-bottom: 2px solid #888 } .scroll { overflow-x: auto } td + td { text-align: right }
td.name { overflow-wrap: anywhere; text-align: left } .bar { display: flex; height: 1.6rem }
.row { display: grid; grid-template-columns: 9rem 1fr; align-items: center; margin: .2rem 0 }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 .9rem }
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
    lines += ["", "largest avoidable costs"]
    lines += [f"  {i}. {line}" for i, line in enumerate(named(found), start=1)] or ["  none found"]
    return "\n".join([*lines, "", overhead(ranks), *(f"trace: {r.trace}" for r in ranks)])


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
    longest = max(step.seconds for rank in ranks for step in rank.steps)
    items = "".join(f"<li>{markup.escape(line)}</li>" for line in named(found)) or "<li>none found"
    legend = "".join(
        f'<i style="background:{colour}"></i>{name}'
        for name, colour in zip(PHASES, COLOURS, strict=True)
        if walls[name]
    )
    bars = "".join(
        f'<div class="row"><span>rank {rank.rank}, step {index}</span>{_bar(step, longest)}</div>'
        for rank in ranks
        for index, step in enumerate(rank.steps, start=1)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fxopt profile</title><style>{STYLE}</style>"
        f"<h1>A step takes {quantity(seconds, 's')}</h1>"
        f"<p>{markup.escape(overhead(ranks))}</p>"
        f"<h2>Largest avoidable costs</h2><ol>{items}</ol>"
        f'<h2>Steps</h2><p class="legend">{legend}</p>{bars}'
        f"<h2>Phases</h2>{_phases(ranks)}<h2>Kernels by kind</h2>{_kinds(ranks)}"
        f"<h2>Longest kernels and ops</h2>{_top(ranks)}</html>\n"
    )


def _bar(step: Step, longest: float) -> str:
    parts = "".join(
        f'<span title="{name} {quantity(phase.wall, "s")}" '
        f'style="background:{colour};width:{100 * phase.wall / longest:.3f}%"></span>'
        for (name, phase), colour in zip(step.phases.items(), COLOURS, strict=True)
        if phase.wall
    )
    return f'<div class="bar">{parts}</div>'


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
    total: Counter[str] = Counter()
    num_steps = sum(len(rank.steps) for rank in ranks)
    for rank in ranks:
        for step in rank.steps:
            total.update(step.kinds)
    rows = [(kind, quantity(spent / num_steps, "s")) for kind, spent in total.most_common()]
    communication = sum(step.communication for rank in ranks for step in rank.steps)
    if communication:
        hidden = sum(step.overlapped for rank in ranks for step in rank.steps) / communication
        rows.append(("communication behind compute", f"{hidden:.0%}"))
    return _table(("kind", "per step"), rows)


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
