"""A report as plain text and as one self-contained page; both aggregate by block class."""

from __future__ import annotations

import html as markup
import importlib.resources
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from string import Template
from typing import TypeVar

from fxopt.cost import BlockCost, Cost, Fp8BreakEven
from fxopt.hardware import TARGETS
from fxopt.kernels import cpp
from fxopt.report import Applied, Attention, Declined, Report

COST_COLUMNS = ("", "GEMM", "attention", "glue", "total", "glue bytes", "launches", "saved")
APPLIED_COLUMNS = ("rule", "times", "blocks", "provider", "tier", "source", "glue saved")
LEGEND = "".join(f'<i class="{kind}"></i>{kind}' for kind in ("gemm", "attention", "glue"))

Entry = TypeVar("Entry", Applied, Declined)


@dataclass(frozen=True)
class Group:
    """What happened in the blocks of one class; entries that differ only by block are one."""

    name: str
    applied: tuple[tuple[Applied, int], ...]
    declined: tuple[tuple[Declined, int], ...]
    cost: BlockCost | None
    attentions: tuple[str, ...] = ()


def groups(report: Report) -> list[Group]:
    """The report by block class; each entry with the number of blocks that it stands for."""
    costs = {block.block_class: block for block in report.blocks}
    found = []
    for name in report.block_classes():
        cost = costs.get(name)
        # A plan looks at one block of each class.
        each = cost.count if cost else 1
        applied = _aggregate((a for a in report.applied if a.block_class == name), each, _add)
        declined = _aggregate(
            (d for d in report.declined if d.block_class == name), each, lambda d, _: d
        )
        attentions = dict.fromkeys(_choice(a) for a in report.attentions if a.block_class == name)
        found.append(Group(name or "model", applied, declined, cost, tuple(attentions)))
    return found


def _choice(attention: Attention) -> str:
    whose = "PyTorch's own choice" if attention.backend == "pytorch" else attention.backend
    return f"attention: {whose}; {attention.why}"


def _add(total: Applied, other: Applied) -> Applied:
    return replace(
        total,
        count=total.count + other.count,
        bytes_saved=_sum(total.bytes_saved, other.bytes_saved),
        flops=_sum(total.flops, other.flops),
    )


def _sum(a: int | None, b: int | None) -> int | None:
    """What is not known of one is not known of both."""
    return None if a is None or b is None else a + b


def _aggregate(
    entries: Iterable[Entry], each: int, combine: Callable[[Entry, Entry], Entry]
) -> tuple[tuple[Entry, int], ...]:
    merged: dict[tuple, tuple[Entry, set[str]]] = {}
    for entry in entries:
        key: tuple
        if isinstance(entry, Applied):
            key = (entry.rule, entry.provider, entry.tier, entry.source)
        else:
            key = (entry.rule, entry.source, entry.reasons, entry.remedy)
        if key in merged:
            previous, fqns = merged[key]
            merged[key] = (combine(previous, entry), fqns | {entry.fqn})
        else:
            merged[key] = (entry, {entry.fqn})
    return tuple((entry, each * len(fqns)) for entry, fqns in merged.values())


