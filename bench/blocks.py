"""`python -m bench.blocks`: blocks at their real sizes, forward and backward, in bfloat16 and FP8.

On a CUDA device: fxopt's eager door against the block as its authors wrote it and against
torch.compile, each pair timed in turn. Then the same under `recipe="fp8"`, also against torchao's
float8 training with and without torch.compile. Values and gradients are checked first.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.contest import Contest, run
from fxopt.diagnose.case import Case
from fxopt.diagnose.intervals import union
from fxopt.diagnose.protocol import Plan, Step
from fxopt.diagnose.subjects import Make, Subject
from fxopt.diagnose.suites import Sweep, envelope, preset_cases
from fxopt.recipes import RECIPES

PLAN = Plan(
    min_rounds=10, min_seconds=1.0, max_rounds=30, seconds=6.0, min_warmup=0.2, warmup_seconds=40.0
)
MAX_IDLE = 0.02
IDLE_STEPS = 10  # of which the idle share is taken


@dataclass(frozen=True)
class Targets:
    """Least speedups; None where the figure is only reported.

    Args:
        eager, compiled: of fxopt in bfloat16 over the block as it is, and under torch.compile.
        fp8: of fxopt's FP8 over the block as it is, fxopt in bfloat16, and torchao compiled.
    """

    eager: float
    compiled: float = 1.0
    fp8: tuple[float | None, float | None, float | None] = (None, None, None)


FP8 = (1.5, 1.2, 1.1)
BLOCKS = {
    "flux-dev-double": Targets(1.20, fp8=FP8),
    "flux-dev-single": Targets(1.20, fp8=FP8),
    "wan2.1-14b-block": Targets(1.14),
    "z-image-block": Targets(1.5),
}


def contenders(name: str, sweep: Sweep, device: torch.device) -> dict[str, Make]:
    """The block as it is, under torch.compile, and rewritten; then the FP8 forms of it."""

    def case(door: str, recipe: str = "bf16") -> Case:
        options = replace(sweep, door=(door,), recipe=(recipe,))
        cases = preset_cases(name, options, device, seed=0, in_float64=False)
        return next(case for case in cases if case.name.split()[0] == name)

    eager = case("optimize").baseline
    found = {
        "eager": eager,
        "torch.compile": case("compile").baseline,
        "fxopt": case("optimize").candidate,
        "fxopt fp8": case("optimize", "fp8").candidate,
    }
    if find_spec("torchao") is not None:
        found["torchao"] = functools.partial(with_torchao, eager, False)
        found["torchao, torch.compile"] = functools.partial(with_torchao, eager, True)
    return found


def with_torchao(make: Make, compiles: bool) -> Subject:
    """The block with torchao's float8 linears, where their sizes allow them."""
    from torchao.float8 import convert_to_float8_training

    subject = make()
    assert subject.model is not None
    convert_to_float8_training(
        subject.model,
        module_filter_fn=lambda linear, _: (
            linear.in_features % 16 == 0 and linear.out_features % 16 == 0
        ),
    )
    if compiles:
        subject.model.compile()  # in place, as the step calls this module
    return subject


def measure(contest: Contest, name: str, makes: dict[str, Make], targets: Targets) -> None:
    """All comparisons of one block. Only two forms of it are in memory at a time."""

    def is_right(who: str) -> bool:
        tolerance = None if who in ("fxopt", "torch.compile") else envelope(RECIPES["fp8"])
        return contest.is_right(name, who, makes["eager"], makes[who], False, tolerance)

    def race(candidate: str, baseline: str, target: float | None) -> None:
        first, second = makes[baseline](), makes[candidate]()
        contest.speedup(name, f"{candidate} vs {baseline}", first, second, at_least=target)
        torch.compiler.reset()

    right = {who for who in makes if who != "eager" and is_right(who)}
    race("fxopt", "eager", targets.eager)
    race("fxopt", "torch.compile", targets.compiled)
    races = {
        "eager": targets.fp8[0],
        "fxopt": targets.fp8[1],
        "torchao": None,
        "torchao, torch.compile": targets.fp8[2],
    }
    for baseline, target in races.items():
        if baseline in makes:
            race("fxopt fp8", baseline, target)
    for who in makes.keys() - right - {"eager"}:
        print(f"{name}: the times of {who} are those of a wrong result", file=sys.stderr)
    if contest.device.device.type == "cuda":
        contest.add(name, "fxopt, idle share", idle_share(makes["fxopt"]()), at_most=MAX_IDLE)


def idle_share(step: Step) -> float:
    """Share of the time of some steps in a row in which the GPU runs no kernel."""
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(IDLE_STEPS):
            step()
        torch.cuda.synchronize()
    spans = [
        (round(1e3 * event.time_range.start), round(1e3 * event.time_range.end))
        for event in found.events()
        if event.device_type == DeviceType.CUDA
    ]
    busy = union(np.array(spans, dtype=np.int64))
    whole = busy[-1:, 1] - busy[:1, 0]
    return float(1 - (busy[:, 1] - busy[:, 0]).sum() / whole.sum())


def main(argv: list[str] | None = None) -> int:
    def case(name: str, contest: Contest) -> None:
        makes = contenders(name, Sweep(), contest.device.device)
        measure(contest, name, makes, BLOCKS[name])

    cases = {name: functools.partial(case, name) for name in BLOCKS}
    return run("blocks", __doc__, cases, PLAN, argv)


if __name__ == "__main__":
    sys.exit(main())
