"""`fxopt demo`: train a small FLUX through every door and show that nothing changed but the cost.

All runs start from the same weights and see the same images, noise and times in the same order.
They advance in lockstep, one step each in turn, so that their step times can be compared.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import fxopt
from fxopt.backends.dynamo import INNER
from fxopt.cli import Progress, quiet
from fxopt.errors import MissingPackage
from fxopt.report import Report

if TYPE_CHECKING:
    from fxopt.demo.training import Run, Scale

# Relative to eager's loss, at any step. fp32 rounding moves a run a little further from its twin
# with every step, whatever the cause: the run "reversed", eager with another order of its sums,
# shows how far. The growth is chaotic, hence the distance from what is measured to this bound.
LARGEST_GAP = 1e-3
# Steps whose mean is the loss at the end; a single batch of 32 is noisy.
NUM_LAST = 50
REPORT_EVERY = 10  # steps


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0, or 1 if the losses part, or 2 if something it needs is missing."""
    args = _parser().parse_args(argv)
    if args.inner == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        print(
            "fxopt demo: the compiled door hands its graph to Inductor, which needs a C++ "
            "compiler and found none of g++, clang++, c++; install one, or pass --inner aot_eager "
            "to run that graph without Inductor",
            file=sys.stderr,
        )
        return 2
    _require_packages()
    from fxopt.demo.training import Scale

    scale = Scale(num_steps=args.steps)
    with quiet():
        runs = build_runs(scale, args.inner, args.seed)
        return demonstrate(runs, scale, args.seed, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxopt demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, noise and times")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of what it writes")
    parser.add_argument(
        "--inner", choices=INNER, default="inductor", help="compiler under the compiled door"
    )
    return parser


def _require_packages() -> None:
    import importlib.util

    for package, name in (
        ("diffusers", "diffusers"),
        ("scikit-learn", "sklearn"),
        ("matplotlib", "matplotlib"),
        ("pydantic", "pydantic"),
        ("rich", "rich"),
    ):
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(package, "the demo", "demo")


def build_runs(scale: Scale, inner: str, seed: int) -> list[Run]:
    """One run per door on copies of one model, and two without a door to compare with."""
    from fxopt.backends.dynamo import backend
    from fxopt.demo.training import Run, build_model

    def compiled(model: nn.Module) -> nn.Module:
        # By the function: its name is known where fxopt is installed, not in a tree of its source.
        return torch.compile(model, backend=backend, options={"inner": inner})  # type: ignore[return-value]

    doors: dict[str, Callable[[nn.Module], nn.Module] | None] = {
        "eager": None,
        "reversed": None,
        "optimize": fxopt.optimize,
        "compile": compiled,
        "swap": fxopt.swap,
    }
    model = build_model(scale, seed)
    return [
        Run(name, copy.deepcopy(model), door, scale, backwards=name == "reversed")
        for name, door in doors.items()
    ]


def demonstrate(runs: Sequence[Run], scale: Scale, seed: int, out: Path) -> int:
    """Train, print the table, write the files to `out`; 0, or 1 if the losses part."""
    from fxopt.demo.claim import claim_record
    from fxopt.demo.pictures import draw_losses, draw_samples
    from fxopt.demo.training import NUM_CLASSES, batches, load_images, sample, unpack
    from fxopt.diagnose import record, tables

    num_parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(
        f"FLUX with {scale.num_double} double and {scale.num_single} single blocks, "
        f"{num_parameters / 1e6:.1f} million parameters; digits of 8x8 pixels; "
        f"{scale.num_steps} steps of {scale.batch} images, each in {len(runs)} runs in turn"
    )
    train(runs, scale, seed)
    reports = {run.name: fxopt.report(run.forward) for run in runs if run.door}
    last_batch = next(batches(scale, seed + 1))
    memory = {run.name: run.memory(last_batch) for run in runs}
    print_table(runs, reports, {name: found.peak for name, found in memory.items()})

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(reports["optimize"].html(), encoding="utf-8")
    draw_losses(out / "loss.png", {run.name: run.losses for run in runs}, LARGEST_GAP)
    images, labels = load_images()
    firsts = [int((labels == label).nonzero()[0]) for label in range(NUM_CLASSES)]
    rows = {"real": unpack(images[firsts])}
    draw_samples(out / "samples.png", rows | {run.name: sample(run.model, seed) for run in runs})
    claims = claim_record(runs, scale, seed, reports, memory, LARGEST_GAP)
    record.write(claims, out / "claim.json")
    print(tables.text(record.read(out / "claim.json")))
    print(f"wrote {out}/report.html, {out}/loss.png, {out}/samples.png and {out}/claim.json")
    wrong = any(claim.verdict and claim.verdict.label == "INVALID" for claim in claims.claims)
    return verdict(runs) or int(wrong)


