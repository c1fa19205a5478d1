"""`python -m bench.setup`: from opening a door to the end of the first step, on this CPU.

A FLUX-architecture model of 2, 8 and 24 layers: `fxopt.optimize(model)` and one forward and
backward, against `torch.compile(model)` and the same. Every measurement has a process of its own
and no cache on disk: nothing is warm, and what a door imports counts. Beside them stands the first
step with no door at all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

import fxopt
from bench import models, rows
from fxopt.cli import quiet

DEPTHS = (2, 8, 24)
DOORS: dict[str, Callable[..., object]] = {
    "eager": lambda model: model,
    "optimize": fxopt.optimize,
    "torch.compile": torch.compile,
}
NUM_REPEATS = 3  # of optimize; the others run once a depth
OVER_COMPILE = 0.1
DEEPEST_OVER_SHALLOWEST = 1.3
# torch.compile of 24 layers can take longer than all the rest; it is stopped here, and the ratio is
# then an upper bound of the true one.
TIME_LIMIT = 180.0  # seconds


def measure_here(door: str, depth: int) -> float:
    """Seconds to open `door` on a model of `depth` layers and take its first step, here."""
    torch.manual_seed(0)
    with quiet():
        model, inputs = models.flux(depth, num_heads=2, head_dim=32, side=4)
        start = time.perf_counter()
        models.step(DOORS[door](model), inputs)  # type: ignore[arg-type]
        return time.perf_counter() - start


def measure(door: str, depth: int, time_limit: float | None = None) -> float:
    """The same in a new process; infinite if it takes longer than `time_limit` seconds."""
    command = [sys.executable, "-m", "bench.setup", "--one", door, str(depth)]
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, timeout=time_limit, check=True
        )
    except subprocess.TimeoutExpired:
        return float("inf")
    return float(done.stdout.split()[-1])


def table(depths: Sequence[int], num_repeats: int, time_limit: float) -> Iterator[rows.Row]:
    """All rows; the compiled ones are left out at a `time_limit` of 0."""
    optimized: dict[int, float] = {}
    for depth in depths:
        case = f"flux, {depth} layers"
        print(case, file=sys.stderr)
        yield rows.Row(case, "eager [s]", measure("eager", depth))
        optimized[depth] = statistics.median(measure("optimize", depth) for _ in range(num_repeats))
        yield rows.Row(case, "optimize [s]", optimized[depth])
        if time_limit:
            yield from against_compile(case, depth, optimized[depth], time_limit)
    shallowest, deepest = min(depths), max(depths)
    yield rows.Row(
        f"flux, {deepest} / {shallowest} layers",
        "optimize",
        optimized[deepest] / optimized[shallowest],
        at_most=DEEPEST_OVER_SHALLOWEST,
    )


def against_compile(
    case: str, depth: int, optimized: float, time_limit: float
) -> Iterator[rows.Row]:
    compiled = measure("torch.compile", depth, time_limit)
    metric = "optimize / torch.compile"
    if compiled == float("inf"):
        print(f"{case}: torch.compile stopped after {time_limit:.0f} s", file=sys.stderr)
        compiled, metric = time_limit, f"{metric}, stopped: at most"
    else:
        yield rows.Row(case, "torch.compile [s]", compiled)
    yield rows.Row(case, metric, optimized / compiled, at_most=OVER_COMPILE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.setup", description=__doc__)
    rows.add_arguments(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="numbers of layers")
    parser.add_argument("--repeats", type=int, default=NUM_REPEATS, help="runs; the median counts")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT,
        help=f"seconds for one torch.compile (default: {TIME_LIMIT:.0f}); 0 leaves it out",
    )
    parser.add_argument("--one", nargs=2, metavar=("DOOR", "DEPTH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(measure_here(args.one[0], int(args.one[1])))
        return 0
    return rows.publish(args, list(table(args.depths, args.repeats, args.time_limit)))


if __name__ == "__main__":
    sys.exit(main())
