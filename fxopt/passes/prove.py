"""Execution disposes: run the region and its replacement, compare values and gradients.

Two questions, asked on small random inputs and on adversarial ones (tiny, huge, zero):

1. Meaning. Both in float64, every dtype inside raised to float64: equal to 1e-6, gradients
   included. A wrong dim, sign, eps or missing +1 is off by far more on at least one input.
2. Numerics. Both in their own dtypes: the replacement's error against float64 is at most twice
   the region's own.

Verdicts are cached by what was run, so that 57 identical blocks are proved once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxopt.passes import ir

# float64 against float64 differs by rounding times condition (1e-10); constants that users write
# with eight digits (0.79788456) differ by 1e-8. A wrong eps shows as 1e-2 on the tiny inputs.
MEANING_TOLERANCE = 1e-6
ERROR_FACTOR = 2.0
# Gradients that cancel to nothing (a saturated softmax) are rounding of what cancelled. In float64
# they are compared with this part of it at least.
CANCELLED = 1e-3
# Factor on the activations: eps decides at 1e-3, overflow of squares in half precision at 1e3.
SCALES = (1.0, 1e-3, 1e3, 0.0)
# From 3: of two keys a mask leaves one, whose softmax is exactly 1. Eager then has no error that
# another kernel's could be measured by.
SMALL_SIZES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)

_RAISED = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_verdicts: dict[str, str | None] = {}


@dataclass(frozen=True)
class Runnable:
    """A graph over placeholders, run by interpretation; `root` holds the constants it reads."""

    root: torch.nn.Module
    graph: fx.Graph

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        out = fx.Interpreter(self.root, graph=self.graph).run(*inputs)
        return tuple(out)

    @property
    def reads_constants(self) -> bool:
        return bool(self.graph.find_nodes(op="get_attr", sort=False))

    def describe(self) -> str:
        index = {n: f"%{i}" for i, n in enumerate(self.graph.nodes)}
        return "\n".join(
            f"{n.op} {n.target if n.op == 'call_function' else ''} "
            f"{map_arg((n.args, n.kwargs), lambda a: index[a])}"
            for n in self.graph.nodes
        )


class Sizes:
    """Concrete values for the symbolic sizes of a graph: small ones, and those that are given.

    Args:
        nodes: of the graph.
        given: values of symbols, where the capture allows them.
    """

    def __init__(self, nodes: Iterable[fx.Node], given: Mapping[Any, int] | None = None) -> None:
        symbols: set[Any] = set()
        fixed: set[int] = set()
        shape_env: Any = None
        for node in nodes:
            for size in self._sizes(node.meta.get("val")):
                symbols |= getattr(ir.expression(size), "free_symbols", set())
                fixed |= {size} if isinstance(size, int) else set()
                shape_env = size.node.shape_env if isinstance(size, torch.SymInt) else shape_env
        names = sorted(symbols, key=str)
        # As many tokens as heads would leave open which dim is which.
        free = [size for size in SMALL_SIZES if size not in fixed]
        self.values: dict[Any, int] = dict(zip(names, itertools.cycle(free), strict=False))
        self.values |= given or {}
        # A size that the capture tied to a number (a table as wide as a head), or to another (no
        # more samples than a table has), keeps its own value.
        for guard in shape_env.guards if shape_env is not None else ():
            tied = shape_env.replace(guard.expr)
            met = tied.subs(self.values)
            if met == sympy.false or (isinstance(tied, sympy.Eq) and met != sympy.true):
                for symbol in tied.free_symbols & symbols:
                    self.values[symbol] = int(shape_env.backed_var_to_val[symbol])

    @staticmethod
    def _sizes(val: Any) -> Sequence[Any]:
        return tuple(val.shape) if isinstance(val, torch.Tensor) else (val,)

    def __call__(self, size: Any) -> int:
        expression = ir.expression(size)
        return expression if isinstance(expression, int) else int(expression.subs(self.values))


def prove(region: Runnable, replacement: Runnable, specs: Sequence[Spec]) -> str | None:
    """None if `replacement` may stand for `region`; otherwise why not."""
    if region.reads_constants or replacement.reads_constants:
        return _judge(region, replacement, specs)  # their values are not part of the key
    key = "\n".join((region.describe(), replacement.describe(), repr(specs)))
    if key not in _verdicts:
        _verdicts[key] = _judge(region, replacement, specs)
    return _verdicts[key]


def _judge(region: Runnable, replacement: Runnable, specs: Sequence[Spec]) -> str | None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU alone: no other is put back
        try:
            return _prove(region, replacement, specs)
        except Exception as error:  # a guess that cannot even run is a wrong guess
            first = str(error).partition("\n")[0]
            return f"it does not run on a probe: {type(error).__name__}: {first}"


@dataclass(frozen=True)
class Spec:
    """What a probe input looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    def sample(self, scale: float) -> torch.Tensor:
        if self.dtype == torch.bool:
            value = torch.rand(self.shape) > 0.3
            if self.shape and self.shape[-1] > 1:
                # Both values in each row: what is masked whole has no defined attention.
                value[..., :1], value[..., -1:] = True, False
            return value
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            return torch.randint(0, 2, self.shape, dtype=self.dtype)
        raised = _RAISED.get(self.dtype, self.dtype)
        # The offset keeps means away from zero: a LayerNorm is then no RMSNorm.
        return torch.randn(self.shape, dtype=raised) * scale + 0.3 * scale


