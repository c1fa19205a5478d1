"""Schedules: phases of a training run in which a single GEMM has other formats, and its step.

The step is the training loop's: it is told (`at_step`), never counted, so that all ranks agree and
a run that is resumed goes on where it was.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from fxopt.errors import InvalidRecipe
from fxopt.gemms import GEMMS, Gemm, from_data, to_data
from fxopt.recipe_errors import InvalidStep


@dataclass(frozen=True)
class Phase:
    """Steps in which one GEMM runs in other formats than the recipe's.

    gemm: "fprop", "dgrad" or "wgrad".
    start, stop: the first step, and the first one after the phase; None for no end.
    formats: of the GEMM; None is the model's own dtype.
    """

    gemm: str
    start: int
    stop: int | None = None
    formats: Gemm | None = None

    def __contains__(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)

    def __str__(self) -> str:
        return f"{self.gemm} {_steps(self.start, self.stop)}"

    def problems(self) -> Iterator[str]:
        """What contradicts what."""
        if self.gemm not in GEMMS:
            yield f"unknown GEMM {self.gemm!r}; known: {', '.join(GEMMS)}"
        if not _is_step(self.start) or not (self.stop is None or _is_step(self.stop)):
            yield f"start {self.start!r} and stop {self.stop!r} are no steps: integers from 0"
        elif self.stop is not None and self.stop <= self.start:
            yield f"it stops at step {self.stop}, before its first step {self.start} is over"
        if self.formats is not None:
            yield from self.formats.problems()

    def to_data(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return {**vars(self), "formats": to_data(self.formats)}

    @staticmethod
    def from_data(recipe: str, data: Any) -> Phase:
        """What `to_data` gave.

        Raises:
            InvalidRecipe: it is no such thing.
        """
        names = {f.name for f in fields(Phase)}
        if not isinstance(data, dict) or not {"gemm", "start"} <= data.keys() <= names:
            form = "an object of gemm and start, stop and formats"
            raise InvalidRecipe(recipe, f"the phase {data!r} is not {form}")
        formats = from_data(recipe, "formats", data.get("formats", to_data(None)))
        return Phase(**data | {"formats": formats})


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0


def _steps(start: int, stop: int | None) -> str:
    return f"from step {start}" + ("" if stop is None else f" to step {stop - 1}")


def problems(schedule: Sequence[Phase]) -> Iterator[str]:
    """All that is wrong with a schedule: with each phase, and phases that overlap."""
    sound = []
    for phase in schedule:
        found = list(phase.problems())
        yield from (f"schedule, {phase.gemm} of step {phase.start}: {p}" for p in found)
        sound += [] if found else [phase]
    for a, b in combinations(sound, 2):
        first = max(a.start, b.start)
        if a.gemm == b.gemm and first in a and first in b:
            stop = min((p.stop for p in (a, b) if p.stop is not None), default=None)
            yield f"schedule: two phases set {a.gemm} {_steps(first, stop)}"


# Of the process and not of a context: a backward on CUDA computes checkpoints again in a thread of
# autograd's own, which has none of the caller's context variables.
_told: list[tuple[int, Any]] = []


@contextmanager
def at_step(step: int, *, group: Any = None) -> Iterator[None]:
    """Say which step this is, around the forward and backward of all its micro-batches.

        for step, batch in enumerate(loader):
            with fxopt.at_step(step):
                loss(model, batch).backward()
            optimizer.step()

    A recipe with a schedule or a history asks for it whenever its linears run, in validation as
    well, which leaves a history as it is, at whatever step; other recipes do not care. It holds for
    the whole process. A CUDA graph repeats the formats of the step in which it was recorded.

    Args:
        step: the loop's count of optimizer steps, from 0, the same on all ranks.
        group: processes that scale by the same magnitudes where a recipe has a history, in one
            collective for all tensors with the first forward of a step. All run the same linears
            in the same order. None: each scales by its own.

    Raises:
        InvalidStep: it is no such number.
    """
    try:
        count = operator.index(step)
    except TypeError:
        raise InvalidStep(step) from None
    if count < 0:
        raise InvalidStep(step)
    _told.append((count, group))
    try:
        yield
    finally:
        _told.pop()


def current_step() -> int | None:
    """The step that was told; None outside of `at_step`."""
    return _told[-1][0] if _told else None


def current_group() -> Any:
    """The processes that were told with the step, or None."""
    return _told[-1][1] if _told else None
