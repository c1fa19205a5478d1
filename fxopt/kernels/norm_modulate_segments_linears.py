"""norm_modulate_segments and the linears on what it makes, as one autograd node.

What the norm makes is not kept, as in `norm_modulate_linears`; see `fxopt.kernels.linears`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.linears import (
    Pieces,
    as_pieces,
    input_gradient,
    parameter_gradients,
    products,
    without_autocast,
)
from fxopt.kernels.norm_modulate_segments import gradients, norm_modulate_segments
from fxopt.kernels.registration import below_autograd, register_composite
from fxopt.kernels.saving import packed, unpacked

NUM_OPERANDS = 9  # x, residual, gate, weight, bias, scale, shift, x_bias, index


class NormModulateSegmentsLinears(torch.autograd.Function):
    """norm_modulate_segments, then linears on its y, which is not kept.

    Without a residual, h is x itself, for those that go on with x: their gradient then comes back
    through this node, which adds it in its own pass.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], pieces: Pieces, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        given, parameters = tensors[:NUM_OPERANDS], tensors[NUM_OPERANDS:]
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        y, h, mean, rstd = below_autograd(norm_modulate_segments, *given, *settings)
        x, residual, gate, *others = given
        assert x is not None
        h = x if residual is None else h
        branch = None
        if gate is not None:
            branch = x if ctx.needs_input_grad[4] else x.new_empty(0)  # for its dtype
        ctx.shift_per_token, norm, _, weight_offset, scale_offset, _, dtype = settings
        own = residual is not None or ctx.shift_per_token, True
        kept = packed(ctx, (h, branch), own)
        ctx.save_for_backward(*kept, gate, *others, mean, rstd, *weights)
        ctx.constants, ctx.pieces = (norm, weight_offset, scale_offset, dtype), pieces
        ctx.set_materialize_grads(False)
        return *products(y, weights, biases, pieces), h

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (*grad_outs, grad_h), kept = grads, unpacked(ctx, ctx.saved_tensors)
        saved, weights = kept[: NUM_OPERANDS + 2], kept[NUM_OPERANDS + 2 :]
        needs = ctx.needs_input_grad[2:]
        of_parameters = needs[NUM_OPERANDS:]
        dy = input_gradient(grad_outs, weights, ctx.pieces, saved[0].shape)
        if dy is None and grad_h is None:
            return (None,) * (2 + len(needs))
        recompute = dy is not None and any(of_parameters)
        found, y = gradients(
            dy, grad_h, saved, ctx.shift_per_token, ctx.constants, needs[:8], recompute
        )
        dparameters = parameter_gradients(grad_outs, y, weights, ctx.pieces, of_parameters)
        return None, None, *found, None, *dparameters


def _composite(*args: Any) -> tuple[list[Tensor], Tensor]:
    operands, settings, (weights, biases, pieces) = args[:9], args[9:16], args[16:]
    *outs, h = NormModulateSegmentsLinears.apply(
        settings, as_pieces(pieces), *operands, *weights, *biases
    )
    return outs, h


norm_modulate_segments_linears = register_composite(
    "norm_modulate_segments_linears(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, Tensor index, "
    "bool shift_per_token, str norm, float eps, float weight_offset, float scale_offset, "
    "ScalarType h_dtype, ScalarType dtype, Tensor[] weights, Tensor?[] biases, int[] pieces) "
    "-> (Tensor[] outs, Tensor h)",
    _composite,
)
