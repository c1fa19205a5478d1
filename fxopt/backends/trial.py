"""Run a graph beside the module's own forward, on the inputs of one call, leaving no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.backends.calls import Call
from fxopt.backends.collectives import Collectives, has_others
from fxopt.backends.failures import described
from fxopt.backends.host_random import HostRandom, of_generators
from fxopt.kernels.gathered import values_of
from fxopt.kernels.in_force import high_precision
from fxopt.recipe_errors import AttentionRefused

# Two roundings of one value differ by eps; a block chains a few dozen. Sums over tokens cancel in
# gradients, where a fault (a sign, a lost branch) shows as a difference of order one.
ROUNDINGS = 8
LEAST_TOLERANCE = 1e-4
CANCELLATION = 8
# Gradients that are smaller than this part of the largest one are rounding.
NEGLIGIBLE = 1e-3
DRAWS_ON_HOST = (
    "its forward draws random numbers from Python or NumPy, which would be constants in a graph: "
    "draw them with torch, or in the training loop"
)


@contextmanager
def aside() -> Iterator[None]:
    """Leave what surrounds a call as it is: dispatch modes, hooks on saved tensors (a checkpoint
    would recompute at our backward), autocast's cache, random numbers, grad mode."""
    cached = torch.is_autocast_cache_enabled()
    with (
        same_random_numbers(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        # A node that saves itself an output, as the same object, would hold itself for good.
        torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _itself),
    ):
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


def _itself(value: Any) -> Any:
    return value


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave the random state as it is found, on the host as well."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    on_host = HostRandom.now()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            on_host.restore()


def compare(
    module: nn.Module,
    own: Callable[..., Any],
    graph: Callable[..., Any],
    call: Call,
    trainable: Sequence[bool],
    collectives: Collectives | None = None,
) -> str | None:
    """Why `graph` may not stand for `own`: another output, another gradient; None if it may.

    Args:
        module: whose parameters both read.
        trainable: for each leaf of the call, whether the graph gives it a gradient.
        collectives: learns whether `own` runs any. It is not run a third time then: whether it
            were is for each process another question.
    """
    if any(map(has_no_values, (*module.parameters(), *call.leaves))):
        return None
    collectives = collectives or Collectives()
    with collectives if has_others() else nullcontext():
        expected = _run(module, own, call, trainable)
    if expected.draws_on_host:
        return DRAWS_ON_HOST
    try:
        with high_precision():  # what a recipe rounds is no fault of the graph
            found = _run(module, graph, call, trainable)
    except AttentionRefused:  # what was asked for by name
        raise
    except Exception as error:
        return f"the graph does not run: {described(error)}"
    if any(map(has_no_values, (*found.values, *found.gradients))):
        return "the graph computes with a tensor that was there in its capture alone"
    eps = _coarsest(module, call, expected.values)
    if not _alike(expected.values, found.values, eps):
        return "the graph gives another result than the module"
    if _alike(expected.gradients, found.gradients, eps, CANCELLATION):
        return None
    # A key's bias, say, has no gradient but rounding: other roundings show how much that is.
    if not collectives.were_run:
        nudged = _run(module, own, call, trainable, nudge=eps).gradients
        if _alike(expected.gradients, found.gradients, eps, CANCELLATION, nudged):
            return None
    return "the graph gives another gradient than the module"


def has_no_values(t: Any) -> bool:
    if isinstance(t, torch._subclasses.FakeTensor):
        return True
    return isinstance(t, Tensor) and t.device.type == "meta"


@dataclass(frozen=True)
class _Results:
    """Outputs and whatever may have been written in place; gradients of inputs and parameters."""

    values: list[Any]
    gradients: list[Any]
    draws_on_host: bool


def copied(x: Tensor) -> Tensor:
    """A copy that is expanded where `x` is, by which attention tells what kind a mask is of."""
    if 0 not in x.stride():
        return x.clone()
    held = x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]
    return held.clone().expand(x.shape)


def _nudged(x: Tensor, eps: float) -> Tensor:
    """`x` with each element larger or smaller by one rounding, unless it is expanded."""
    if not eps or not x.is_floating_point() or 0 in x.stride():
        return x
    generator = torch.Generator(x.device).manual_seed(0)
    signs = 2 * torch.randint(0, 2, x.shape, generator=generator, device=x.device) - 1
    return x * (1 + eps * signs.to(x.dtype))


