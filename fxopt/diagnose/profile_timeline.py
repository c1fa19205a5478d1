"""The steps of a profile as a picture: each a bar, its phases in the order in which they came."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.diagnose.phases import PHASES, Step
from fxopt.diagnose.profiling import Profiled
from fxopt.render import quantity

COLOURS = dict(
    zip(
        PHASES,
        (
            *("#b35900", "#8250df", "#0a7ea4", "#1a7f37", "#0969da", "#cf222e", "#bf8700"),
            *("#a40e72", "#57606a", "#6e4c13", "#9a3412", "#d0d7de"),
        ),
        strict=True,
    )
)
# Of many ranks those are drawn that take the longest, and rank 0.
NUM_RANKS = 8
WIDTH, HEIGHT = 1000, 24  # of a bar, in units of its own
STYLE = """
.row { display: grid; grid-template-columns: 8rem 1fr; align-items: center; margin: .2rem 0 }
.row svg { width: 100%; height: 1.5rem; display: block }
.legend span { white-space: nowrap; margin-right: .9rem }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr } }
"""


def timeline(ranks: Sequence[Profiled]) -> str:
    """A legend and one bar per step; the longest step is as wide as the page."""
    slowest = sorted(ranks, key=lambda rank: -sum(step.seconds for step in rank.steps))
    drawn = sorted({slowest[0].rank, *(r.rank for r in slowest[: NUM_RANKS - 1]), ranks[0].rank})
    shown = [rank for rank in ranks if rank.rank in drawn]
    longest = max(step.seconds for rank in shown for step in rank.steps)
    used = {name for rank in shown for step in rank.steps for name, _ in step.timeline}
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{name}</span>'
        for name, colour in COLOURS.items()
        if name in used
    )
    rows = "".join(
        f'<div class="row"><span>rank {rank.rank}, step {index}</span>{_bar(step, longest)}</div>'
        for rank in shown
        for index, step in enumerate(rank.steps, start=1)
    )
    left_out = len(ranks) - len(shown)
    note = f"<p>{left_out} more ranks, none slower than these</p>" if left_out else ""
    return f'<p class="legend">{legend}</p>{rows}{note}'


def _bar(step: Step, longest: float) -> str:
    scale = WIDTH * step.seconds / longest
    at, parts = 0.0, []
    for name, share in step.timeline:
        parts.append(
            f'<rect x="{at:.1f}" width="{share * scale:.1f}" height="{HEIGHT}" '
            f'fill="{COLOURS[name]}"><title>{name} {quantity(share * step.seconds, "s")}</title>'
            "</rect>"
        )
        at += share * scale
    label = f"{quantity(step.seconds, 's')}: " + ", ".join(
        f"{name} {phase.wall / step.seconds:.0%}"
        for name, phase in step.phases.items()
        if phase.wall >= 0.005 * step.seconds
    )
    return (
        f'<svg class="bar" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none">{"".join(parts)}</svg>'
    )
