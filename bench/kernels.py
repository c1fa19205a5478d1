"""`python -m bench.kernels`: how close is each op to the memory's limit, and who is faster?

On a CUDA device, caches cold: forward and backward of each op of `bench.ops`, as a share of the
copy bandwidth that this device reaches and against torch.compile of the eager ops, both timed in
turn; forward and backward together against eager and Liger. All are checked first. A torch.compile
that computes something else is shown as wrong, and timed again without what is known to break it.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.contest import Contest, compiled, run
from bench.ops import OPS, Function, Op, Shape
from fxopt.diagnose.protocol import Plan, Step
from fxopt.diagnose.subjects import Make

# Those of FLUX and of Wan first, as time may be short.
SHAPES = [
    Shape(batch, tokens, features)
    for batch, tokens, features in sorted(
        itertools.product((1, 4), (4608, 32760), (3072, 5120, 1536)),
        key=lambda sizes: sizes not in ((1, 4608, 3072), (1, 32760, 5120)),
    )
]
PLAN = Plan(
    min_rounds=8,
    min_seconds=0.2,
    max_rounds=24,
    seconds=3.0,
    min_warmup=0.1,
    warmup_seconds=20.0,
    flush=True,
)
# float64 copies of a dozen tensors of this many elements fit beside the rest, and of three of the
# largest that are measured at all.
LARGEST_EXACT, LARGEST = 1 << 27, 1 << 30
AS_COMPILED = {"forward": 1.0, "backward": 1.5}
AS_LIGER = 1.2
WITHOUT = "torch.compile without mixed-order reductions"


def num_elements(op: Op, shape: Shape) -> int:
    """Of the op's first input."""
    return math.prod(next(iter(op.sizes(shape).values())))


@dataclass
class Passes:
    """Forward and backward of one function on its own inputs, as steps to time apart."""

    forward: Step
    backward: Step


def passes(function: Function, inputs: dict[str, Tensor]) -> Passes:
    """The backward starts from fixed random gradients and keeps the graph of one forward."""
    outputs = [t for t in tree_leaves(function(**inputs)) if isinstance(t, Tensor)]
    grads = [torch.randn_like(t) for t in outputs]
    wanted = [t for t in inputs.values() if t.requires_grad]

    def backward() -> Any:
        return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    return Passes(lambda: function(**inputs), backward)


# A graph that is compiled like this may run its backward more than once.
@torch._functorch.config.patch(donated_buffer=False)
def measure(
    contest: Contest,
    op: Op,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    compiled: Callable[..., Function] = compiled,
) -> None:
    """All comparisons of one op at one shape.

    Args:
        compiled: gives the compiled form of a function; takes `mixed_order`.
    """
    bandwidth = contest.bandwidth  # taken before the op fills the memory
    case = f"{op.name}, {shape.name}"
    device = contest.device.device
    size = num_elements(op, shape)
    exact = size <= LARGEST_EXACT

    def subject(function: Function, who: str) -> Make:
        return functools.partial(op.subject, function, who, shape, device, dtype)

    def is_right(who: str, function: Function) -> bool:
        return contest.is_right(case, who, eager, subject(function, who), exact)

    eager, fused = subject(op.eager, "eager ops"), subject(op.fused, "fxopt")
    is_right("fxopt", op.fused)
    peers = {"torch.compile": compiled(op.eager)}
    if not is_right("torch.compile", peers["torch.compile"]):
        peers[WITHOUT] = compiled(op.eager, mixed_order=False)
        is_right(WITHOUT, peers[WITHOUT])
    ours = passes(op.fused, op.inputs(shape, device, dtype))
    for name, function in peers.items():
        theirs = passes(function, op.inputs(shape, device, dtype))
        for which, target in AS_COMPILED.items():
            steps = getattr(theirs, which), getattr(ours, which)
            found = contest.speedup(case, f"{which} vs {name}", *steps, at_least=target)
            if name == "torch.compile":
                num_tensors = getattr(op, f"{which}_tensors")
                least_s = num_tensors * size * dtype.itemsize / bandwidth
                share, target = least_s / found.candidate_s, getattr(op, f"{which}_share")
                contest.add(case, f"{which}, share of copy bandwidth", share, at_least=target)
    contest.speedup(case, "both vs eager ops", eager(), fused())
    if op.liger is not None and find_spec("liger_kernel") is not None:
        is_right("Liger", op.liger)
        contest.speedup(case, "both vs Liger", subject(op.liger, "Liger")(), fused(), AS_LIGER)


def main(argv: list[str] | None = None) -> int:
    cases = {
        f"{op.name}, {shape.name}": functools.partial(measure, op=op, shape=shape)
        for shape in SHAPES
        for op in OPS
        if num_elements(op, shape) <= LARGEST
    }
    return run("kernels", __doc__, cases, PLAN, argv)


if __name__ == "__main__":
    sys.exit(main())
