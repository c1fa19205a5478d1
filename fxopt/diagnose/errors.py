"""Mistakes in measuring, in the way of `fxopt.errors`: value, limit and remedy."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.errors import FxoptError


@dataclass(eq=False)
class NotAStep(FxoptError):
    """`fxopt bench` cannot get something to time from what was named."""

    spec: str
    problem: str
    template = (
        "cannot measure {spec!r}: {problem}; give FILE.py:FUNCTION, where FUNCTION() returns step, "
        "(step, model) or (step, model, inputs), and step(**inputs) does forward and backward and "
        "returns its loss or outputs"
    )


@dataclass(eq=False)
class StepsDiffer(FxoptError):
    """Baseline and candidate do not return the same tensors."""

    name: str
    baseline: str
    candidate: str
    template = (
        "baseline and candidate cannot be compared: {name} is {baseline} in the baseline, but "
        "{candidate} in the candidate; both must return the same tensors and train parameters of "
        "the same names"
    )


@dataclass(eq=False)
class RecordsDiffer(FxoptError):
    """Two claim records were not made under the same conditions."""

    name: str
    old: object
    new: object
    template = (
        "the records cannot be compared: {name} is {old!r} in the old one and {new!r} in the new "
        "one; measure both on one machine, with one configuration and one seed"
    )


@dataclass(eq=False)
class InvalidRecord(FxoptError):
    """A file is not a claim record, or was changed."""

    path: str
    problem: str
    template = "{path} is no valid claim record: {problem}; make one with fxopt bench --out FILE"


@dataclass(eq=False)
class CannotWrite(FxoptError):
    """A result could not be written."""

    path: str
    problem: str
    template = "cannot write {path}: {problem}; nothing was replaced, give another path with --out"


@dataclass(eq=False)
class InvalidTrace(FxoptError):
    """A file is not a trace that can be analysed."""

    path: str
    problem: str
    template = (
        "cannot analyse {path}: {problem}; give a file of torch.profiler's export_chrome_trace, "
        "complete and as .json or .json.gz"
    )


@dataclass(eq=False)
class TooFewSteps(FxoptError):
    """A profiled loop ended before there was anything to analyse."""

    num_steps: int
    needed: int
    template = (
        "the loop ended after {num_steps} steps, a profile needs {needed}; run longer, or profile "
        "fewer steps with --steps"
    )


@dataclass(eq=False)
class EmptyWindow(FxoptError):
    """A part of a profile has no steps."""

    num_skipped: int
    num_plain: int
    num_profiled: int
    template = (
        "a profile of {num_skipped} skipped, {num_plain} plain and {num_profiled} profiled steps "
        "has nothing to compare; each must be at least 1"
    )


@dataclass(eq=False)
class NoSuchDevice(FxoptError):
    """`--device` names what this machine does not have."""

    name: str
    known: str
    template = "there is no device {name!r} to measure on; this machine has {known}"


@dataclass(eq=False)
class NotAScript(FxoptError):
    """`fxopt profile` was given no file."""

    path: str
    template = (
        "there is no script {path!r}; fxopt profile [options] train.py [arguments of train.py]"
    )


@dataclass(eq=False)
class NotAReport(FxoptError):
    """`fxopt profile --report` was given something else."""

    path: str
    problem: str
    template = (
        "{path} is no report of fxopt's: {problem}; write one with "
        "json.dump(fxopt.report(model).to_dict(), file)"
    )


@dataclass(eq=False)
class RankMissing(FxoptError):
    """A rank has left no result."""

    rank: int
    seconds: float
    template = (
        "rank {rank} has left no profile within {seconds:.0f} s; look at its own output, and give "
        "all ranks one --out folder"
    )


@dataclass(eq=False)
class RankEnded(FxoptError):
    """A rank has failed while it was profiled."""

    rank: int
    error: str
    template = "rank {rank} has no profile, because it ended with {error}; its output says where"
