"""Delayed scaling, node by node: bits of an emulation that is written here, step by step."""

from __future__ import annotations

import gc
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel  # noqa: F401

import fxopt
from fxopt.kernels import delayed
from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.recipe_errors import Saturated
from fxopt.recipes import RECIPES, Recipe
from tests.kernels.test_in_force import (
    SETTINGS,
    activation,
    linears,
    linears_on_what_is_kept,
    nodes,
    norm,
)

FP8 = RECIPES["fp8"]
N = 3
DELAYED = replace(FP8, name="delayed", history=N)
Node = Callable[[Tensor, Tensor, str], Tensor]
# What each node quantizes.
INPUTS: dict[Node, Callable[[Tensor], Tensor]] = {
    linears: lambda x: x,
    linears_on_what_is_kept: lambda x: x,
    norm: lambda x: norm_modulate(x, *[None] * 7, *SETTINGS)[0],
    activation: lambda x: gated_activation(x, None, "gelu_tanh", "none"),
}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
E4M3, E5M2 = LARGEST


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    """Each test begins with parameters that nothing is known of, at steps from 0."""
    gc.collect()
    delayed._step = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Saturated)
        yield


class Emulation:
    """A linear under delayed scaling, in a few lines: its histories are lists of floats."""

    def __init__(self, num_steps: int, margin: int = 0, pow2: bool = False) -> None:
        self.past: dict[str, list[float]] = defaultdict(list)
        self.num_steps, self.margin, self.pow2 = num_steps, margin, pow2
        self.seen: dict[str, list[float]] = defaultdict(list)

    def advance(self) -> None:
        for name, values in self.seen.items():
            if max(values) > 0:
                self.past[name] = [max(values), *self.past[name]][: self.num_steps]
        self.seen.clear()

    def quantized(self, name: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values of the codes, and their scale."""
        own = x.abs().max().item()
        self.seen[name].append(own)
        amax = max(self.past[name], default=own / 2**self.margin) * 2**self.margin
        largest = LARGEST[dtype]
        factor = torch.tensor(largest) / torch.tensor(amax)
        if self.pow2:
            factor = 2.0 ** factor.log2().floor()
        return (x * factor).clamp(-largest, largest).to(dtype).float(), 1 / factor

    def run(self, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        """Output and gradients of x and weight."""
        x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        (xq, xs), (wq, ws) = self.quantized("x", x, E4M3), self.quantized("w", weight, E4M3)
        gq, gs = self.quantized("g", grad, E5M2)
        return [xq @ wq.T * xs * ws, gq @ wq * gs * ws, gq.T @ xq * gs * xs]


class Case:
    """A node whose tensors change their size by step."""

    def __init__(self, node: Node, dtype: torch.dtype = torch.float32) -> None:
        self.node, self.dtype = node, dtype
        self.weight = nn.Parameter(draw(32, 48).to(dtype))

    def at(self, step: int, batch: int = 0) -> tuple[Tensor, Tensor]:
        """x, and the gradient of the output."""
        size = (1.0, 4.0, 0.25, 8.0, 0.5, 0.25)[step % 6]
        x = draw(2, 5, 48, seed=10 * step + batch).to(self.dtype) * size
        return x.requires_grad_(), draw(2, 5, 32, seed=90 + step + batch).to(self.dtype) / size

    def run(self, recipe: Recipe, step: int, batch: int = 0) -> list[Tensor]:
        """Output, the gradient of what is quantized, and the weight's."""
        x, grad = self.at(step, batch)
        with fxopt.at_step(step):
            y = self.node(x, self.weight, recipe.key)
            return [y.detach(), *torch.autograd.grad(y, [x, self.weight], grad)]

    def change_weight(self, step: int) -> None:
        with torch.no_grad():
            self.weight.add_(draw(32, 48, seed=40 + step) / 4)

    def expected(self, emulation: Emulation, step: int, batch: int = 0) -> list[Tensor]:
        x, grad = self.at(step, batch)
        h = INPUTS[self.node](x)
        y, dh, dweight = emulation.run(h.detach(), self.weight.detach(), grad)
        (dx,) = torch.autograd.grad(h, x, dh.view_as(h)) if h.requires_grad else (dh.view_as(x),)
        return [y.view(2, 5, 32), dx, dweight]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("num_steps", [1, N])
@nodes
def test_bits_are_those_of_the_emulation(node: Node, num_steps: int, margin: int) -> None:
    case, emulation = Case(node), Emulation(num_steps, margin)
    recipe = replace(DELAYED, history=num_steps, margin=margin)
    for step in range(6):
        found, expected = case.run(recipe, step), case.expected(emulation, step)
        assert same(found, expected), step
        if step == 0 or (margin == 0 and step == 1):
            assert same(found, case.run(FP8, step)) == (step == 0)
        case.change_weight(step)
        emulation.advance()
