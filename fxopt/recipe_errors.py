"""The mistakes that are made with schedules, with recipes stored beside checkpoints, with weights
that are gathered as codes, and with backends of attention.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.errors import FxoptError, UnknownName


@dataclass(eq=False)
class InvalidStep(FxoptError):
    """`at_step` was told something that is no step."""

    value: object
    template = (
        "step {value} is not an integer from 0; pass the training loop's count of optimizer steps"
    )

    def __post_init__(self) -> None:
        self.value = reprlib.repr(self.value)
        super().__post_init__()


@dataclass(eq=False)
class StepNotTold(FxoptError):
    """A linear of a recipe that depends on the step ran outside of `at_step`.

    why: a schedule, or a history.
    """

    recipe: str
    why: str = "a schedule"
    template = (
        "recipe {recipe!r} has {why} and was not told the step; put forward and backward, and "
        "validation, into `with fxopt.at_step(step):`"
    )


@dataclass(eq=False)
class StepChanged(FxoptError):
    """A checkpointed forward was computed again in another step than its own."""

    forward: int
    backward: int
    template = (
        "a forward of step {forward} was computed again for its backward in step {backward}, where "
        "a schedule may have other formats; put both into one `with fxopt.at_step(step):`"
    )


@dataclass(eq=False)
class ScheduleInGraph(FxoptError):
    """A compiler was given a recipe with a schedule; its graphs keep the formats of one step."""

    recipe: str
    template = (
        "recipe {recipe!r} has a schedule, but a compiled graph keeps the formats it was made "
        "with; use fxopt.optimize(model) or fxopt.swap(model), or compile without a schedule"
    )


@dataclass(eq=False)
class HistoryInGraph(FxoptError):
    """A compiler was given a recipe with a history; its graphs have no state."""

    recipe: str
    template = (
        "recipe {recipe!r} has a history, but in a compiled graph a step knows nothing of the ones "
        "before; use fxopt.optimize(model) or fxopt.swap(model), or history=0"
    )


@dataclass(eq=False)
class NoHistory(FxoptError):
    """A weight under delayed scaling is another tensor in each forward."""

    recipe: str
    shape: Sequence[int]
    template = (
        "recipe {recipe!r} has a history, but a weight {shape} is neither a parameter nor a cast "
        "of one: nothing says what it was in the step before; give its linear an override with "
        "history=0, or keep it"
    )


class Saturated(UserWarning):
    """Values were larger than what delayed scales were made for, and became that."""


@dataclass(eq=False)
class OtherStoredRecipe(FxoptError):
    """A checkpoint was trained under another recipe than the one that is asked for.

    differences: for each field its name, the stored value and the one asked for.
    """

    path: str
    stored: str
    asked: str
    differences: Sequence[tuple[str, str, str]]
    template = (
        "{path} holds recipe {stored!r}, asked for is {asked!r}: {listing}; go on under "
        "fxopt.Recipe.load of that directory, or call save to change the recipe on purpose"
    )

    def __str__(self) -> str:
        listing = "; ".join(f"{name} is {a}, not {b}" for name, a, b in self.differences)
        return self.template.format(**vars(self), listing=listing)


@dataclass(eq=False)
class NoStoredRecipe(FxoptError):
    """A checkpoint has no recipe beside it."""

    path: str
    template = (
        "{path} does not exist: the checkpoint was saved without its recipe, or is another "
        "directory; if you know the recipe, put it there with its save(directory)"
    )


@dataclass(eq=False)
class AllGatherInGraph(FxoptError):
    """A compiler was given a recipe that gathers codes; its graphs read the weights."""

    recipe: str
    template = (
        "recipe {recipe!r} has all_gather='fp8', but a compiled graph reads the weights; use "
        "fxopt.optimize(model) or fxopt.swap(model), or compile with all_gather='model'"
    )


@dataclass(eq=False)
class SavedInGraph(FxoptError):
    """A compiler was given a recipe that keeps activations as codes; it decides what is kept."""

    recipe: str
    template = (
        "recipe {recipe!r} has saved='fp8', but a compiler decides itself what it keeps for "
        "backward; use fxopt.optimize(model) or fxopt.swap(model), or compile with saved='model'"
    )


@dataclass(eq=False)
class CannotGather(FxoptError):
    """None of a model's weights can be gathered as codes."""

    recipe: str
    reasons: str
    template = (
        "recipe {recipe!r} has all_gather='fp8', but FSDP2 can gather no weight so: {reasons}; "
        "change that, or use all_gather='model'"
    )


@dataclass(eq=False)
class WeightGathered(FxoptError):
    """Something reads a weight of which FSDP2 has gathered codes alone."""

    weight: str
    reader: str
    template = (
        "{weight!r} was gathered as FP8 codes, but {reader}; use all_gather='model', or leave "
        "this linear out with keep"
    )


@dataclass(eq=False)
class MathInGraph(FxoptError):
    """Inductor was given a recipe whose attention is to be plain matrix products."""

    recipe: str
    template = (
        "recipe {recipe!r} has attention='math', but Inductor recognizes it and puts a fused "
        "attention in its place; use fxopt.optimize(model), fxopt.swap(model) or the option "
        "'inner': 'aot_eager'"
    )


class UnknownAttention(UnknownName):
    """No backend of attention has this name."""

    kind = "attention backend"


@dataclass(eq=False)
class AttentionRefused(FxoptError):
    """The attention backend that a recipe names cannot run a call."""

    backend: str
    call: str
    reasons: Sequence[str]
    template = (
        "attention={backend!r} cannot run {call}: {listing}; change that, or give the recipe "
        "attention='auto'"
    )

    def __str__(self) -> str:
        return self.template.format(**vars(self), listing="; ".join(self.reasons))
