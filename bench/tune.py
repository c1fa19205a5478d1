"""`python -m bench.tune`: would other launch parameters be faster on this device?

Off-line, on a CUDA device, caches cold. For each kernel and number of features of `bench.kernels`,
each candidate of SPACES runs all ops that launch the kernel, at all row counts: it is checked, then
timed in turn with what `fxopt/kernels/triton_tables.py` says today. Of those that are never wrong
or slower, the one that gains most, by the geometric mean of its speedups, is printed as the row to
put in front of the kernel's table, on standard error, if it gains more than a margin. No file of
fxopt is written.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from bench.contest import Contest, run
from bench.kernels import LARGEST_EXACT, PLAN, SHAPES, passes
from bench.ops import OPS, Op, Shape
from fxopt.diagnose.protocol import Step
from fxopt.diagnose.verdict import MARGIN, Label, label
from fxopt.kernels import triton_tables
from fxopt.kernels.triton_tables import Row

# A tile has at least as many elements as columns. The backward of four sums keeps its rows: there
# the registers decide, which `bench.static` shows.
_ACTIVATION = {"tile": (1024, 2048, 4096), "columns": (256, 512, 1024), "num_warps": (4, 8)}
_ROPE = {"tile": (1024, 2048, 4096, 8192), "elements_per_thread": (8, 16, 32)}
SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "norm_modulate forward": {"num_warps": (1, 2, 4, 8, 16)},
    "norm_modulate backward": {"num_warps": (4, 8, 16), "pieces": (1, 2), "programs": (1, 2, 4, 8)},
    "qk_norm_rope forward": _ROPE,
    "qk_norm_rope backward": _ROPE | {"warps": (8, 16, 32)},
    "gated_activation forward": _ACTIVATION,
    "gated_activation backward": _ACTIVATION,
}
FEATURES = sorted({shape.features for shape in SHAPES})
Parameters = Mapping[str, int]


def candidates(kernel: str) -> list[dict[str, int]]:
    """Every combination of the kernel's space."""
    space = SPACES[kernel]
    return [dict(zip(space, each, strict=True)) for each in itertools.product(*space.values())]


@contextlib.contextmanager
def asking(answer: Callable[..., Parameters]) -> Iterator[None]:
    """Have `answer(kernel, num_features, num_rows, x)` in place of the tables."""
    tables = triton_tables.parameters
    triton_tables.parameters = answer
    try:
        yield
    finally:
        triton_tables.parameters = tables


def using(kernel: str, chosen: Parameters, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with these parameters of the kernel, and the tables' for all others."""
    tables = triton_tables.parameters

    def answer(name: str, *where: Any) -> Parameters:
        return chosen if name == kernel else tables(name, *where)

    def step() -> Any:
        with asking(answer):
            return run()

    return step


class Trial:
    """A pass of one op at one shape, to run with one candidate after the other.

    Attributes:
        today: what the kernel's table says.
        num_features, num_rows, capability: where it was asked.
    """

    def __init__(
        self, contest: Contest, kernel: str, op: Op, shape: Shape, dtype: torch.dtype
    ) -> None:
        self.contest, self.kernel = contest, kernel
        self.case = f"{kernel}: {op.name}, {shape.name}"
        device = contest.device.device
        inputs = op.inputs(shape, device, dtype)
        self.exact = next(iter(inputs.values())).numel() <= LARGEST_EXACT
        self.step: Step = getattr(passes(op.fused, inputs), kernel.split()[1])
        self.makes = [
            functools.partial(op.subject, function, "", shape, device, dtype)
            for function in (op.eager, op.fused)
        ]
        tables = triton_tables.parameters

        def note(name: str, num_features: int, num_rows: int, x: Tensor) -> Parameters:
            chosen = tables(name, num_features, num_rows, x)
            if name == kernel:
                self.today, self.num_features, self.num_rows = chosen, num_features, num_rows
                self.capability = triton_tables.capability_of(x)
            return chosen

        with asking(note):
            self.step()

    def is_right(self, candidate: Parameters) -> bool:
        """Values and gradients, in float64 where that fits."""
        eager, fused = self.makes
        check = functools.partial(self.contest.is_right, self.case, f"fxopt {candidate}")
        return using(self.kernel, candidate, lambda: check(eager, fused, self.exact))()

    def speedup(self, candidate: Parameters) -> float | None:
        """Over today's parameters; None if the candidate is wrong, slower or too large."""
        if candidate == self.today:
            return 1.0
        try:
            if not self.is_right(candidate):
                return None
        except (OutOfResources, PTXASError) as error:
            print(f"{self.case}: {candidate}: {error}", file=sys.stderr)
            return None
        steps = (using(self.kernel, chosen, self.step) for chosen in (self.today, candidate))
        found = self.contest.speedup(self.case, str(candidate), *steps)
        return None if label(found.low, found.high) is Label.SLOW else found.speedup


def tuned(
    contest: Contest,
    kernel: str,
    ops: Sequence[Op],
    shapes: Sequence[Shape],
    dtype: torch.dtype = torch.bfloat16,
) -> Row | None:
    """The row to put in front of the kernel's table, or None if no candidate gains.

    Args:
        ops: that launch the kernel.
        shapes: of one number of features.
    """
    gains: list[tuple[Parameters, list[float]]] = [(each, []) for each in candidates(kernel)]
    num_rows = []
    for shape, op in itertools.product(shapes, ops):
        trial = Trial(contest, kernel, op, shape, dtype)
        num_rows.append(trial.num_rows)
        for each in list(gains):
            found = trial.speedup(each[0])
            if found is None:
                gains.remove(each)
            else:
                each[1].append(found)
    means = [(statistics.geometric_mean(found), candidate) for candidate, found in gains]
    largest, best = max(means, key=lambda mean: mean[0], default=(1.0, {}))
    if largest <= 1 + MARGIN:
        return None
    padded = triton.next_power_of_2(trial.num_features)
    return Row(
        best,
        min_features=padded // 2 + 1,
        max_features=padded,
        min_rows=min(num_rows),
        capability=trial.capability,
    )


def search(contest: Contest, kernel: str, features: int) -> None:
    """Print the row for this kernel and number of features."""
    print(f"{len(candidates(kernel))} candidates", file=sys.stderr)
    ops = [op for op in OPS if op.name.startswith(f"{kernel.split()[0]}:")]
    shapes = [shape for shape in SHAPES if shape.features == features]
    row = tuned(contest, kernel, ops, shapes) or "as it is"
    print(f'"{kernel}", D={features}: {row}', file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    cases = {
        f"{kernel}, D={features}": functools.partial(search, kernel=kernel, features=features)
        for kernel, features in itertools.product(SPACES, FEATURES)
    }
    return run("tune", __doc__, cases, PLAN, argv)


if __name__ == "__main__":
    sys.exit(main())
