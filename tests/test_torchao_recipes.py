"""torchao's configurations become the recipes of the same names, with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import errors
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.recipes import RECIPES
from fxopt.torchao_recipes import from_torchao
from tests.numerics import relative_l2

config = pytest.importorskip("torchao.float8.config", reason="translates torchao's configurations")

NAMES = {
    "tensorwise": "fp8_tensorwise",
    "rowwise": "fp8_rowwise",
    "rowwise_with_gw_hp": "fp8_rowwise_gw_hp",
}


def torchao(name: str, **changes: Any) -> Any:
    return replace(config.Float8LinearConfig.from_recipe_name(name), **changes)


@pytest.mark.parametrize("name, ours", NAMES.items())
def test_named_recipes_are_ours(name: str, ours: str) -> None:
    assert replace(from_torchao(torchao(name)), name=ours) == RECIPES[ours]


@pytest.mark.parametrize("name, ours", NAMES.items())
def test_the_numbers_are_those_of_torchao(name: str, ours: str) -> None:
    from torchao.float8 import convert_to_float8_training

    torch.manual_seed(0)
    linear = nn.Linear(64, 96, dtype=torch.bfloat16)
    x = torch.randn(2, 40, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 40, 96, dtype=torch.bfloat16)
    theirs = convert_to_float8_training(nn.Sequential(linear), config=torchao(name, emulate=True))
    results: list[list[Tensor]] = []

    def own(t: Tensor) -> Tensor:
        return quantized_linears(t, [linear.weight], [linear.bias], ours, False)[0]

    for call in (theirs, own):
        y = call(x)
        leaves = [x, *theirs.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    for a, b in zip(*results, strict=True):
        # The same codes; a product in bf16 there, in fp32 here, rounded to bf16 at the end.
        assert relative_l2(b, a.double()) < 2 * torch.finfo(torch.bfloat16).eps


def test_a_door_takes_the_configuration() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    fxopt.optimize(model, recipe=torchao("rowwise"))
    model(torch.randn(2, 5, 64))
    report = fxopt.report(model)
    assert (report.recipe, report.count("quantized_linear")) == ("torchao Float8LinearConfig", 1)


@pytest.mark.parametrize("given", [object(), 3, None])
def test_what_is_no_configuration_is_refused(given: object) -> None:
    with pytest.raises(errors.InvalidRecipe, match="only torchao's Float8LinearConfig"):
        fxopt.optimize(nn.Linear(2, 2), recipe=given)


def test_what_has_no_counterpart_is_refused_by_name() -> None:
    with pytest.raises(errors.InvalidRecipe, match="enable_fsdp_float8_all_gather"):
        from_torchao(torchao("tensorwise", enable_fsdp_float8_all_gather=True))