def quantity(value: float, unit: str) -> str:
    """`value` with three digits and a decimal prefix: quantity(5.99e9, "B") is "5.99 GB"."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value / 1e-6:.3g} µ{unit}" if value else "0"


def brief(source: str) -> str:
    """`source` from its package on, where it is installed in one; else its last two names."""
    _, installed, rest = source.rpartition("site-packages/")
    return rest if installed else "/".join(source.split("/")[-2:])


def cost_rows(block: BlockCost) -> list[tuple[str, ...]]:
    """One row before and one after, in `COST_COLUMNS`."""

    def row(label: str, cost: Cost) -> tuple[str, ...]:
        times = (cost.gemm_s, cost.attention_s, cost.glue_s, cost.total_s)
        return (
            label,
            *(quantity(t, "s") for t in times),
            quantity(cost.glue_bytes, "B"),
            str(cost.num_launches),
            quantity(cost.saved_bytes, "B"),
        )

    return [row("before", block.before), row("after", block.after)]


def applied_rows(group: Group) -> list[tuple[str, ...]]:
    """One row per rule and source line, in `APPLIED_COLUMNS`."""
    return [
        (
            a.rule,
            str(a.count),
            str(num_blocks),
            a.provider,
            a.tier,
            brief(a.source),
            "" if a.bytes_saved is None else quantity(a.bytes_saved, "B"),
        )
        for a, num_blocks in group.applied
    ]


def summary(report: Report) -> str:
    """The outcome in one sentence."""
    counts = report.counts()
    if not counts and any(a.backend != "pytorch" for a in report.attentions):
        return "No rule matched: who runs the attentions is all that is new."
    if not counts:
        return "No rule matched: the model runs as it was."
    listing = ", ".join(f"{rule} {count}" for rule, count in counts.items())
    verb = "would be made" if report.blocks else "made"
    return f"{sum(counts.values())} substitutions {verb}: {listing}."


def totals_lines(report: Report) -> list[str]:
    """What was counted for the whole model, before and after."""
    lines = []
    if report.saved != "model":
        lines.append(f"activations that fused ops alone keep: {report.saved}")
    for key, label in (
        ("glue_bytes", "glue traffic"),
        ("saved_activation_bytes", "kept for backward"),
    ):
        before, after = report.totals.get(f"{key}_before", 0), report.totals.get(f"{key}_after", 0)
        if before:
            share = f"{after / before:.2f}x"
            lines.append(f"{label}: {quantity(before, 'B')} -> {quantity(after, 'B')} ({share})")
    if report.blocks:
        slow = sum(b.count * b.before.total_s for b in report.blocks)
        fast = sum(b.count * b.after.total_s for b in report.blocks)
        share = f"{fast / slow:.2f}x" if slow else "nothing to do"
        lines.append(
            f"all blocks by roofline: {quantity(slow, 's')} -> {quantity(fast, 's')} ({share})"
        )
    return lines


def assumptions(report: Report) -> str:
    """What the times rest on, or what a report without times leaves open; "" if nothing."""
    if not report.blocks and any(a.provider == "native" for a in report.applied):
        reason = cpp.why_not()
        around = "loops in C++, in fp32, or ATen" if reason is None else f"ATen ({reason})"
        return (
            f"On this device the fused ops are Python around {around}. They keep less for "
            "backward, but a small step may take longer than PyTorch's own: time yours with `fxopt "
            "bench`."
        )
    if not report.blocks or report.target not in TARGETS:
        return ""
    target = TARGETS[report.target]
    share = target.achievable
    return (
        "Times are roofline estimates for forward + backward of one block: nothing overlaps, host "
        f"time is not counted, no device was run. {target.name}: {quantity(target.bf16, 'FLOP/s')} "
        f"in BF16, of which {share.gemm:.0%} is assumed for GEMM and {share.attention:.0%} for "
        f"attention; {quantity(target.bandwidth, 'B/s')}, of which {share.bandwidth:.0%} is "
        f"assumed. Peaks: {target.source}"
    )


def fp8_lines(block: BlockCost) -> list[str]:
    """The verdict on each distinct weight, in words."""
    weights: dict[tuple[int, int], list[Fp8BreakEven]] = {}
    for entry in block.fp8:
        weights.setdefault((entry.in_features, entry.out_features), []).append(entry)
    lines = []
    for (inputs, outputs), entries in weights.items():
        bound = entries[0].from_tokens
        if bound is None:
            lines.append(f"linear {inputs} -> {outputs}: FP8 never pays")
            continue
        verdicts = [
            f"{'pays' if e.num_tokens >= bound else 'does not pay'} at its {e.num_tokens:,}"
            for e in entries
        ]
        verdict = ", ".join(verdicts)
        lines.append(f"linear {inputs} -> {outputs}: FP8 pays from {bound:,} tokens; {verdict}")
    return lines


def text(report: Report) -> str:
    """Plain text, at most a screen per block class."""
    lines = [f"fxopt {report.door} · recipe {report.recipe} · target {report.target}"]
    lines += [summary(report), *totals_lines(report)]
    for group in groups(report):
        lines += ["", group.name + (f" x{group.cost.count}" if group.cost else "")]
        if group.cost:
            lines += _table(COST_COLUMNS, cost_rows(group.cost))
        if group.applied:
            lines += ["  applied", *_table(APPLIED_COLUMNS, applied_rows(group))]
        lines += [f"  {line}" for line in group.attentions]
        for declined, num_blocks in group.declined:
            where = f"{brief(declined.source)}, node {declined.node}, {num_blocks} block(s)"
            lines.append(f"  declined {declined.rule} at {where}")
            lines += [f"    - {reason}" for reason in declined.reasons]
            lines += [f"    remedy: {declined.remedy}"] if declined.remedy else []
        if group.cost:
            lines += [f"  {line}" for line in fp8_lines(group.cost)]
    if note := assumptions(report):
        lines += ["", *textwrap.wrap(note, 100)]
    return "\n".join(lines)


def _filled(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Header and rows without the columns that are empty in every row."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [tuple(row[i] for i in kept) for row in (columns, *rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = _filled(columns, rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "    "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def html(report: Report) -> str:
    """One page without scripts, fonts or images from elsewhere; tables scroll on a phone."""
    template = Template(importlib.resources.files("fxopt").joinpath("report.html").read_text())
    sections = "\n".join(_section(group) for group in groups(report))
    return template.substitute(
        title=markup.escape(f"fxopt {report.door}: {report.recipe} on {report.target}"),
        summary=markup.escape(summary(report)),
        totals="".join(f"<li>{markup.escape(line)}</li>" for line in totals_lines(report)),
        legend=f'<p class="legend">{LEGEND}</p>' if report.blocks else "",
        sections=sections,
        note=markup.escape(assumptions(report)),
    )


def _section(group: Group) -> str:
    name = markup.escape(group.name) + (f" &times;{group.cost.count}" if group.cost else "")
    parts = [f"<section><h2>{name}</h2>"]
    if group.cost:
        parts += [_bars(group.cost), _html_table(COST_COLUMNS, cost_rows(group.cost))]
    if group.applied:
        parts += ["<h3>Applied</h3>", _html_table(APPLIED_COLUMNS, applied_rows(group))]
    parts += [f"<p>{markup.escape(line)}</p>" for line in group.attentions]
    if group.declined:
        parts += ["<h3>Declined</h3>", *(_declined(d, n) for d, n in group.declined)]
    if group.cost and group.cost.fp8:
        items = "".join(f"<li>{markup.escape(line)}</li>" for line in fp8_lines(group.cost))
        parts.append(f"<h3>FP8</h3><ul>{items}</ul>")
    return "".join([*parts, "</section>"])


def _bars(block: BlockCost) -> str:
    longest = max(block.before.total_s, block.after.total_s) or 1.0
    rows = []
    for label, cost in (("before", block.before), ("after", block.after)):
        shares = (("gemm", cost.gemm_s), ("attention", cost.attention_s), ("glue", cost.glue_s))
        bars = "".join(
            f'<i class="{kind}" style="width:{100 * seconds / longest:.2f}%"></i>'
            for kind, seconds in shares
        )
        total = quantity(cost.total_s, "s")
        rows.append(f'<div class="bar"><span>{label} {total}</span><b>{bars}</b></div>')
    return "".join(rows)


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header, *filled = _filled(columns, rows)
    head = "".join(f"<th>{markup.escape(c)}</th>" for c in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{markup.escape(c)}</td>" for c in row) + "</tr>" for row in filled
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _declined(entry: Declined, num_blocks: int) -> str:
    reasons = "".join(f"<li>{markup.escape(reason)}</li>" for reason in entry.reasons)
    remedy = f"<p>Remedy: {markup.escape(entry.remedy)}</p>" if entry.remedy else ""
    where = markup.escape(f"{brief(entry.source)}, node {entry.node}, {num_blocks} block(s)")
    head = f"<summary>{markup.escape(entry.rule)} <small>{where}</small></summary>"
    return f"<details open>{head}<ul>{reasons}</ul>{remedy}</details>"
