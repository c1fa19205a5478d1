"""What the benchmarks on a GPU share: is there one, who is right, who is faster."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench import rows
from fxopt.diagnose import numerics
from fxopt.diagnose.devices import TorchDevice
from fxopt.diagnose.environment import device_name
from fxopt.diagnose.protocol import Plan, Samples, Step, measure
from fxopt.diagnose.record import write_text
from fxopt.diagnose.roofline import calibrate
from fxopt.diagnose.subjects import Make
from fxopt.diagnose.verdict import Regime, regime

RESULTS = Path(__file__).parent / "results"
NO_GPU = 2  # exit code


@dataclass
class Contest:
    """Comparisons on one device; keeps what they found.

    Args:
        device: where all run.
        plan: how long each comparison takes.
        found: rows so far.
        samples: raw seconds of each comparison, [num_rounds, 4]: baseline, candidate, candidate,
            baseline.
    """

    device: TorchDevice
    plan: Plan
    found: list[rows.Row] = field(default_factory=list)
    samples: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s, read and written, of a copy on this device; measured once, with rows for it."""
        peaks = calibrate(self.device, {"bfloat16"})
        self.add("device", "copy bandwidth [GB/s]", peaks.bandwidth / 1e9)
        self.add("device", "bfloat16 product [TFLOP/s]", peaks.flops["bfloat16"] / 1e12)
        return peaks.bandwidth

    def race(self, case: str, name: str, baseline: Step, candidate: Step) -> Regime:
        """Time two steps in turn."""
        samples = Samples()
        measure(baseline, candidate, self.device, self.plan, samples, lambda _: False)
        self.samples[f"{case}: {name}"] = list(samples.rounds)
        return regime(samples, slice(None))

    def speedup(
        self,
        case: str,
        name: str,
        baseline: Step,
        candidate: Step,
        at_least: float | None = None,
    ) -> Regime:
        """`race`, with rows for the ratio of the times and its confidence interval."""
        found = self.race(case, name, baseline, candidate)
        self.add(case, f"{name}, speedup", found.speedup, at_least=at_least)
        self.add(case, f"{name}, 95% from", found.low)
        self.add(case, f"{name}, 95% to", found.high)
        self.add(case, f"{name}, candidate [us]", 1e6 * found.candidate_s)
        return found

    def is_right(
        self,
        case: str,
        who: str,
        baseline: Make,
        candidate: Make,
        exact: bool,
        tolerance: float | None = None,
    ) -> bool:
        """Compare values and gradients; adds a row with the number of wrong tensors.

        Args:
            exact: against float64 and the baseline's own error; else against the baseline.
            tolerance: largest relative error against the baseline; None for its dtype's.
        """
        truth = baseline if exact else None
        check = numerics.check("before", baseline(), candidate(), truth, 0, tolerance)
        mine = who.startswith("fxopt")
        self.add(case, f"{who}, wrong tensors", len(check.failures), at_most=0 if mine else None)
        for failure in check.failures:
            print(f"{case}: {who}: {failure}", file=sys.stderr)
        return not check.failures

    def add(
        self,
        case: str,
        metric: str,
        value: float,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        self.found.append(rows.Row(case, metric, value, at_most, at_least))

    def save(self, name: str, folder: Path) -> None:
        """Write what was found so far."""
        device = self.device.device
        kind = "".join(c if c.isalnum() else "_" for c in device_name(device).lower())
        text = rows.document(self.found, device, self.samples)
        write_text(text, folder / f"{name}_{kind}.json")


def gpu() -> torch.device | None:
    """The device, or None after saying that there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    print(
        "this benchmark needs a CUDA device and found none; nothing was measured or written",
        file=sys.stderr,
    )
    return None


def compiled(function: Callable[..., Any], mixed_order: bool = True) -> Callable[..., Any]:
    """`torch.compile` for these sizes alone, its strongest form.

    Args:
        mixed_order: whether Inductor may fuse reductions over rows and columns. There is an open
            report of wrong gradients: https://github.com/pytorch/pytorch/issues/193061
    """
    options = {} if mixed_order else {"triton.mix_order_reduction": False}
    return torch.compile(function, dynamic=False, options=options)


def selected(names: Iterable[str], only: Sequence[str]) -> list[str]:
    """Those that contain all of `only`; exits with 2 if there is none."""
    names = list(names)
    found = [name for name in names if all(part in name for part in only)]
    if not found:
        wanted = " and ".join(map(repr, only))
        print(f"no case contains {wanted}; there are {'; '.join(names)}", file=sys.stderr)
        raise SystemExit(2)
    return found


def run(
    name: str,
    about: str | None,
    cases: Mapping[str, Callable[[Contest], None]],
    plan: Plan,
    argv: Sequence[str] | None,
) -> int:
    """The command `python -m bench.<name>`: its cases one after the other, then all their rows.

    Returns: the exit code.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about)
    rows.add_arguments(parser)
    parser.add_argument(
        "--save", nargs="?", const=RESULTS, type=Path, metavar="FOLDER",
        help="write there as well, after every case; bench/results without a folder",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="after which no other case begins"
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PART", help="cases with all these in their name"
    )
    args = parser.parse_args(argv)
    chosen = selected(cases, args.only)
    device = gpu()
    if device is None:
        return NO_GPU
    contest, start = Contest(TorchDevice(device), plan), time.monotonic()
    for index, case in enumerate(chosen):
        if time.monotonic() - start > args.seconds:
            left = "; ".join(chosen[index:])
            print(f"{args.seconds:g} s are over; not run: {left}", file=sys.stderr)
            break
        print(f"[{index + 1}/{len(chosen)}] {case}", file=sys.stderr)
        _attempt(contest, case, cases[case])
        if args.save is not None:
            contest.save(name, args.save)
    return rows.publish(args, contest.found, device, contest.samples)


def _attempt(contest: Contest, case: str, measure: Callable[[Contest], None]) -> None:
    """Run a case; one that raises is a row that misses its target, and the next ones follow."""
    try:
        measure(contest)
    # Memory that is not there, a compiler that fails, a package that is not installed.
    except Exception:
        traceback.print_exc()
        contest.add(case, "errors", 1, at_most=0)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
