"""norm_modulate_segments and the quantized linears on what it makes, as one autograd node.

For one or more streams, of which some may have no index.
"""

from __future__ import annotations

from fxopt.kernels.norm_modulate_quantized_linears import norm_linears, norm_linears_streams
from fxopt.kernels.registration import register_composite

norm_modulate_segments_quantized_linears = register_composite(
    "norm_modulate_segments_quantized_linears(Tensor x, Tensor? residual, Tensor? gate, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, Tensor index, "
    "bool shift_per_token, str norm, float eps, float weight_offset, float scale_offset, "
    "ScalarType h_dtype, ScalarType dtype, Tensor[] weights, Tensor?[] biases, str recipe, "
    "int[] pieces=[]) -> (Tensor[] outs, Tensor h)",
    norm_linears,
)
norm_modulate_segments_quantized_linears_streams = register_composite(
    "norm_modulate_segments_quantized_linears_streams(Tensor[] x, Tensor?[] residual, "
    "Tensor?[] gate, Tensor?[] weight, Tensor?[] bias, Tensor?[] scale, Tensor?[] shift, "
    "Tensor?[] x_bias, Tensor?[] index, bool[] shift_per_token, str norm, float[] eps, "
    "float[] weight_offset, float[] scale_offset, ScalarType h_dtype, ScalarType dtype, "
    "Tensor[] weights, Tensor?[] biases, int[] num_linears, str recipe, int[] pieces=[], "
    "int[] num_pieces=[]) -> (Tensor[] outs, Tensor[] h)",
    norm_linears_streams,
)