def _prove(region: Runnable, replacement: Runnable, specs: Sequence[Spec]) -> str | None:
    region64, replacement64 = raised(region), raised(replacement)
    largest = max(torch.Size(s.shape).numel() for s in specs)
    for scale in SCALES:
        inputs = [
            s.sample(scale if 2 * torch.Size(s.shape).numel() >= largest else 1.0) for s in specs
        ]
        # Probes hold what the model's own dtype can hold.
        inputs = [
            x.to(s.dtype).to(x.dtype) if x.is_floating_point() else x
            for x, s in zip(inputs, specs, strict=True)
        ]
        truth = _values_and_gradients(region64, inputs, specs)
        found = _values_and_gradients(replacement64, inputs, specs)
        sizes = _least_sizes(truth, inputs, specs)
        rounding = _rounding(inputs) / MEANING_TOLERANCE
        for name, a, b, size in zip(_names(truth, specs), truth, found, sizes, strict=True):
            difference = _difference(a, b, max(CANCELLED * size, rounding) if size else 0.0)
            if not difference <= MEANING_TOLERANCE:
                return f"{name} differs by {difference:.2g} in float64 on inputs of scale {scale:g}"
        if scale != 1.0:
            continue
        own = [x.to(s.dtype) for x, s in zip(inputs, specs, strict=True)]
        eager = _values_and_gradients(region, own, specs)
        ours = _values_and_gradients(replacement, own, specs)
        for name, t, e, o, size in zip(
            _names(truth, specs), truth, eager, ours, sizes, strict=True
        ):
            if e.dtype != o.dtype:
                return f"{name} is {o.dtype}, not {e.dtype}"
            bound = ERROR_FACTOR * _error(t, e, size) + torch.finfo(e.dtype).eps
            if not _error(t, o, size) <= bound:
                return f"{name}: error {_error(t, o, size):.2g}, above {bound:.2g} (twice eager's)"
    return None


def _values_and_gradients(
    run: Callable[..., tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor],
    specs: Sequence[Spec],
) -> list[torch.Tensor]:
    leaves = [
        x.detach().clone().requires_grad_(s.needs_grad) for x, s in zip(inputs, specs, strict=True)
    ]
    with torch.enable_grad():
        outputs = run(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    roots = [o for o in outputs if o.requires_grad]
    gradients: Sequence[torch.Tensor | None] = ()
    if wanted and roots:
        generator = torch.Generator().manual_seed(1)
        seeds = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)
            for o in roots
        ]
        gradients = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
    filled = [
        g if g is not None else torch.zeros_like(x)
        for g, x in zip(gradients or [None] * len(wanted), wanted, strict=True)
    ]
    return [t.detach() for t in (*outputs, *filled)]


def _names(found: Sequence[torch.Tensor], specs: Sequence[Spec]) -> list[str]:
    gradients = [f"the gradient of input {i}" for i, s in enumerate(specs) if s.needs_grad]
    values = [f"output {i}" for i in range(len(found) - len(gradients))]
    return values + gradients


def _least_sizes(
    truth: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], specs: Sequence[Spec]
) -> list[float]:
    """What each result is at least made of: a gradient of outputs per input, or of ones."""
    wanted = [x for x, s in zip(inputs, specs, strict=True) if s.needs_grad]
    outputs = truth[: len(truth) - len(wanted)]
    largest = max(_size(o) for o in outputs)
    per_input = [largest / _size(x) if _size(x) else 1.0 for x in wanted]
    return [0.0] * len(outputs) + per_input


def _rounding(inputs: Sequence[torch.Tensor]) -> float:
    """What may be left in float64 of a gradient whose parts, products of two inputs, cancel."""
    factors = [x for x in inputs if x.is_floating_point() or x.is_complex()]
    num_parts = max((size for x in factors for size in x.shape), default=1)
    largest = max(map(_size, factors), default=0.0)
    return torch.finfo(torch.float64).eps * num_parts * largest**2


def _size(x: torch.Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max().item()) if finite.numel() else 0.0


def _difference(truth: torch.Tensor, found: torch.Tensor, least_size: float) -> float:
    """Largest difference relative to the largest value; NaN and Inf must stand alike."""
    if truth.shape != found.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    t, f = (x.to(_RAISED.get(x.dtype, x.dtype)) for x in (truth, found))
    finite = torch.isfinite(t)
    if not torch.equal(finite, torch.isfinite(f)):
        return float("inf")
    t, f = t[finite], f[finite]
    if t.numel() == 0:
        return 0.0
    scale = max(t.abs().max().item(), least_size, torch.finfo(torch.float32).tiny)
    return float((t - f).abs().max().item() / scale)


def _error(truth: torch.Tensor, found: torch.Tensor, least_size: float) -> float:
    """Root mean square error relative to that of the values: the largest error of few is noise."""
    if truth.numel() == 0:
        return 0.0
    f = found.to(truth.dtype)
    size = max(torch.linalg.vector_norm(truth).item(), least_size * truth.numel() ** 0.5, 1e-30)
    return float(torch.linalg.vector_norm(truth - f).item() / size)


def raised(runnable: Runnable) -> Runnable:
    """The same graph with every floating-point dtype raised to double precision."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def raise_dtype(value: Any) -> Any:
        return _RAISED.get(value, value) if isinstance(value, torch.dtype) else value

    for node in runnable.graph.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        copy.args = pytree.tree_map(raise_dtype, copy.args)
        copy.kwargs = pytree.tree_map(raise_dtype, copy.kwargs)
        copies[node] = copy
    return Runnable(runnable.root, graph)
