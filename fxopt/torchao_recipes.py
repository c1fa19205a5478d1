"""torchao's configurations of low-precision training as recipes; torchao itself is not imported.

Every field is translated, or refused by its name and value: one that is not known here, as those of
later versions, may only have its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fxopt.errors import InvalidRecipe
from fxopt.recipes import RECIPES, Gemm, Operand, Recipe

FORMATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
BLOCKS = {"TENSORWISE": "tensor", "AXISWISE": "row"}
# Recipes of Float8LinearConfig by name.
LINEARS = {
    "tensorwise": "fp8_tensorwise",
    "rowwise": "fp8_rowwise",
    "rowwise_with_gw_hp": "fp8_rowwise_gw_hp",
}


def from_torchao(config: Any) -> Recipe:
    """The recipe that computes what torchao does to linears under one of its configurations.

    Float8LinearConfig, Float8TrainingOpConfig, MXFP8TrainingOpConfig and NVFP4TrainingConfig.
    Padding is always on here, and what the device has no units for is emulated. NVFP4's random
    signs are fixed ones.

    Raises:
        InvalidRecipe: another class, or a setting that has no counterpart, by name and value.
    """
    kind = type(config).__name__
    if kind not in _TRANSLATED:
        *others, last = _TRANSLATED
        known = f"torchao's {', '.join(others)} and {last}"
        raise InvalidRecipe(f"torchao {kind}", f"only {known} can be translated")
    taken, translate = _TRANSLATED[kind]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in taken and value != field.default:
            value = getattr(value, "name", value)  # of an enum
            problem = f"{field.name}={value} has no counterpart here; leave it at its default"
            raise InvalidRecipe(f"torchao {kind}", problem)
    return dataclasses.replace(translate(config), name=f"torchao {kind}")


def _float8(config: Any) -> Recipe:
    scale = "pow2" if config.round_scales_to_power_of_2 else "fp32"

    def product(which: str, a: str, b: str) -> Gemm | None:
        operands = [_operand(name, getattr(config, name), scale) for name in (a, b)]
        first, second = operands
        if first is None and second is None:
            return None
        if first is None or second is None:
            raise InvalidRecipe(FLOAT8, f"one of {a} and {b} is quantized, the other is not")
        fast = getattr(config, f"gemm_config_{which}").use_fast_accum
        return Gemm(first, second, "fast" if fast else "fp32")

    return Recipe(
        FLOAT8,
        fprop=product("output", "cast_config_input", "cast_config_weight"),
        dgrad=product("grad_input", "cast_config_grad_output", "cast_config_weight_for_grad_input"),
        wgrad=product(
            "grad_weight",
            "cast_config_grad_output_for_grad_weight",
            "cast_config_input_for_grad_weight",
        ),
        all_gather="fp8" if config.enable_fsdp_float8_all_gather else "model",
    )


def _operand(name: str, cast: Any, scale: str) -> Operand | None:
    if cast.scaling_type.name == "DISABLED":
        return None
    format = FORMATS.get(str(cast.target_dtype).removeprefix("torch."))
    block = BLOCKS.get(cast.scaling_granularity.name)
    if format is None or block is None or cast.scaling_type.name != "DYNAMIC":
        raise InvalidRecipe(FLOAT8, f"{name}={cast} has no counterpart here")
    return Operand(format, block, scale)


def _float8_op(config: Any) -> Recipe:
    return RECIPES[LINEARS[config.float8_linear_recipe]]


def _mxfp8(config: Any) -> Recipe:
    # AUTO and EMULATED name the same numbers; others name kernels.
    preference = config.kernel_preference.name
    if preference not in ("AUTO", "EMULATED"):
        problem = f"kernel_preference={preference} has no counterpart here; use AUTO or EMULATED"
        raise InvalidRecipe("torchao MXFP8TrainingOpConfig", problem)
    recipe = RECIPES["mxfp8"]
    return dataclasses.replace(recipe, wgrad=None) if config.wgrad_with_hp else recipe


def _nvfp4(config: Any) -> Recipe:
    return RECIPES["nvfp4"]


FLOAT8 = "torchao Float8LinearConfig"
_CASTS = ("input", "weight", "grad_output")
_CASTS_ALSO = ("input_for_grad_weight", "weight_for_grad_input", "grad_output_for_grad_weight")
# By class: the fields that its translation reads, or that change no number; and the translation.
_TRANSLATED: Mapping[str, tuple[frozenset[str], Callable[[Any], Recipe]]] = MappingProxyType(
    {
        "Float8LinearConfig": (
            frozenset(
                [
                    *(f"cast_config_{name}" for name in (*_CASTS, *_CASTS_ALSO)),
                    *(f"gemm_config_{name}" for name in ("output", "grad_input", "grad_weight")),
                    *("pad_inner_dim", "emulate", "force_recompute_fp8_weight_in_bwd"),
                    *("round_scales_to_power_of_2", "enable_fsdp_float8_all_gather"),
                ]
            ),
            _float8,
        ),
        "Float8TrainingOpConfig": (frozenset(["float8_linear_recipe"]), _float8_op),
        "MXFP8TrainingOpConfig": (frozenset(["kernel_preference", "wgrad_with_hp"]), _mxfp8),
        "NVFP4TrainingConfig": (frozenset(), _nvfp4),
    }
)
