"""Delayed scaling, node by node: bits of an emulation that is written here, step by step."""

from __future__ import annotations

import gc
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.gemms import GEMMS
from fxopt.kernels import delayed
from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.recipe_errors import Saturated, StepChanged
from fxopt.recipes import RECIPES, Gemm, Phase, Recipe, gemm
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


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_scales_are_rounded_as_the_recipe_says(scale: str) -> None:
    def scaled(product: Gemm | None) -> Gemm:
        assert product is not None
        return replace(
            product, a=replace(product.a, scale=scale), b=replace(product.b, scale=scale)
        )

    case, emulation = Case(linears), Emulation(N, pow2=scale == "pow2")
    recipe = replace(DELAYED, **{name: scaled(getattr(DELAYED, name)) for name in GEMMS})
    for step in range(4):
        assert same(case.run(recipe, step), case.expected(emulation, step))
        emulation.advance()


# Decibel below the result in the model's dtype: output, gradient of x, of the weight; by what x and
# gradients are of their size in the steps before. Measured on this case, less 1. A sixteenth keeps
# the precision, as most values stay normal numbers; of 1/2048 most are e4m3's subnormal ones.
FLOORS = {1: (26, 23, 23), 1 / 16: (26, 23, 23), 1 / 2048: (13, 23, 12)}


