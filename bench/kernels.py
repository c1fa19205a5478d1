"""`python -m bench.kernels`: how close is each op to the memory's limit, and who is faster?

On a CUDA device, caches cold: forward and backward of each op of `bench.ops`, as a share of the
copy bandwidth that this device reaches and against torch.compile of the eager ops, both timed in
turn; forward and backward together against eager and Liger. All are checked first. A torch.compile
that computes something else is shown as wrong, and timed again without what is known to break it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import rows
from bench.contest import NO_GPU, Contest, compiled, gpu, selected
from bench.ops import OPS, Function, Op, Shape
from fxopt.diagnose.devices import TorchDevice
from fxopt.diagnose.protocol import Plan, Step
from fxopt.diagnose.roofline import calibrate
from fxopt.diagnose.subjects import Make

SHAPES = [
    Shape(batch, tokens, features)
    for features, batch, tokens in itertools.product((1536, 3072, 5120), (1, 4), (4608, 32760))
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
# float64 copies of a dozen tensors of this many elements fit beside the rest.
LARGEST_EXACT = 1 << 27
AS_COMPILED = {"forward": 1.0, "backward": 1.5}
AS_LIGER = 1.2
WITHOUT = "torch.compile without mixed-order reductions"


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


@contextlib.contextmanager
def repeatable_backward() -> Iterator[None]:
    """Compiled graphs whose backward may run more than once."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def measure(
    contest: Contest,
    op: Op,
    shape: Shape,
    bandwidth: float,
    dtype: torch.dtype = torch.bfloat16,
    compiled: Callable[..., Function] = compiled,
) -> None:
    """All comparisons of one op at one shape.

    Args:
        bandwidth: bytes/s of a copy, read and written, on this device.
        compiled: gives the compiled form of a function; takes `mixed_order`.
    """
    case = f"{op.name}, {shape.name}"
    device = contest.device.device
    size = next(iter(op.inputs(shape, torch.device("meta"), dtype).values())).numel()
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
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    rows.add_arguments(parser)
    parser.add_argument("--save", action="store_true", help="write to bench/results/ as well")
    parser.add_argument("--only", default="", metavar="NAME", help="ops whose name contains NAME")
    parser.add_argument("--shape", default="", metavar="NAME", help='such as "S=4608 D=3072"')
    args = parser.parse_args(argv)
    names = selected([op.name for op in OPS], args.only)
    shapes = selected([shape.name for shape in SHAPES], args.shape)
    cuda = gpu()
    if cuda is None:
        return NO_GPU
    contest = Contest(TorchDevice(cuda), PLAN)
    peaks = calibrate(contest.device, {"bfloat16"})
    contest.add("device", "copy bandwidth [GB/s]", peaks.bandwidth / 1e9)
    contest.add("device", "bfloat16 product [TFLOP/s]", peaks.flops["bfloat16"] / 1e12)
    chosen = [(o, s) for o in OPS for s in SHAPES if o.name in names and s.name in shapes]
    with repeatable_backward():
        for index, (op, shape) in enumerate(chosen, start=1):
            print(f"[{index}/{len(chosen)}] {op.name}, {shape.name}", file=sys.stderr)
            measure(contest, op, shape, peaks.bandwidth)
            torch.compiler.reset()
            if args.save:
                contest.save("kernels")
    return rows.publish(args, contest.found, cuda, contest.samples)


if __name__ == "__main__":
    sys.exit(main())
