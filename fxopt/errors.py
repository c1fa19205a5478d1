"""One class per user mistake. Each message names the value, the limit and the remedy.

All derive from `FxoptError`, a `ValueError`. Whoever raises one leaves the model as it was.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn

    from fxopt.report import Declined

MINIMUM_TORCH = "2.11"


class FxoptError(ValueError):
    """Base of every mistake that fxopt reports; `str` fills `template` with the fields."""

    template: ClassVar[str]

    def __post_init__(self) -> None:
        # Pickle rebuilds an exception from `args`; worker processes send theirs that way.
        self.args = tuple(getattr(self, f.name) for f in fields(self) if f.init)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.template.format(**vars(self))


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The `limit` names of `known` that are spelled most like `name`, best first."""
    lower = {k.lower(): k for k in known}
    return [lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=limit, cutoff=0.4)]


def check_torch(version: str) -> None:
    """Raise UnsupportedTorch if `version` (as in `torch.__version__`) is below the minimum."""

    def key(text: str) -> list[int]:
        return [int("".join(filter(str.isdigit, part)) or 0) for part in text.split(".")[:2]]

    if key(version) < key(MINIMUM_TORCH):
        raise UnsupportedTorch(version)


def check_inputs(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise InputMismatch if `module.forward` does not take these arguments."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputMismatch(type(module).__name__, str(signature), str(error)) from None


@dataclass(eq=False)
class NotAModule(FxoptError):
    """Something else than a `torch.nn.Module` was given."""

    value: object
    template = (
        "expected a torch.nn.Module, got {value} ({kind}); pass the model itself, "
        "for a diffusers pipeline that is `pipeline.transformer`"
    )
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.kind = type(self.value).__name__
        self.value = reprlib.repr(self.value)
        super().__post_init__()


@dataclass(eq=False)
class MetaModel(FxoptError):
    """A model whose parameters are on the meta device was asked to run."""

    module: str
    parameter: str
    template = (
        "{module} cannot run: parameter {parameter!r} is on the meta device and holds no values; "
        "call model.to_empty(device=...) and load its weights first, or plan without weights with "
        "fxopt.explain"
    )


@dataclass(eq=False)
class InputMismatch(FxoptError):
    """Example inputs do not fit the model's forward."""

    module: str
    signature: str
    problem: str
    template = (
        "example inputs do not fit {module}.forward{signature}: {problem}; pass what you would "
        "pass to the model, as a dict of keyword arguments or a tuple of positional ones"
    )


@dataclass(eq=False)
class UnknownName(FxoptError):
    """What all unknown names have in common: the message, with the nearest of the known ones."""

    name: str
    known: Sequence[str]
    kind: ClassVar[str]
    template = "unknown {kind} {name!r}{suggestion}; known: {listing}"

    def __str__(self) -> str:
        close = nearest(self.name, self.known)
        return self.template.format(
            kind=self.kind,
            name=self.name,
            suggestion=f"; did you mean {' or '.join(map(repr, close))}?" if close else "",
            listing=", ".join(sorted(self.known)) or "none",
        )


class UnknownRecipe(UnknownName):
    """No recipe has this name."""

    kind = "recipe"


@dataclass(eq=False)
class InvalidRecipe(FxoptError):
    """A recipe contradicts itself, or asks for what does not exist."""

    recipe: str
    problem: str
    template = "recipe {recipe!r}: {problem}; start from a named one, see fxopt.recipes.RECIPES"


@dataclass(eq=False)
class OtherRecipe(FxoptError):
    """A door was opened again on a model, with another recipe."""

    asked: str
    present: str
    template = (
        "recipe {asked!r} was asked for, but the model is rewritten under {present!r} already; "
        "call fxopt.restore(model) first"
    )


@dataclass(eq=False)
class OtherSetting(FxoptError):
    """A door was opened again on a model, with another value of one of its arguments."""

    name: str
    asked: object
    present: object
    template = (
        "{name}={asked} was asked for, but the model is rewritten with {name}={present} already; "
        "call fxopt.restore(model) first"
    )

    def __post_init__(self) -> None:
        self.asked, self.present = reprlib.repr(self.asked), reprlib.repr(self.present)
        super().__post_init__()


@dataclass(eq=False)
class NotNative(FxoptError):
    """A recipe that may not be emulated was asked for on a device that cannot run it."""

    recipe: str
    device: str
    needed: str
    template = (
        "recipe {recipe!r} cannot run on {device}, it needs {needed}; use emulate=True to compute "
        "the same there slowly, or another recipe"
    )


@dataclass(eq=False)
class LowPrecisionParameter(FxoptError):
    """A parameter of the model is stored in FP8, which leaves nothing to train."""

    parameter: str
    dtype: str
    template = (
        "parameter {parameter!r} is stored in {dtype}: recipes quantize the products, the "
        "parameters stay in bf16, fp16 or fp32; load the model in one of them"
    )


class UnknownRule(UnknownName):
    """No rule of the catalogue has this name."""

    kind = "rule"


class UnknownTarget(UnknownName):
    """No planning target of `fxopt.hardware` has this name."""

    kind = "target"


class UnknownPreset(UnknownName):
    """No preset of `fxopt explain` has this name."""

    kind = "preset"


class UnknownOption(UnknownName):
    """A door does not take this option, or not this value for it."""

    kind = "option"


@dataclass(eq=False)
class _MatchesNothing(FxoptError):
    pattern: str
    known: Sequence[str]

    def __str__(self) -> str:
        close = nearest(self.pattern, self.known)
        return self.template.format(
            pattern=self.pattern,
            num_known=len(self.known),
            suggestion=f"; nearest: {', '.join(map(repr, close))}" if close else "",
        )


class TargetMatchesNothing(_MatchesNothing):
    """A `targets` glob or class picks no submodule."""

    template = (
        "targets={pattern!r} matches none of the {num_known} submodules{suggestion}; targets are "
        "globs over fully qualified names ('transformer_blocks.*') or module classes"
    )


class KeepMatchesNothing(_MatchesNothing):
    """A glob or role in a recipe's `keep` or `overrides` picks no linear."""

    template = (
        "{pattern!r} in keep or overrides matches none of the {num_known} linears{suggestion}; "
        "give a glob over fully qualified names, such as 'transformer_blocks.0.*'"
    )


@dataclass(eq=False)
class StrictRule(FxoptError):
    """A rule named in `strict` did not fire."""

    rule: str
    declined: Sequence[Declined] = ()
    template = "strict rule {rule!r} did not fire: {why}"

    def __str__(self) -> str:
        misses = [d for d in self.declined if d.rule == self.rule]
        if not misses:
            why = "no operation in the captured blocks starts this pattern; take it out of `strict`"
            kept = [d for d in self.declined if d.rule in ("capture", "swap")]
            for reasons, like in itertools.groupby(kept, key=lambda d: d.reasons):
                blocks = ", ".join(d.fqn for d in like)
                why += f"\n  - as they are run {blocks}: {'; '.join(reasons)}"
            return self.template.format(rule=self.rule, why=why)
        miss = min(misses, key=lambda d: len(d.reasons))
        lines = [
            f"the nearest of {len(misses)} misses is {miss.node} in {miss.fqn} at {miss.source}"
        ]
        lines += [f"  - {reason}" for reason in miss.reasons]
        lines += [f"  remedy: {miss.remedy}"] if miss.remedy else []
        return self.template.format(rule=self.rule, why="\n".join(lines))


@dataclass(eq=False)
class UnsupportedTorch(FxoptError):
    """The installed torch is older than fxopt supports."""

    version: str
    template = "torch {version} is not supported: fxopt needs {minimum} or newer; " + (
        "pip install --upgrade 'torch>={minimum}'"
    )

    def __str__(self) -> str:
        return self.template.format(version=self.version, minimum=MINIMUM_TORCH)


@dataclass(eq=False)
class NothingToRestore(FxoptError):
    """`restore` was called on a model that no door has changed."""

    module: str
    template = (
        "{module} has nothing to restore: no submodule was rewritten by fxopt.optimize or "
        "fxopt.swap; pass the same object that was given to them"
    )


@dataclass(eq=False)
class StillRewritten(FxoptError):
    """A rewritten model was pickled whole."""

    block: str
    template = (
        "block {block!r} holds a rewritten graph, which cannot be pickled; save "
        "model.state_dict(), or call fxopt.restore(model) before torch.save(model)"
    )


@dataclass(eq=False)
class NotReported(FxoptError):
    """`report` was called on a model that no door has seen."""

    module: str
    template = (
        "{module} has no report: call fxopt.optimize or fxopt.swap on it first, or run it once if "
        "it is compiled with backend='fxopt'; fxopt.explain shows what they would do"
    )


@dataclass(eq=False)
class NoTelemetry(FxoptError):
    """`telemetry` was given a model, or arguments, that it cannot record."""

    problem: str
    remedy: str
    template = "telemetry cannot be had: {problem}; {remedy}"


@dataclass(eq=False)
class MissingPackage(FxoptError):
    """An optional package that a command needs is not installed."""

    package: str
    purpose: str
    extra: str
    template = "{purpose} needs {package!r}, which is not installed; pip install 'fxopt[{extra}]'"


@dataclass(eq=False)
class NotAnExample(FxoptError):
    """`fxopt explain path.py:function` cannot get a model and its inputs from the path."""

    spec: str
    problem: str
    template = (
        "cannot explain {spec!r}: {problem}; give a preset or FILE.py:FUNCTION, where FUNCTION() "
        "returns (model, inputs) and inputs is a dict of keyword arguments or a tuple"
    )