@pytest.mark.parametrize("fallen_to, floors", FLOORS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_signal_to_noise(dtype: torch.dtype, fallen_to: float, floors: tuple[int, ...]) -> None:
    case = Case(linears, dtype)
    for step in range(3):
        factor = fallen_to if step == 2 else 1.0
        x, grad = draw(2, 5, 48, seed=step) * factor, draw(2, 5, 32, seed=9 + step) * factor
        case.at = lambda *_, x=x, grad=grad: (x.to(dtype).requires_grad_(), grad.to(dtype))
        found = case.run(DELAYED, step)
    with high_precision():
        plain = case.run(DELAYED, 2)
    for f, p, floor in zip(found, plain, floors, strict=True):
        noise = (f.double() - p.double()).norm() / p.double().norm()
        assert -20 * noise.log10() > floor, -20 * noise.log10()


@pytest.mark.parametrize(
    "without", [("fprop",), ("dgrad",), ("wgrad",), ("fprop", "dgrad")], ids=str
)
@nodes
def test_some_gemms_alone(node: Node, without: tuple[str, ...]) -> None:
    """Who meets the same tensors again scales as by itself."""
    case = Case(node)
    x, grad = case.at(0)
    case.at = lambda *_: (x.detach().requires_grad_(), grad)
    some: dict[str, Any] = dict.fromkeys(without)
    current = case.run(replace(FP8, **some), 0)
    for step in range(3):
        assert same(case.run(replace(DELAYED, **some), step), current)
    case.at = lambda *_: ((x.detach() * 1.5).requires_grad_(), grad * 1.5)
    changed = case.run(replace(DELAYED, **some), 3)
    assert not same(changed, case.run(replace(FP8, **some), 3))


@nodes
def test_micro_batches_of_a_step_share_its_scales(node: Node) -> None:
    case, emulation = Case(node), Emulation(N)
    for step in range(4):
        for batch in range(3):
            found = case.run(DELAYED, step, batch)
            assert same(found, case.expected(emulation, step, batch)), (step, batch)
        emulation.advance()


@pytest.mark.parametrize("is_reentrant", [False, True])
@nodes
def test_checkpoints(node: Node, is_reentrant: bool) -> None:
    case, emulation = Case(node), Emulation(N)

    def block(x: Tensor) -> Tensor:
        return node(x, case.weight, DELAYED.key)

    for step in range(4):
        x, grad = case.at(step)
        with fxopt.at_step(step):
            y = checkpoint(block, x, use_reentrant=is_reentrant)
            y.backward(grad)
        assert same([y.detach(), x.grad, case.weight.grad], case.expected(emulation, step)), step
        case.weight.grad = None
        emulation.advance()


@nodes
def test_weights_that_are_gathered_as_codes_scale_by_themselves(node: Node) -> None:
    """Whether they are gathered or not."""
    case, emulation, recipe = Case(node), Emulation(N), replace(DELAYED, all_gather="fp8")
    for step in range(2 * N):
        emulation.past.pop("w", None)
        assert same(case.run(recipe, step), case.expected(emulation, step)), step
        case.change_weight(step)
        emulation.advance()


def test_a_checkpoint_of_another_step_is_an_error() -> None:
    case = Case(linears)
    with fxopt.at_step(0):
        x, grad = case.at(0)
        y = checkpoint(linears, x, case.weight, DELAYED.key, use_reentrant=False)
    with pytest.raises(StepChanged), fxopt.at_step(1):
        y.backward(grad)


@nodes
def test_a_forward_without_gradients_leaves_no_trace(node: Node) -> None:
    case, emulation = Case(node), Emulation(N)
    for step in range(4):
        for batch in (7, 8):  # before and after the training of the step
            x, _ = case.at(step, batch)
            seen = {name: list(values) for name, values in emulation.seen.items()}
            expected = case.expected(emulation, step, batch)[0]
            emulation.seen = defaultdict(list, seen)
            mode = torch.inference_mode() if batch == 7 else torch.no_grad()
            with mode, fxopt.at_step(step):
                assert torch.equal(node(x.detach(), case.weight, DELAYED.key), expected)
            if batch == 7:  # the training moves on, and no validation before it
                emulation.advance()
                assert same(case.run(DELAYED, step), case.expected(emulation, step))


def test_two_calls_of_a_shared_weight_share_its_lines() -> None:
    case, emulation = Case(linears), Emulation(N)
    for step in range(3):
        (x, grad), (other, other_grad) = case.at(step), case.at(step, batch=5)
        with fxopt.at_step(step):
            ys = [linears(t, case.weight, DELAYED.key) for t in (x, other)]
            found = torch.autograd.grad(ys, [x, other], [grad, other_grad])
        expected = [case.expected(emulation, step), case.expected(emulation, step, batch=5)]
        assert all(torch.equal(y, e[0]) for y, e in zip(ys, expected, strict=True))
        assert same(list(found), [e[1] for e in expected])
        emulation.advance()


@nodes
def test_the_backward_scales_as_its_forward(node: Node) -> None:
    """One that comes after the forward of the next step, whose scales are others."""
    case, emulation = Case(node), Emulation(N)
    for step in range(2):
        case.run(DELAYED, step)
        case.expected(emulation, step)
        emulation.advance()
    expected = case.expected(emulation, 2)
    x, grad = case.at(2)
    with fxopt.at_step(2):
        y = node(x, case.weight, DELAYED.key)
    with fxopt.at_step(3), torch.no_grad():
        node(*case.at(3)[:1], case.weight, DELAYED.key)
    found = [y.detach(), *torch.autograd.grad(y, [x, case.weight], grad)]
    assert same(found, expected)


@nodes
def test_what_is_larger_saturates_and_is_told(node: Node) -> None:
    case = Case(node)
    x, grad = case.at(0)
    case.at = lambda step, *_: ((x.detach() * 3.0 ** (step == 1)).requires_grad_(), grad)
    for step in range(2):
        y, *gradients = case.run(DELAYED, step)
    emulation = Emulation(N)
    case.expected(emulation, 0)
    emulation.advance()
    assert same([y, *gradients], case.expected(emulation, 1))
    assert all(t.isfinite().all() for t in (y, *gradients))
    # Nothing waits for the step that saturates: it is read at the end of the one behind it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run(DELAYED, 2)
    message = "'delayed': [1-3] operands had values larger than the largest of the 3 steps before"
    with pytest.warns(Saturated, match=message) if node is not norm else nullcontext():
        case.run(DELAYED, 3)


# By what factor x may grow before the largest of it would be rounded to more than the largest value
# of the format: 464 lies between e4m3's 448 and what would be 480, 61440 between e5m2's 57344 and
# 65536. x is 1.5 at the largest before, of which powers of two make 384 and 49152.
GROWTH = {
    "e4m3/tensor/fp32": 464 / 448,
    "e5m2/tensor/fp32": 61440 / 57344,
    "e4m3/tensor/pow2": 464 / 384,
    "e5m2/tensor/pow2": 61440 / 49152,
}


@pytest.mark.parametrize("is_beyond", [False, True])
@pytest.mark.parametrize("of_wgrad", ["", "e4m3/tensor/pow2"])
@pytest.mark.parametrize("name", GROWTH)
def test_rounding_is_no_saturation(name: str, of_wgrad: str, is_beyond: bool) -> None:
    """What is told is what lost more than its rounding, in one of its copies."""
    other = "e4m3/tensor/fp32"
    growth = min(GROWTH[name], GROWTH[of_wgrad or name])
    products = {"fprop": gemm(name, other), "wgrad": gemm(other, of_wgrad or name)}
    case, recipe = Case(linears), replace(DELAYED, **products)
    x, grad = case.at(0)
    x = x.detach() / x.abs().max().item() * 1.5
    told = []
    for step in range(4):
        size = growth * (1.001 if is_beyond else 0.999) if step == 1 else 1.0
        with warnings.catch_warnings(record=True) as caught, fxopt.at_step(step):
            warnings.simplefilter("always")
            linears((x * size).requires_grad_(), case.weight, recipe.key).backward(grad)
        told += caught
    assert len(told) == is_beyond


def test_a_change_of_formats_changes_what_is_told() -> None:
    """A growth that e5m2 rounds off and e4m3 does not."""
    e5m2, factor = gemm("e5m2/tensor/fp32", "e4m3/tensor/fp32"), 1.05
    recipe = replace(DELAYED, history=1, wgrad=None, schedule=(Phase("fprop", 0, 3, e5m2),))
    case, told = Case(linears), []
    x, grad = case.at(0)
    for step in range(7):
        with warnings.catch_warnings(record=True) as caught, fxopt.at_step(step):
            warnings.simplefilter("always")
            grown = (x.detach() * factor**step).requires_grad_()
            linears(grown, case.weight, recipe.key).backward(grad)
        told += [(step, str(w.message).split("so far in ")[1].split()[0]) for w in caught]
    # That of step 3, two steps later, and then the second.
    assert told == [(5, "1"), (6, "2")]


def test_warnings_grow_rare() -> None:
    case, found = Case(linears), []
    for step in range(12):
        x, grad = case.at(0)
        grown = (x.detach() * 2.0**step).requires_grad_()
        with warnings.catch_warnings(record=True) as caught, fxopt.at_step(step):
            warnings.simplefilter("always")
            y = linears(grown, case.weight, replace(DELAYED, history=1).key)
            y.backward(grad)
        found += [str(w.message) for w in caught]
    told = [int(message.split("so far in ")[1].split()[0]) for message in found]
    assert told == [1, 2, 4, 8]


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@nodes
def test_what_is_not_finite_shows_once(node: Node, value: float) -> None:
    case, emulation = Case(node), Emulation(N)
    for step in range(5):
        if step != 2:
            assert same(case.run(DELAYED, step), case.expected(emulation, step))
            emulation.advance()
            continue
        x, grad = case.at(step)
        x.data[1, 2, 3] = value
        with fxopt.at_step(step):
            y = node(x, case.weight, DELAYED.key)
            y.backward(grad)
        assert y[1, 2].isnan().all() and y.isnan().sum() == y.shape[-1]
        assert case.weight.grad.isnan().any()
        # The weight and the gradient of the output were sound, and went into their histories.
        h = INPUTS[node](case.at(step)[0])
        emulation.run(h.detach(), case.weight.detach(), grad)
        del emulation.seen["x"]
        emulation.advance()


# A norm of nothing is zero, and has no gradient.
@pytest.mark.parametrize(
    "node, what",
    [(n, w) for n in INPUTS for w in ("x", "weight", "gradient") if (n, w) != (norm, "x")],
)
def test_what_was_zero_scales_by_itself(node: Node, what: str) -> None:
    """A gate that begins at zero: the first gradients that follow are not lost under a scale of 1.

    The host learns of a first magnitude that comes late one step later.
    """
    case, emulation = Case(node), Emulation(N)
    weight = case.weight.detach().clone()
    for step in range(5):
        x, grad = draw(2, 5, 48, seed=step), draw(2, 5, 32, seed=9 + step) * 1e-7
        is_zero = step < 2
        x, grad = x * (not (is_zero and what == "x")), grad * (not (is_zero and what == "gradient"))
        case.weight.data.copy_(weight * 1e-4 * (not (is_zero and what == "weight")))
        case.at = lambda *_, x=x, grad=grad: (x.clone().requires_grad_(), grad)
        found = case.run(DELAYED, step)
        past = emulation.past[what[0]]
        if step == 3:  # the first entry is known to the device alone
            emulation.past[what[0]] = []
        if is_zero:
            assert not found[0 if what != "gradient" else 1].any()
        expected = case.expected(emulation, step)
        assert is_zero or (same(found, expected) and all(t.any() for t in found)), step
        emulation.past[what[0]] = past
        emulation.advance()
