"""torchao's configurations become the recipes of the same names, with the same numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import make_dataclass, replace
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

training = pytest.importorskip(
    "torchao.prototype.moe_training.config", reason="translates torchao's configurations"
)
MX = training.MXFP8TrainingOpConfig
preferences = training.KernelPreference

NAMES = {
    "tensorwise": "fp8_tensorwise",
    "rowwise": "fp8_rowwise",
    "rowwise_with_gw_hp": "fp8_rowwise_gw_hp",
}


def torchao(name: str, **changes: Any) -> Any:
    return replace(config.Float8LinearConfig.from_recipe_name(name), **changes)


def mxfp8(**changes: Any) -> Any:
    enums = {
        "kernel_preference": preferences,
        "scale_calculation_mode": training.ScaleCalculationMode,
    }
    return MX(**{name: enums[name][v] if name in enums else v for name, v in changes.items()})


def nvfp4(**changes: Any) -> Any:
    from torchao.prototype.moe_training.nvfp4_training import nvfp4_training

    return nvfp4_training.NVFP4TrainingConfig(**changes)


@pytest.mark.parametrize("name, ours", NAMES.items())
def test_named_recipes_are_ours(name: str, ours: str) -> None:
    assert replace(from_torchao(torchao(name)), name=ours) == RECIPES[ours]


def test_its_all_gather_is_ours() -> None:
    asked = from_torchao(torchao("tensorwise", enable_fsdp_float8_all_gather=True))
    assert replace(asked, name="fp8_tensorwise", all_gather="model") == RECIPES["fp8_tensorwise"]
    assert asked.all_gather == "fp8"


def assert_same_numbers(convert: Callable[[nn.Module], nn.Module], ours: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 48, 96, dtype=torch.bfloat16)
    weights, biases = [linear.weight], [linear.bias]
    results: list[list[Tensor]] = []

    def own(t: Tensor) -> Tensor:
        return quantized_linears(t, weights, biases, ours, False)[0]

    theirs = convert(nn.Sequential(copy.deepcopy(linear)))
    for call, parameters in ((theirs, theirs.parameters()), (own, linear.parameters())):
        y = call(x)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)])
    for a, b in zip(*results, strict=True):
        # The same codes; a product in bf16 there, in fp32 here, rounded to bf16 at the end.
        assert relative_l2(b, a.double()) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name, ours", NAMES.items())
def test_the_numbers_are_those_of_torchao(name: str, ours: str) -> None:
    from torchao.float8 import convert_to_float8_training

    settings = torchao(name, emulate=True)
    assert_same_numbers(lambda m: convert_to_float8_training(m, config=settings), ours, True)


@pytest.mark.parametrize("wgrad_with_hp", [False, True])
def test_the_numbers_of_mxfp8_are_those_of_torchao(wgrad_with_hp: bool) -> None:
    from torchao.quantization import quantize_

    settings = mxfp8(kernel_preference="EMULATED", wgrad_with_hp=wgrad_with_hp)

    def convert(module: nn.Module) -> nn.Module:
        quantize_(module, settings, lambda m, fqn: isinstance(m, nn.Linear))
        return module

    # torchao 0.18 leaves out the bias of such a linear.
    assert_same_numbers(convert, from_torchao(settings).key, False)


def test_training_ops_are_our_recipes() -> None:
    named = {
        ours: training.Float8TrainingOpConfig(float8_linear_recipe=name)
        for name, ours in NAMES.items()
    }
    named |= {"mxfp8": mxfp8(), "nvfp4": nvfp4()}
    for ours, settings in named.items():
        assert replace(from_torchao(settings), name=ours) == RECIPES[ours]
    assert from_torchao(mxfp8(wgrad_with_hp=True)) == replace(from_torchao(mxfp8()), wgrad=None)
    assert from_torchao(mxfp8(kernel_preference="EMULATED")) == from_torchao(mxfp8())


def test_every_named_recipe_of_torchao_is_translated_or_refused() -> None:
    names = {r.value for r in config.Float8LinearRecipeName}
    assert names == NAMES.keys()
    for recipe in training.MXFP8TrainingRecipe:
        from_torchao(training.MXFP8TrainingOpConfig.from_recipe(recipe))


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


REFUSED = {
    "kernel_preference=TORCH": lambda: mxfp8(kernel_preference="TORCH"),
    "kernel_preference=TRITON": lambda: mxfp8(kernel_preference="TRITON"),
    "scale_calculation_mode=FLOOR": lambda: mxfp8(scale_calculation_mode="FLOOR"),
    "scale_calculation_mode=CEIL": lambda: mxfp8(scale_calculation_mode="CEIL"),
    "scale_calculation_mode=EVEN": lambda: mxfp8(scale_calculation_mode="EVEN"),
    "out_dtype=torch.float32": lambda: mxfp8(out_dtype=torch.float32),
    "pad_token_groups_for_grouped_mm=True": lambda: mxfp8(pad_token_groups_for_grouped_mm=True),
    "float8_dtype=torch.float8_e5m2": lambda: training.Float8TrainingOpConfig(
        float8_dtype=torch.float8_e5m2
    ),
    "world_size=2": lambda: nvfp4(world_size=2),
    "rht_sign_vector=(1, 1)": lambda: nvfp4(rht_sign_vector=(1, 1)),
    "kernel_preference=AUTO": lambda: nvfp4(kernel_preference=preferences.AUTO),
}


@pytest.mark.parametrize("problem, build", REFUSED.items(), ids=REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(problem: str, build: Callable[[], Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(errors.InvalidRecipe, match=re.escape(problem)):
        fxopt.optimize(model, recipe=build())
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_field_of_a_later_version_is_refused_unless_default() -> None:
    later = make_dataclass("MXFP8TrainingOpConfig", [("rounding", str, "nearest")], bases=(MX,))
    from_torchao(later())
    with pytest.raises(errors.InvalidRecipe, match="rounding=stochastic"):
        from_torchao(later(rounding="stochastic"))


@pytest.mark.parametrize("name", ["MXDynamicActivationMXWeightConfig", "NVFP4WeightOnlyConfig"])
def test_configurations_of_inference_are_refused(name: str) -> None:
    formats = pytest.importorskip("torchao.prototype.mx_formats", reason="torchao's own")
    with pytest.raises(errors.InvalidRecipe, match=f"'torchao {name}': only torchao's"):
        from_torchao(getattr(formats, name)())
