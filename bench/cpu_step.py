"""`python -m bench.cpu_step`: is any door slower than what it started from, on this CPU?

Forward and backward of small models through each door: optimize and swap against eager, the backend
against plain torch.compile. `fxopt.diagnose.protocol` times the two in rounds of A B B A, and the
speedup is the median over the rounds, with its bootstrap confidence interval.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fxopt
from bench import models, rows
from fxopt.backends.dynamo import backend
from fxopt.cli import quiet
from fxopt.diagnose.devices import this_device
from fxopt.diagnose.protocol import Plan, Samples
from fxopt.diagnose.protocol import measure as time_in_turn
from fxopt.diagnose.verdict import Regime, regime

CASES: dict[str, Callable[[], models.Example]] = {
    "flux": models.flux,
    # Wide enough for the arithmetic to take longer than the calls.
    "flux-512": lambda: models.flux(num_layers=2, num_heads=8, head_dim=64, side=32),
    "sd3.5": models.sd3,
    "wan": models.wan,
    "llama-eager": models.llama,
}
NO_SLOWER = 0.98
DECOMPOSED = 1.5  # of the door that fuses it, on a model with decomposed attention
# Losses of two runs of one step in fp32 differ by rounding: some thousand roundings of 6e-8.
SAME_LOSS = 1e-4

Step = Callable[[], torch.Tensor]


def stepper(model: nn.Module, through: Callable[..., Any], inputs: dict[str, Any]) -> Step:
    """A step of `model` called as `through`, from empty gradients."""

    def run() -> torch.Tensor:
        model.zero_grad()
        return models.step(through, inputs)

    return run


def measure(case: str, num_rounds: int, compiled: bool) -> Iterator[rows.Row]:
    """All comparisons on one model."""
    torch.manual_seed(0)
    model, inputs = CASES[case]()

    def through(door: Callable[[nn.Module], Callable[..., Any]]) -> Step:
        twin = copy.deepcopy(model)
        return stepper(twin, door(twin), inputs)

    eager = through(lambda twin: twin)
    target = DECOMPOSED if case == "llama-eager" else NO_SLOWER
    yield from report(case, "eager", "optimize", eager, through(fxopt.optimize), num_rounds, target)
    yield from report(case, "eager", "swap", eager, through(fxopt.swap), num_rounds, NO_SLOWER)
    if compiled:
        plain = through(torch.compile)
        ours = through(lambda twin: torch.compile(twin, backend=backend))
        yield from report(case, "torch.compile", "backend", plain, ours, num_rounds, NO_SLOWER)
        torch._dynamo.reset()


def report(
    case: str,
    baseline: str,
    candidate: str,
    before: Step,
    after: Step,
    num_rounds: int,
    target: float,
) -> Iterator[rows.Row]:
    """Rows of one comparison, once both steps are found to compute the same loss."""
    expected, found = float(before()), float(after())
    if not abs(found - expected) <= SAME_LOSS * abs(expected):
        raise RuntimeError(f"{case}: loss {expected} by {baseline}, but {found} by {candidate}")
    samples, plan = Samples(), Plan(max_rounds=num_rounds, seconds=float("inf"))
    time_in_turn(before, after, this_device("cpu"), plan, samples, lambda _: False)
    yield from as_rows(case, baseline, candidate, regime(samples, slice(None)), target)


def as_rows(
    case: str, baseline: str, candidate: str, found: Regime, target: float
) -> Iterator[rows.Row]:
    name = f"{candidate} vs {baseline}"
    yield rows.Row(case, f"{baseline} [ms]", 1e3 * found.baseline_s)
    yield rows.Row(case, f"{candidate} [ms]", 1e3 * found.candidate_s)
    yield rows.Row(case, f"{name}, speedup", found.speedup, at_least=target)
    yield rows.Row(case, f"{name}, 95% from", found.low)
    yield rows.Row(case, f"{name}, 95% to", found.high)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_step", description=__doc__)
    rows.add_arguments(parser)
    parser.add_argument("--only", default="", metavar="NAME", help="cases that contain NAME")
    parser.add_argument("--rounds", type=int, default=15, help="two runs of each (default: 15)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled door out")
    args = parser.parse_args(argv)
    selected = [case for case in CASES if args.only in case]
    if not selected:
        parser.error(f"no case contains {args.only!r}; there are {', '.join(CASES)}")
    table: list[rows.Row] = []
    for index, case in enumerate(selected, start=1):
        print(f"[{index}/{len(selected)}] {case}", file=sys.stderr)
        with quiet(), contextlib.redirect_stdout(sys.stderr):
            table += measure(case, args.rounds, compiled=not args.no_compile)
    return rows.publish(args, table)


if __name__ == "__main__":
    sys.exit(main())
