"""torchao's configurations of FP8 training as recipes; torchao itself is not imported."""

from __future__ import annotations

from typing import Any

from fxopt.errors import InvalidRecipe
from fxopt.recipes import Gemm, Operand, Recipe

FORMATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
BLOCKS = {"TENSORWISE": "tensor", "AXISWISE": "row"}
# What has no counterpart here, and the value that asks for nothing.
UNSUPPORTED = {"enable_fsdp_float8_all_gather": False}


def from_torchao(config: Any) -> Recipe:
    """The recipe that computes what `torchao.float8` does under a Float8LinearConfig.

    Its `pad_inner_dim` and `force_recompute_fp8_weight_in_bwd` are always on here, and `emulate` is
    decided by the device.

    Raises:
        InvalidRecipe: another class, or a setting that has no counterpart, by name.
    """
    name = f"torchao {type(config).__name__}"
    if type(config).__name__ != "Float8LinearConfig":
        raise InvalidRecipe(name, "only torchao's Float8LinearConfig can be translated")
    for setting, nothing in UNSUPPORTED.items():
        if getattr(config, setting, nothing) != nothing:
            raise InvalidRecipe(name, f"{setting} has no counterpart here; switch it off")
    scale = "pow2" if config.round_scales_to_power_of_2 else "fp32"

    def product(a: Any, b: Any, how: Any) -> Gemm | None:
        first, second = _operand(name, a, scale), _operand(name, b, scale)
        if first is None and second is None:
            return None
        if first is None or second is None:
            raise InvalidRecipe(name, "one operand of a GEMM is quantized, the other is not")
        return Gemm(first, second, "fast" if how.use_fast_accum else "fp32")

    c = config
    return Recipe(
        name,
        fprop=product(c.cast_config_input, c.cast_config_weight, c.gemm_config_output),
        dgrad=product(
            c.cast_config_grad_output, c.cast_config_weight_for_grad_input, c.gemm_config_grad_input
        ),
        wgrad=product(
            c.cast_config_grad_output_for_grad_weight,
            c.cast_config_input_for_grad_weight,
            c.gemm_config_grad_weight,
        ),
    )


def _operand(name: str, cast: Any, scale: str) -> Operand | None:
    if cast.scaling_type.name == "DISABLED":
        return None
    format = FORMATS.get(str(cast.target_dtype).removeprefix("torch."))
    block = BLOCKS.get(cast.scaling_granularity.name)
    if format is None or block is None or cast.scaling_type.name != "DYNAMIC":
        raise InvalidRecipe(name, f"{cast} has no counterpart here")
    return Operand(format, block, scale)
