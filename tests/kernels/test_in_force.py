"""What is in force in a step, node by node: the bits of the recipe that has it throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.kernels.gated_activation_quantized_linear import gated_activation_quantized_linear
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.norm_modulate_quantized_linears import norm_modulate_quantized_linears
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.recipe_errors import ScheduleInGraph, StepChanged, StepNotTold
from fxopt.recipes import RECIPES, Phase, Recipe, gemm

CHANGE = 2
SETTINGS = ("layer", 1e-6, 0.0, 1.0, torch.float32, torch.float32)


def linears(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    return quantized_linears(x, [weight], [None], recipe, False)[0]


def linears_on_what_is_kept(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    return quantized_linears(x, [weight], [None], recipe, True)[0]


def norm(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    operands = (x, *[None] * 7)
    return norm_modulate_quantized_linears(*operands, *SETTINGS, [weight], [None], recipe)[0][0]


def activation(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    parameters = (None, weight, None, recipe)
    return gated_activation_quantized_linear(x, None, "gelu_tanh", "none", *parameters)


NODES = [linears, linears_on_what_is_kept, norm, activation]
nodes = pytest.mark.parametrize("node", NODES, ids=lambda f: f.__name__)
Node = Callable[[Tensor, Tensor, str], Tensor]


class Case:
    def __init__(self, node: Node) -> None:
        torch.manual_seed(0)
        self.node = node
        self.x = torch.randn(2, 5, 48, requires_grad=True)
        self.weight = torch.nn.Parameter(torch.randn(32, 48))

    def loss(self, recipe: Recipe) -> Tensor:
        return self.node(self.x, self.weight, recipe.key).square().sum()

    def run(self, recipe: Recipe, step: int) -> list[Tensor]:
        with fxopt.at_step(step):
            loss = self.loss(recipe)
            return [loss.detach(), *torch.autograd.grad(loss, [self.x, self.weight])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def scheduled(base: Recipe, *phases: Phase) -> Recipe:
    return replace(base, name="scheduled", schedule=phases)


@pytest.mark.parametrize("to", [None, gemm("e4m3/row/fp32", "e4m3/row/fp32")], ids=["high", "fp8"])
@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("base", ["fp8_tensorwise", "mxfp8"])
@nodes
def test_one_gemm_changes(node: Node, base: str, which: str, to: Any) -> None:
    case, plain = Case(node), RECIPES[base]
    recipe = scheduled(plain, Phase(which, CHANGE, None, to))
    before, after = case.run(plain, 0), case.run(replace(plain, **{which: to}), 0)
    assert not same(before, after)
    for step, expected in ((0, before), (CHANGE, after), (CHANGE - 1, before), (99, after)):
        assert same(case.run(recipe, step), expected)


@nodes
def test_nothing_quantized_is_the_plain_op(node: Node) -> None:
    case = Case(node)
    recipe = scheduled(RECIPES["fp8"], *(Phase(g, CHANGE) for g in ("fprop", "dgrad", "wgrad")))
    with high_precision():
        expected = case.run(recipe, 0)
    assert same(case.run(recipe, CHANGE), expected)
    assert same(case.run(recipe, 0), case.run(RECIPES["fp8"], 0))


@nodes
def test_the_backward_does_as_its_forward_did(node: Node) -> None:
    case = Case(node)
    recipe = scheduled(RECIPES["fp8"], Phase("dgrad", CHANGE), Phase("wgrad", CHANGE))
    expected = case.run(recipe, 0)
    with fxopt.at_step(0):
        loss = case.loss(recipe)
    with fxopt.at_step(CHANGE):
        found = torch.autograd.grad(loss, [case.x, case.weight])
    assert same([loss.detach(), *found], expected)


@nodes
def test_checkpoints(node: Node) -> None:
    case, recipe = Case(node), scheduled(RECIPES["fp8"], Phase("fprop", CHANGE))
    plain = {step: case.run(recipe, step) for step in (0, CHANGE)}
    case.node = lambda *args: checkpoint(node, *args, use_reentrant=False)
    for step, expected in plain.items():
        assert same(case.run(recipe, step), expected)
    with fxopt.at_step(0):
        loss = case.loss(recipe)
    with pytest.raises(StepChanged), fxopt.at_step(1):
        loss.backward()


@nodes
def test_a_cast_weight_is_not_used_in_another_phase(node: Node) -> None:
    case = Case(node)
    tensorwise = gemm("e4m3/tensor/fp32", "e4m3/tensor/fp32")
    phases = (Phase("fprop", 1, 2, tensorwise), Phase("dgrad", 2, 3, tensorwise), Phase("fprop", 3))
    recipe = scheduled(RECIPES["fp8_rowwise"], *phases)
    expected = [case.run(recipe, step) for step in range(5)]
    assert not any(same(a, b) for a, b in pairwise(expected[:4]))
    with fxopt.cast_weights_once():
        for step in (0, 1, 2, 3, 0, 2, 1, 4):
            assert same(case.run(recipe, step), expected[step])


@nodes
def test_no_step_is_an_error(node: Node) -> None:
    case, recipe = Case(node), scheduled(RECIPES["fp8"], Phase("fprop", CHANGE))
    with pytest.raises(StepNotTold):
        case.loss(recipe)
    with high_precision():
        case.loss(recipe)


def test_no_graph_keeps_the_formats_of_a_step() -> None:
    case, recipe = Case(linears), scheduled(RECIPES["fp8"], Phase("fprop", CHANGE))
    with pytest.raises(ScheduleInGraph, match="'scheduled'"), fxopt.at_step(0):
        make_fx(lambda x, w: linears(x, w, recipe.key))(case.x.detach(), case.weight.detach())
