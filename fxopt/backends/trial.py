"""Run a graph beside the module's own forward, on the inputs of one call, leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.backends.calls import Call
from fxopt.backends.unseen import CannotCapture

# Two roundings of one value differ by eps; a block chains a few dozen. Sums over tokens cancel in
# gradients, where a fault (a sign, a lost branch) shows as a difference of order one.
ROUNDINGS = 8
LEAST_TOLERANCE = 1e-4
CANCELLATION = 8
# Gradients that are smaller than this part of the largest one are rounding.
NEGLIGIBLE = 1e-3


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
        torch.autograd.graph.saved_tensors_hooks(_itself, _itself),
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
    """Leave the random state as it is found."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def compare(
    module: nn.Module,
    own: Callable[..., Any],
    graph: Callable[..., Any],
    call: Call,
    trainable: Sequence[bool],
) -> None:
    """Raise CannotCapture unless `graph` gives the outputs and gradients of `own`.

    Args:
        module: whose parameters both read.
        trainable: for each leaf of the call, whether the graph gives it a gradient.
    """
    if any(map(_has_no_values, (*module.parameters(), *call.leaves))):
        return
    expected = _results(module, own, call, trainable)
    try:
        found = _results(module, graph, call, trainable)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise CannotCapture(f"the graph does not run: {first}") from error
    if not all(map(_agree, expected, found)):
        raise CannotCapture("the graph gives another result than the module")


def _has_no_values(t: Any) -> bool:
    if isinstance(t, torch._subclasses.FakeTensor):
        return True
    return isinstance(t, Tensor) and t.device.type == "meta"


def _results(
    module: nn.Module, forward: Callable[..., Any], call: Call, trainable: Sequence[bool]
) -> tuple[list[Any], list[Any]]:
    """Outputs with what was written in place, and gradients of inputs and parameters."""
    parameters = {
        n: p.detach().requires_grad_(p.requires_grad) for n, p in module.named_parameters()
    }
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    inputs = [
        v.detach().clone().requires_grad_(t and v.is_floating_point())
        if isinstance(v, Tensor)
        else v
        for v, t in zip(call.leaves, trainable, strict=True)
    ]
    # Copies, as leaves that require a gradient cannot be written.
    copies = [v.clone() if isinstance(v, Tensor) else v for v in inputs]
    args, kwargs = call.arguments(copies)
    with same_random_numbers(), _reparametrize_module(module, parameters | buffers):
        results = pytree.tree_leaves(forward(*args, **kwargs))
    results += copies + list(buffers.values())
    wanted = [v for v in (*inputs, *parameters.values()) if _requires_grad(v)]
    outputs = [r for r in results if _requires_grad(r)]
    with same_random_numbers():
        torch.manual_seed(0)
        weights = [torch.randn_like(o) for o in outputs]
    if not outputs or not wanted:
        return results, []
    return results, list(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _agree(expected: list[Any], found: list[Any]) -> bool:
    ...
