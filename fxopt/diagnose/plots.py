"""Pictures of a record: speedups with their intervals, and each step against the roofline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.diagnose.record import Record, write_bytes
from fxopt.diagnose.verdict import Label
from fxopt.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    Label.FAST: "#1a7f37",
    Label.SAME: "#57606a",
    Label.SLOW: "#cf222e",
    Label.INVALID: "#cf222e",
    Label.INCONCLUSIVE: "#9a6700",
}


def save(record: Record, stem: Path) -> list[Path]:
    """Write `<stem>-ratio` and `<stem>-roofline` as PNG and SVG; the paths."""
    written = []
    for name, figure in figures(record).items():
        for kind in ("png", "svg"):
            path = stem.with_name(f"{stem.name}-{name}.{kind}")
            file = io.BytesIO()
            figure.savefig(file, format=kind, dpi=150)
            write_bytes(file.getvalue(), path)
            written.append(path)
    return written


def svg(record: Record) -> list[str]:
    """The pictures as SVG elements, to stand in a page."""
    pictures = []
    for figure in figures(record).values():
        file = io.StringIO()
        figure.savefig(file, format="svg")
        text = file.getvalue()
        pictures.append(text[text.index("<svg") :])
    return pictures


def figures(record: Record) -> dict[str, Figure]:
    """What there is data for: "ratio", "roofline"."""
    drawn = {"ratio": ratio(record), "roofline": roofline(record)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _figure(height: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPackage("matplotlib", "a plot", "evidence") from error
    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots()


def ratio(record: Record) -> Figure | None:
    """Speedup of each case with its confidence interval, and the margin within which it is SAME."""
    timed = [c for c in record.claims if c.verdict is not None and c.verdict.steady is not None]
    if not timed:
        return None
    figure, axes = _figure(1.5 + 0.4 * len(timed))
    for row, claim in enumerate(timed):
        assert claim.verdict is not None and claim.verdict.steady is not None
        steady, colour = claim.verdict.steady, COLOURS[claim.verdict.label]
        axes.plot([steady.low, steady.high], [row, row], color=colour, linewidth=3)
        axes.plot(steady.speedup, row, "o", color=colour)
        axes.annotate(
            claim.verdict.label, (steady.high, row), (6, 0), textcoords="offset points",
            va="center", fontsize=8, color=colour,
        )  # fmt: skip
        margin = claim.verdict.margin
    axes.axvspan(1 / (1 + margin), 1 + margin, color="#57606a", alpha=0.15, label="SAME")
    axes.axvline(1, color="#57606a", linewidth=1)
    axes.set(
        yticks=range(len(timed)),
        yticklabels=[claim.name for claim in timed],
        ylim=(len(timed) - 0.5, -0.5),
        xlabel="speedup: baseline time / candidate time",
    )
    axes.margins(x=0.15)
    return figure


def roofline(record: Record) -> Figure | None:
    """Achieved FLOP/s of both sides by case, next to the peaks that the device reached."""
    timed = [
        c
        for c in record.claims
        if c.speed and c.speed.flops and c.verdict is not None and c.verdict.steady is not None
    ]
    if not timed:
        return None
    figure, axes = _figure(1.5 + 0.5 * len(timed))
    peaks: dict[str, float] = {}
    for row, claim in enumerate(timed):
        assert claim.speed and claim.verdict and claim.verdict.steady
        peaks |= claim.speed.peak_flops
        for side, offset, colour in (("baseline", -0.15, "#57606a"), ("candidate", 0.15, "C0")):
            total = sum(claim.speed.flops[side].values())
            rate = total / getattr(claim.verdict.steady, f"{side}_s")
            axes.barh(row + offset, rate, 0.28, color=colour, label=side if row == 0 else None)
    for dtype, peak in peaks.items():
        axes.axvline(peak, linestyle="--", color="black", linewidth=1)
        axes.annotate(f"{dtype} peak", (peak, -0.45), rotation=90, va="top", ha="right", fontsize=8)
    axes.set(
        yticks=range(len(timed)),
        yticklabels=[claim.name for claim in timed],
        ylim=(len(timed) - 0.5, -0.5),
        xlabel="FLOP/s of matrix products and attention, over the whole step",
    )
    axes.legend(loc="lower right")
    return figure
