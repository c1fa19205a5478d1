"""norm_modulate_segments and the quantized linears on what it makes, as one autograd node."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxopt.kernels.quantized_composites import NormModulateQuantizedLinears, plain_norm
from fxopt.kernels.registration import register_composite
from fxopt.kernels.streams import Call

NUM_OPERANDS = 9  # with the index


def _composite(*args: Any) -> tuple[list[Tensor], Tensor]:
    *operands, weights, biases, recipe = args
    tensors, settings = operands[:NUM_OPERANDS], tuple(operands[NUM_OPERANDS:])
    call = Call(settings, (*tensors, *weights, *biases), weights, len(weights) + 1)
    ((*outs, h),) = NormModulateQuantizedLinears.run(recipe, [call], plain_norm)
    return outs, h


norm_modulate_segments_quantized_linears = register_composite(
    "norm_modulate_segments_quantized_linears(Tensor x, Tensor? residual, Tensor? gate, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, Tensor index, "
    "bool shift_per_token, str norm, float eps, float weight_offset, float scale_offset, "
    "ScalarType h_dtype, ScalarType dtype, Tensor[] weights, Tensor?[] biases, str recipe) "
    "-> (Tensor[] outs, Tensor h)",
    _composite,
)