def train(runs: Sequence[Run], scale: Scale, seed: int) -> None:
    """Train all runs in lockstep."""
    from fxopt.demo.training import batches

    progress = Progress()
    for index, batch in enumerate(batches(scale, seed)):
        # First and last in turn, so that a drift of the machine's speed falls on all alike.
        for run in runs if index % 2 == 0 else reversed(runs):
            if index == 0:
                progress(0, scale.num_steps, f"steps; {run.name}: set-up and first step;")
                run.open()
            run.step(batch)
        if (index + 1) % REPORT_EVERY == 0 or index + 1 == scale.num_steps:
            loss = runs[0].losses[-1]
            progress(index + 1, scale.num_steps, f"steps; loss {loss:.4f};")


def largest_gap(run: Run, expected: Run) -> float:
    """Largest relative distance of two runs' losses at one step; NaN if any loss is."""
    found, wanted = torch.tensor(run.losses), torch.tensor(expected.losses)
    return float(((found - wanted).abs() / wanted).max())


def print_table(runs: Sequence[Run], reports: dict[str, Report], peaks: dict[str, int]) -> None:
    """What was rewritten, and what each run gives and costs next to eager."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    eager = runs[0]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    counts = {name: report.counts() for name, report in reports.items()}
    table.add_row("rewrites")
    for rule in dict.fromkeys(rule for found in counts.values() for rule in found):
        cells = [str(counts[r.name].get(rule, 0)) if r.name in counts else "" for r in runs]
        table.add_row(f"  {rule}", *cells)
    metrics: dict[str, Callable[[Run], str]] = {
        f"loss, last {NUM_LAST} steps": lambda run: (
            f"{statistics.fmean(run.losses[-NUM_LAST:]):.4f}"
        ),
        "largest gap in loss": lambda run: f"{largest_gap(run, eager):.0e}",
        "step time / eager's": lambda run: f"{step_time_ratio(run, eager):.2f}",
        "peak memory / eager's": lambda run: f"{peaks[run.name] / peaks[eager.name]:.2f}",
        "peak memory, MB": lambda run: f"{peaks[run.name] / 1e6:.1f}",
        "set-up, first step, s": lambda run: f"{run.setup_seconds:.1f}",
    }
    for label, metric in metrics.items():
        table.add_row(label, *map(metric, runs))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        "reversed: eager once more, each batch fed last sample first, which "
        "only reorders sums.\nPeak memory: most bytes that the allocator held in one forward and "
        "backward, beyond weights and optimizer state.",
        highlight=False,
    )


def step_time_ratio(run: Run, expected: Run) -> float:
    """Median over the steps after the first of the run's time by the other's in the same round."""
    pairs = zip(run.seconds[1:], expected.seconds[1:], strict=True)
    return statistics.median(seconds / baseline for seconds, baseline in pairs)


def verdict(runs: Sequence[Run]) -> int:
    """Say whether the losses stayed together; the exit code."""
    eager, *others = runs
    parted = [run for run in others if not largest_gap(run, eager) <= LARGEST_GAP]
    for run in parted:
        print(
            f"MISSED: the losses of {run.name!r} part from eager's by "
            f"{largest_gap(run, eager):.1%}, more than {LARGEST_GAP:.1%}"
        )
    if not parted:
        print(f"holds: no run's loss parts from eager's by more than {LARGEST_GAP:.1%} at any step")
    return int(bool(parted))
