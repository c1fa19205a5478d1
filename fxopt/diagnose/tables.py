"""A record as text, Markdown and one self-contained page."""

from __future__ import annotations

import html as markup
from collections.abc import Sequence

from fxopt.diagnose.record import Claim, Record
from fxopt.diagnose.verdict import Regime
from fxopt.render import quantity

COLUMNS = ("case", "verdict", "speedup", "95% interval", "baseline", "candidate", "numerics",
           "peak memory", "saved")  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .3rem .7rem; text-align: left }
th { border-bottom: 2px solid #888 } tr + tr td { border-top: 1px solid #ddd }
.scroll { overflow-x: auto } code { overflow-wrap: anywhere } svg { max-width: 100%; height: auto }
.FAST { color: #116329 } .SLOW, .INVALID { color: #a40e26 } .INCONCLUSIVE { color: #7d4e00 }
"""


def rows(record: Record) -> list[tuple[str, ...]]:
    """One row per claim, in `COLUMNS`."""
    return [_row(claim) for claim in record.claims]


def _row(claim: Claim) -> tuple[str, ...]:
    memory = [claim.memory.get(side) for side in ("baseline", "candidate")]
    peaks = [m.peak if m else None for m in memory]
    saved = [m.saved if m else None for m in memory]
    timed = claim.verdict.steady if claim.verdict else None
    if timed is None:
        times = ("", "", "", "")
    else:
        times = (
            f"{timed.speedup:.3f}x",
            f"{timed.low:.3f} to {timed.high:.3f}",
            quantity(timed.baseline_s, "s"),
            quantity(timed.candidate_s, "s"),
        )
    return (claim.name, headline(claim), *times, numerics(claim), _change(*peaks), _change(*saved))


def headline(claim: Claim) -> str:
    """The verdict, or how far the measurement came."""
    found = str(claim.verdict.label) if claim.verdict else "no verdict"
    return found if claim.status == "complete" else f"{found} ({claim.status})"


def numerics(claim: Claim) -> str:
    """Whether the checks passed, and against what."""
    if not claim.checks:
        return "not checked"
    failures = sum(len(check.failures) for check in claim.checks)
    if failures:
        return f"{failures} tensors differ"
    num_outputs, num_gradients = (
        max(getattr(check, number) for check in claim.checks)
        for number in ("num_outputs", "num_gradients")
    )
    against = claim.checks[-1].against
    return f"pass against {against}: {num_outputs} outputs, {num_gradients} gradients"


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    share = f" ({after / before:.2f}x)" if before else ""
    return f"{quantity(before, 'B')} -> {quantity(after, 'B')}{share}"


def details(claim: Claim) -> list[str]:
    """What a row leaves out."""
    lines = []
    if claim.stop:
        stop = claim.stop
        lines.append(f"stopped while {stop.phase}: {stop.error} at {stop.where}")
    if claim.verdict:
        lines += claim.verdict.reasons
        lines += _regimes(claim.verdict.burst, claim.verdict.steady)
    warmup = claim.samples.warmup
    if warmup.ended:
        lines.append(
            f"warm-up: {warmup.num_rounds} calls of each in {warmup.seconds:.1f} s, ended on "
            f"{warmup.ended}, {warmup.num_recompiles} graphs compiled"
            + (f"; {warmup.blind}" if warmup.blind else "")
        )
    if claim.checks and not any(check.num_gradients for check in claim.checks):
        lines.append("only outputs were compared, no gradients")
    for check in claim.checks:
        for difference in check.worst[:1]:
            error = "not finite" if difference.error is None else f"{difference.error:.2e}"
            lines.append(
                f"{check.when} timing, nearest to its bound: {difference.name}, error {error}, "
                f"bound {difference.bound:.2e}, bias {difference.bias or 0:+.1e}"
            )
    return lines + _speed(claim)


def _regimes(burst: Regime | None, steady: Regime | None) -> list[str]:
    if burst is None or steady is None:
        return []
    return [
        f"burst: {burst.speedup:.3f}x [{burst.low:.3f}, {burst.high:.3f}] over "
        f"{burst.num_rounds} rounds, before the machine slowed down by "
        f"{steady.reference_s / burst.reference_s - 1:.0%}"
    ]


def _speed(claim: Claim) -> list[str]:
    speed = claim.speed
    if speed is None or not speed.utilization:
        return []
    lines = []
    for side, counts in speed.flops.items():
        for dtype, count in counts.items():
            line = f"{side}, {dtype}: {quantity(count, 'FLOP')} per call"
            if dtype in speed.utilization[side]:
                peak = quantity(speed.peak_flops[dtype], "FLOP/s")
                line += f", {speed.utilization[side][dtype]:.1%} of the {peak} measured here"
            lines.append(line)
    lines += [
        f"{dtype}: {quantity(count, 'FLOP')} per call in frozen modules, not in the above"
        for dtype, count in speed.frozen_flops.items()
    ]
    return lines


def rewrites(claim: Claim) -> str:
    """What fxopt replaced, by rule."""
    counts: dict[str, int] = {}
    for applied in (claim.manifest or {}).get("applied", ()):
        counts[applied["rule"]] = counts.get(applied["rule"], 0) + applied["count"]
    return ", ".join(f"{rule} {count}" for rule, count in counts.items())


def conditions(record: Record) -> list[str]:
    """Where and when, in a few lines."""
    place = record.environment
    keys = ("device", "driver", "num_threads", "world_size", "torch", "triton", "commit")
    known = [f"{key} {place[key]}" for key in keys if place.get(key) is not None]
    return [" · ".join(known), f"{record.created} · {' '.join(record.command)} · {record.digest}"]


def text(record: Record) -> str:
    """For a terminal."""
    table = [COLUMNS, *rows(record)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    for claim in record.claims:
        lines += ["", claim.name, *(f"  {line}" for line in _all_details(claim))]
    return "\n".join([*lines, "", *conditions(record)])


def _all_details(claim: Claim) -> list[str]:
    made = rewrites(claim)
    return details(claim) + ([f"rewritten: {made}"] if made else [])


def markdown(record: Record) -> str:
    """For a README or a pull request."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    table = [line(COLUMNS), line(["---"] * len(COLUMNS)), *map(line, rows(record))]
    return "\n".join([*table, "", *conditions(record)])


def html(record: Record, pictures: Sequence[str] = ()) -> str:
    """One page without scripts or anything from elsewhere.

    Args:
        pictures: SVG elements.
    """
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows(record))
    sections = "".join(
        f"<h2>{markup.escape(claim.name)}</h2><ul>"
        + "".join(f"<li>{markup.escape(line)}</li>" for line in _all_details(claim))
        + "</ul>"
        for claim in record.claims
    )
    place = "".join(
        f"<tr><td>{markup.escape(key)}</td><td><code>{markup.escape(str(value))}</code></td></tr>"
        for key, value in [*record.environment.items(), ("digest", record.digest)]
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fxopt claim record</title><style>{STYLE}</style>"
        f"<h1>Claim record</h1><p>{markup.escape(record.created)} · "
        f"<code>{markup.escape(' '.join(record.command))}</code></p>"
        f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
        f"{''.join(pictures)}{sections}<h2>Environment</h2>"
        f'<div class="scroll"><table>{place}</table></div></html>\n'
    )


def _cell(text: str) -> str:
    kind = text.split()[0] if text else ""
    marked = f' class="{kind}"' if kind.isupper() and kind.isalpha() else ""
    return f"<td{marked}>{markup.escape(text)}</td>"
