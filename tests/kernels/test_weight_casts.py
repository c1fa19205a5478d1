"""cast_weights_once: one cast for all micro-batches, never a stale one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.kernels.quantize import quantize
from fxopt.kernels.quantize_group import quantize_mixed, quantize_rows
from fxopt.kernels.quantized_linears import quantized_linears

RECIPES = ["fp8_tensorwise", "fp8_rowwise", "mxfp8"]
WEIGHT = (32, 48)


class Case:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(2, 5, 48, requires_grad=True)
        self.weight = torch.nn.Parameter(torch.randn(WEIGHT))

    def run(self, recipe: str) -> list[Tensor]:
        (y,) = quantized_linears(self.x, [self.weight], [None], recipe, False)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [self.x, self.weight])]


@contextmanager
def casts() -> Iterator[list[Any]]:
    """Collect the casts of weights."""
    found: list[Any] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func in (quantize_rows, quantize_mixed) or (
                func is quantize and tuple(args[0].shape) == WEIGHT
            ):
                found.append(func)
            return func(*args, **(kwargs or {}))

    with Record():
        yield found


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_cast_and_the_same_bits(recipe: str) -> None:
    case = Case()
    expected = case.run(recipe)
    with casts() as found:
        case.run(recipe)
        case.run(recipe)
    assert len(found) == 4  # forward and backward, each time
    with casts() as found, fxopt.cast_weights_once():
        runs = [case.run(recipe) for _ in range(3)]
    assert len(found) == 1
    for each in runs:
        assert all(map(torch.equal, each, expected))


def test_a_write_is_seen() -> None:
    case = Case()
    with fxopt.cast_weights_once():
        before = case.run("fp8_rowwise")
        with torch.no_grad():
            case.weight.mul_(1.5)  # as an optimizer writes
        after = case.run("fp8_rowwise")
    assert not torch.equal(before[0], after[0])
    assert all(map(torch.equal, after, case.run("fp8_rowwise")))


class Uncounted(torch.optim.Optimizer):
    """Writes as foreign kernels do, and as FSDP gathers: PyTorch has no record of it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__([weight], {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.5)


def test_a_step_of_any_optimizer_empties_the_scope() -> None:
    case = Case()
    optimizer = Uncounted(case.weight)
    with fxopt.cast_weights_once():
        case.run("fp8_rowwise")
        version = case.weight._version
        optimizer.step()
        assert case.weight._version == version
        after = case.run("fp8_rowwise")
    assert all(map(torch.equal, after, case.run("fp8_rowwise")))


def test_another_storage_is_seen() -> None:
    case = Case()
    with fxopt.cast_weights_once():
        case.run("fp8_rowwise")
        case.weight.data = torch.randn(WEIGHT)
        after = case.run("fp8_rowwise")
    assert all(map(torch.equal, after, case.run("fp8_rowwise")))


def test_a_tensor_of_the_same_identity_is_another() -> None:
    """Gathered weights come and go; a new one may lie where an old one lay."""
    case = Case()
    with casts() as found, fxopt.cast_weights_once():
        for seed in range(20):
            weight = torch.randn(WEIGHT, generator=torch.Generator().manual_seed(seed))
            (y,) = quantized_linears(case.x, [weight], [None], "fp8_rowwise", False)
            case.weight.data.copy_(weight)
            del weight
            with torch.no_grad():
                case.weight.add_(0)
            assert torch.equal(y, case.run("fp8_rowwise")[0])
    assert len(found) == 40


def test_scopes_and_recipes_do_not_mix() -> None:
    case = Case()
    plain = {recipe: case.run(recipe) for recipe in RECIPES}
    with fxopt.cast_weights_once():
        for _ in range(2):
            for recipe in RECIPES:
                assert all(map(torch.equal, case.run(recipe), plain[recipe]))
    with casts() as found:
        case.run("fp8_rowwise")
    assert len(found) == 2


def test_a_backward_behind_the_scope_and_hooks_on_what_is_saved() -> None:
    case = Case()
    expected = case.run("fp8_rowwise")
    with (
        fxopt.cast_weights_once(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    ):
        (y,) = quantized_linears(case.x, [case.weight], [None], "fp8_rowwise", False)
    found = torch.autograd.grad(y.square().sum(), [case.x, case.weight])
    assert all(map(torch.equal, found, expected[1:]))


def test_a_checkpoint_saves_the_same_on_another_thread() -> None:
    """As a backward on CUDA runs it."""
    case, last = Case(), torch.nn.Parameter(torch.randn(16, 32))
    leaves = [case.x, case.weight, last]

    def two_linears(x: Tensor) -> Tensor:
        for weight in (case.weight, last):
            (x,) = quantized_linears(x, [weight], [None], "fp8_rowwise", False)
        return x

    expected = torch.autograd.grad(two_linears(case.x).square().sum(), leaves)
    with fxopt.cast_weights_once(), ThreadPoolExecutor(1) as other:
        y = checkpoint(two_linears, case.x, use_reentrant=False)
        found = other.submit(torch.autograd.grad, y.square().sum(), leaves).result()
    assert all(map(torch.equal, found, expected))


def test_nothing_is_kept_in_a_graph() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    case = Case()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return quantized_linears(x, [weight], [None], "fp8_rowwise", False)[0]

    with fxopt.cast_weights_once():
        case.run("fp8_rowwise")
        traced = make_fx(call)(case.x.detach(), case.weight)
    assert any(n.target is quantize_rows for n in traced.graph.nodes)
    weight = torch.randn(WEIGHT)
    assert torch.equal(traced(case.x, weight), call(case.x, weight))
