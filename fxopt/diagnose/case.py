"""One case from set-up to claim: check, count, time, check again; a failure keeps what it found."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fxopt.diagnose import memory, numerics, roofline
from fxopt.diagnose.devices import TorchDevice
from fxopt.diagnose.numerics import Check
from fxopt.diagnose.protocol import Plan, Samples, measure
from fxopt.diagnose.ranks import RankFailed
from fxopt.diagnose.record import Claim, Speed, Stop
from fxopt.diagnose.roofline import Flops, Peaks
from fxopt.diagnose.subjects import Make, Subject, kept_state
from fxopt.diagnose.verdict import MARGIN, Verdict, is_decided, judge
from fxopt.errors import FxoptError, NotReported
from fxopt.recipes import RECIPES

Progress = Callable[[str], None]
SIDES = ("baseline", "candidate")


@dataclass(frozen=True)
class Case:
    """What to compare.

    Args:
        name: unique in a record.
        baseline, candidate: build the two sides, from the same seed.
        configuration: what was chosen to get here; goes into the record.
        truth: builds a subject to cast to float64, or None to compare with the baseline.
        flush: empty the caches before each call: for kernels.
        tolerance: see `numerics.check`; `Settings` may say otherwise.
    """

    name: str
    baseline: Make
    candidate: Make
    configuration: Mapping[str, Any] = field(default_factory=dict)
    truth: Make | None = None
    flush: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Settings:
    """How to judge: see `verdict`, `numerics.check` and `protocol.Plan`."""

    plan: Plan = field(default_factory=Plan)
    seed: int = 0
    margin: float = MARGIN
    tolerance: float | None = None


class Run:
    """A case under measurement."""

    def __init__(self, case: Case, device: TorchDevice, settings: Settings) -> None:
        self.case, self.device, self.settings = case, device, settings
        self.phase = "set-up"
        self.samples = Samples()
        self.checks: list[Check] = []
        self.memory: dict[str, memory.Memory] = {}
        self.flops: dict[str, Flops] = {}
        self.peaks: Peaks | None = None
        self.floor_s = dict.fromkeys(SIDES, 0.0)
        self.manifest: dict[str, Any] | None = None
        self.names = ("", "")

    def __call__(self, progress: Progress = lambda phase: None) -> Claim:
        """Measure; the claim is partial if a step raises or the user stops it.

        Raises:
            FxoptError: if there is nothing that can be compared.
        """
        try:
            self._measure(progress)
        # Steps are anybody's code: whatever ends one early becomes part of the record.
        except (Exception, KeyboardInterrupt) as error:
            stop = self._stop(error)
            self.device.ranks.fail(stop.error, stop.where)
            if isinstance(error, FxoptError):
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            return self._claim("interrupted" if interrupted else "failed", stop)
        return self._claim("complete", None)

    @property
    def _tolerance(self) -> float | None:
        return self.settings.tolerance or self.case.tolerance

    def _measure(self, progress: Progress) -> None:
        def enter(phase: str) -> None:
            self.phase = phase
            progress(phase)

        enter("set-up")
        torch.compiler.reset()  # what earlier cases compiled counts towards the recompile limit
        baseline, candidate = self.case.baseline(), self.case.candidate()
        self.names = baseline.name, candidate.name
        enter("check before timing")
        self._check("before", baseline, candidate)
        self.manifest = manifest(candidate)
        if self._invalid():
            return  # how fast a wrong result comes does not matter
        enter("counting FLOPs and memory")
        self._count(baseline, candidate)
        enter("timing")
        plan = dataclasses.replace(self.settings.plan, flush=self.case.flush)

        def decided(samples: Samples) -> bool:
            return is_decided(samples, self.settings.margin)

        measure(baseline, candidate, self.device, plan, self.samples, decided)
        enter("check after timing")
        self._check("after", baseline, candidate)
        progress("done")

    def _check(self, when: str, baseline: Subject, candidate: Subject) -> None:
        found = numerics.check(
            when,
            baseline,
            candidate,
            self.case.truth,
            self.settings.seed,
            self._tolerance,
        )
        (most,) = self.device.agree([float(len(found.failures))])
        if most and not found.failures:
            elsewhere = (f"{int(most)} tensors differ on another rank",)
            found = dataclasses.replace(found, failures=elsewhere)
        self.checks.append(found)

    def _count(self, baseline: Subject, candidate: Subject) -> None:
        with kept_state(baseline, candidate):
            device = self.device.device
            self.memory = {
                "baseline": memory.measure(baseline, device),
                "candidate": memory.measure(candidate, device),
            }
            # A compiled step shows no ops; its FLOPs are those of the code that it came from.
            with torch.compiler.set_stance("force_eager"):
                flops = roofline.count(baseline), roofline.count(candidate)
        self.flops = dict(zip(SIDES, flops, strict=True))
        first, second = ({*counts.trained, *counts.frozen} for counts in flops)
        second |= quantized_dtypes(self.manifest)
        self.peaks = roofline.calibrate(self.device, first | second)
        # Only a flushed case is sure to read its state from memory.
        cold = sum(t.untyped_storage().nbytes() for t in baseline.state()) if self.case.flush else 0
        # Both must do the baseline's work; a candidate may do it in other dtypes.
        for side, dtypes in zip(SIDES, ((), second - first), strict=True):
            self.floor_s[side] = roofline.floor_seconds(flops[0], self.peaks, cold, dtypes)

    def _stop(self, error: BaseException) -> Stop:
        elsewhere = error if isinstance(error, RankFailed) else self.device.ranks.failure()
        if elsewhere is not None:
            return Stop(self.phase, str(elsewhere), elsewhere.where)
        frames = traceback.extract_tb(error.__traceback__)
        here = str(Path(__file__).parent)
        theirs = [f for f in frames if "site-packages" not in f.filename]
        # The user's own line says more than the library's below it.
        own = [f for f in theirs if not f.filename.startswith(here)] or theirs or frames
        kind, message = type(error).__name__, str(error)
        return Stop(
            self.phase,
            f"{kind}: {message}" if message else kind,
            f"{own[-1].filename}:{own[-1].lineno}",
        )

    def _verdict(self) -> Verdict | None:
        if not self.samples.rounds and not self._invalid():
            return None
        verdict = judge(self.samples, self._invalid(), margin=self.settings.margin)
        if verdict.steady is None:
            return verdict
        reasons = []
        for side, floor in self.floor_s.items():
            seconds = getattr(verdict.steady, f"{side}_s")
            if seconds < floor:
                reasons.append(
                    f"the {side}'s {seconds:.3e} s are less than the {floor:.3e} s that the FLOPs "
                    "and bytes of the step take at the peaks of this device: work was left out or "
                    "not timed"
                )
        if not reasons:
            return verdict
        return judge(self.samples, [*self._invalid(), *reasons], margin=self.settings.margin)

    def _invalid(self) -> list[str]:
        return [f"{c.when} timing, {failure}" for c in self.checks for failure in c.failures]

    def _speed(self, verdict: Verdict | None) -> Speed | None:
        if not self.flops or self.peaks is None:
            return None
        used = {}
        if verdict is not None and verdict.steady is not None:
            for side, flops in self.flops.items():
                seconds = getattr(verdict.steady, f"{side}_s")
                used[side] = roofline.utilization(flops, self.peaks, seconds)
        return Speed(
            {side: flops.trained for side, flops in self.flops.items()},
            self.flops["baseline"].frozen,
            self.peaks.flops,
            self.peaks.bandwidth,
            self.floor_s,
            used,
        )

    def _claim(
        self, status: Literal["complete", "interrupted", "failed"], stop: Stop | None
    ) -> Claim:
        verdict = self._verdict()
        return Claim(
            name=self.case.name,
            baseline=self.names[0],
            candidate=self.names[1],
            configuration=dict(self.case.configuration)
            | {
                "seed": self.settings.seed,
                "margin": self.settings.margin,
                "tolerance": self._tolerance,
                "truth": "baseline" if self.case.truth is None else "float64",
                "flush": self.case.flush,
            },
            status=status,
            stop=stop,
            verdict=verdict,
            samples=self.samples,
            checks=tuple(self.checks),
            memory=self.memory,
            speed=self._speed(verdict),
            manifest=self.manifest,
        )


def manifest(subject: Subject) -> dict[str, Any] | None:
    """fxopt's report on the model of a subject; None if no door was opened on it."""
    if subject.model is None:
        return None
    from fxopt.backends.state import report

    try:
        return report(subject.model).to_dict()
    except NotReported:
        return None


def quantized_dtypes(manifest: Mapping[str, Any] | None) -> set[str]:
    """What a model's products may have moved to, which counts of compiled code do not show."""
    recipe = RECIPES.get((manifest or {}).get("recipe", ""))
    return {roofline.FP8} if recipe is not None and recipe.gemms else set()