@contextmanager
def on_copies(module: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Copies of its parameters and buffers in their place; random numbers are left as they are."""
    parameters = {
        n: values_of(p).clone().requires_grad_(p.requires_grad)
        for n, p in module.named_parameters()
    }
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    copies = parameters | buffers
    with same_random_numbers(), _reparametrize_module(module, copies, tie_weights=True):
        yield parameters, buffers


def _run(
    module: nn.Module,
    forward: Callable[..., Any],
    call: Call,
    trainable: Sequence[bool],
    nudge: float = 0.0,
) -> _Results:
    inputs = [
        copied(_nudged(v.detach(), nudge)).requires_grad_(t and v.is_floating_point())
        if isinstance(v, Tensor)
        else v
        for v, t in zip(call.leaves, trainable, strict=True)
    ]
    # Copies, as leaves that require a gradient cannot be written.
    copies = [copied(v) if isinstance(v, Tensor) else v for v in inputs]
    args, kwargs = call.arguments(copies)
    with on_copies(module) as (parameters, buffers):
        before = HostRandom.now(), of_generators(module)
        outputs = pytree.tree_leaves(forward(*args, **kwargs))
        draws = (HostRandom.now(), of_generators(module)) != before
    values = [*outputs, *copies, *buffers.values()]
    wanted = [v for v in (*inputs, *parameters.values()) if _requires_grad(v)]
    outputs = [o for o in outputs if _requires_grad(o)]
    if not outputs or not wanted:
        return _Results(values, [], draws)
    weights = [
        torch.randn(
            o.shape,
            generator=torch.Generator(o.device).manual_seed(i),
            dtype=o.dtype,
            device=o.device,
        )
        for i, o in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return _Results(values, list(gradients), draws)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _coarsest(module: nn.Module, call: Call, values: Sequence[Any]) -> float:
    """The roundoff of the coarsest dtype in sight: what it rounds, wider results inherit."""
    dtypes = {t.dtype for t in (*module.parameters(), *call.leaves, *values) if _is_inexact(t)}
    dtypes |= {call.autocast.dtype} if call.autocast.dtype is not None else set()
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _alike(
    expected: Sequence[Any],
    found: Sequence[Any],
    eps: float,
    factor: float = 1.0,
    nudged: Sequence[Any] | None = None,
) -> bool:
    """Whether `found` is `expected` but for rounding, of which `nudged` is another draw."""
    if len(expected) != len(found):
        return False
    sizes = [_norm(e).item() for e in expected if _is_inexact(e)]
    largest = max(filter(math.isfinite, sizes), default=0.0)
    least = NEGLIGIBLE * largest if factor > 1 else 0.0
    tolerance = factor * max(ROUNDINGS * eps, LEAST_TOLERANCE)
    others = expected if nudged is None else nudged
    return all(
        _same(e, f, tolerance, least) or _is_rounding(e, f, n)
        for e, f, n in zip(expected, found, others, strict=True)
    )


def _is_rounding(expected: Any, found: Any, nudged: Any) -> bool:
    """Whether a value differs no more than one rounding of the inputs makes it differ."""
    if not all(map(_is_inexact, (expected, found, nudged))) or expected.shape != found.shape:
        return False
    noise = _norm(expected - nudged).item()
    return 0 < noise < math.inf and _norm(expected - found).item() <= CANCELLATION * noise


def _same(expected: Any, found: Any, tolerance: float, least: float) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return type(expected) is type(found) and bool(expected == found)
    if (expected.shape, expected.dtype, expected.requires_grad) != (
        found.shape,
        found.dtype,
        found.requires_grad,
    ):
        return False
    if not _is_inexact(expected):
        return bool((expected == found).all())
    if not torch.isfinite(expected).all():
        return True  # nothing to compare with
    return bool(_norm(expected - found) <= tolerance * _norm(expected).clamp(min=least))


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _norm(t: Tensor) -> Tensor:
    wide = torch.complex128 if t.is_complex() else torch.float64
    return torch.linalg.vector_norm(t.detach(), dtype=wide)
