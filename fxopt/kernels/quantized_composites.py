"""A fused op and the quantized linears on what it makes, as one autograd node.

The op writes codes where its kernels can, and nothing is kept that can be made again from what the
op keeps anyway: neither its result nor the codes of it.

Shapes: M tokens (all leading dims), K input features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.counters import Slot
from fxopt.kernels.delayed import slots_for
from fxopt.kernels.formats import Quantized
from fxopt.kernels.gated_activation import gated_activation, gated_activation_backward
from fxopt.kernels.gated_activation_linear import gated_activation_linear
from fxopt.kernels.in_force import Decision, decide, save_for_backward, saved_tensors
from fxopt.kernels.linears import without_autocast
from fxopt.kernels.norm_modulate import (
    is_own,
    norm_modulate,
    norm_modulate_backward,
    operand_gradients,
)
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears
from fxopt.kernels.quantized_linears import (
    fuses,
    gradients,
    products,
    quantized,
    split,
    weight_gradients,
    whole,
)
from fxopt.kernels.quantized_producers import (
    gated_activation_quantize,
    gated_activation_quantize_backward,
    norm_modulate_quantize,
    norm_modulate_quantize_columns,
)
from fxopt.kernels.registration import below_autograd, call_counting, register_composite
from fxopt.kernels.saving import packed, unpacked
from fxopt.recipes import Recipe


def op_of(name: str, recipe: Recipe) -> str:
    """The op behind a producer under a recipe: its form that writes codes, where it has one."""
    return f"{name}_quantize" if fuses(recipe) else name


def _formats(recipe: Recipe, trains: bool, slot: Slot) -> tuple[str, str | None]:
    """How a producer quantizes for the products; and for the gradients of weights that train, where
    the magnitude for that is still to be found."""
    assert recipe.fprop is not None
    is_open = recipe.wgrad is not None and trains and slot.known is None
    columns = recipe.wgrad.b if recipe.wgrad is not None and is_open else None
    return str(recipe.fprop.a), None if columns is None else str(columns)


def _operand(x: Tensor, recipe: Recipe, slot: Slot) -> Tensor | Quantized:
    """What the products read of x."""
    return x if recipe.fprop is None else quantized(x, recipe.fprop.a, None, slot=slot).rows


def _joined(beside: Tensor | None, activation: Tensor) -> Tensor:
    return activation if beside is None else torch.cat([beside, activation], -1)


class NormModulateQuantizedLinears(torch.autograd.Function):
    """norm_modulate, then linears on its y; h is returned as `NormModulateLinears` does."""

    @staticmethod
    def forward(
        ctx: Any, decision: Decision, settings: tuple[Any, ...], *tensors: Tensor | None
    ) -> Any:
        ctx.recipe, ctx.step, _ = decision
        recipe = ctx.recipe
        operands, parameters = tensors[:8], tensors[8:]
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        trains = any(ctx.needs_input_grad[10 : 10 + num_linears])
        x, residual, gate, *others = operands
        assert x is not None
        y: Tensor | Quantized
        slot = (slots := slots_for(decision, weights)).x
        if fuses(recipe):
            call = norm_modulate_quantize, [slot.rows, slot.known, slot.seen], *operands, *settings
            found = below_autograd(call_counting, *call, *_formats(recipe, trains, slot))
            codes, scales, amax_t, h, mean, rstd = found
            amax_t = amax_t if slot.known is None else slot.known
            y = Quantized(codes, scales, scales.new_empty(0))
        else:
            normed, h, mean, rstd = below_autograd(norm_modulate, *operands, *settings)
            amax_t = x.new_empty(0)
            y = _operand(normed, recipe, slot)
        h = x if residual is None else h
        branch = x if gate is not None else None
        ctx.settings, ctx.shape, ctx.slots = settings, x.shape, slots
        ctx.set_materialize_grads(False)
        outs, amax = products(y, weights, biases, ctx, settings[-1], True)
        own = is_own(x, residual, others[3]), True
        kept = (*packed(ctx, (h, branch), own), gate, *others, mean, rstd, amax_t)
        save_for_backward(ctx, *kept, *weights, *amax)
        return *outs, h

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved, recipe = unpacked(ctx, saved_tensors(ctx)), ctx.recipe
        (h, branch, gate, *others, mean, rstd, amax_t), weights, amax = split(
            saved, 11, len(grads) - 1
        )
        *grad_outs, grad_h = grads
        norm, eps, weight_offset, scale_offset, _, dtype = ctx.settings
        needs, needs_parameters = ctx.needs_input_grad[2:10], ctx.needs_input_grad[10:]
        dy_MK, operands, dbiases = gradients(ctx, grad_outs, weights, amax, True, needs_parameters)
        if dy_MK is None and grad_h is None:
            return (None,) * len(ctx.needs_input_grad)
        dy = None if dy_MK is None else dy_MK.view(h.shape)
        trains = any(operand is not None for operand in operands)
        has_columns = fuses(recipe) and recipe.wgrad is not None
        constants = (norm, weight_offset, scale_offset, dtype, needs, trains and not has_columns)
        found = norm_modulate_backward(dy, grad_h, h, branch, gate, *others, mean, rstd, *constants)
        operand_grads = operand_gradients(found, dy, grad_h, h, gate, others[3], needs)
        y: Tensor | Quantized = found[-1]
        if trains and recipe.wgrad is not None:
            columns = recipe.wgrad.b
            if has_columns:
                affine, offsets = others[:4], (weight_offset, scale_offset)
                call = norm_modulate_quantize_columns, [ctx.slots.x.columns], h, *affine
                formats = dtype, str(columns), amax_t
                codes_t, scales_t = call_counting(*call, mean, rstd, norm, eps, *offsets, *formats)
                y = Quantized(codes_t, scales_t, scales_t.new_empty(0))
            else:
                y = quantized(found[-1], None, columns, slot=ctx.slots.x).columns
        return None, None, *operand_grads, *weight_gradients(operands, y, weights, recipe), *dbiases


class GatedActivationQuantizedLinear(torch.autograd.Function):
    """[beside | act(gate) * up] -> linear: neither the activation nor its codes are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        decision: Decision,
        settings: tuple[str, str],
        gate: Tensor,
        up: Tensor | None,
        beside: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.recipe, ctx.step, _ = decision
        recipe = ctx.recipe
        trains, amax_t = ctx.needs_input_grad[5], gate.new_empty(0)
        y: Tensor | Quantized
        slot = (slots := slots_for(decision, [weight])).x
        if fuses(recipe):
            lines = slot.rows, slot.known, slot.seen
            call = gated_activation_quantize, lines, gate, up, beside, *settings
            formats = _formats(recipe, trains, slot)
            codes, scales, amax_t = below_autograd(call_counting, *call, *formats)
            amax_t = amax_t if slot.known is None else slot.known
            y = Quantized(codes, scales, scales.new_empty(0))
        else:
            activation = below_autograd(gated_activation, gate, up, *settings)
            y = _operand(_joined(beside, activation), recipe, slot)
        ctx.settings, ctx.slots = settings, slots
        ctx.set_materialize_grads(False)
        ctx.shape = (*gate.shape[:-1], weight.shape[1])
        (out,), amax = products(y, [weight], [bias], ctx, gate.dtype, True)
        save_for_backward(ctx, *packed(ctx, (gate, up)), beside, amax_t, weight, *amax)
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        gate, up, beside, amax_t, weight, *amax = unpacked(ctx, saved_tensors(ctx))
        recipe, needs = ctx.recipe, ctx.needs_input_grad[2:]
        width = 0 if beside is None else beside.shape[-1]
        dy_MK, operands, dbiases = gradients(ctx, [grad], [weight], amax, True, needs[3:])
        assert dy_MK is not None
        dy = dy_MK.view(ctx.shape)
        trains, has_columns = needs[3], fuses(recipe) and recipe.wgrad is not None
        dactivation, y = dy[..., width:], None
        if trains and has_columns:
            call = gated_activation_quantize_backward, [ctx.slots.x.columns], dactivation
            formats = str(recipe.wgrad.b), amax_t
            dgate, dup, codes_t, scales_t = call_counting(
                *call, gate, up, beside, *ctx.settings, *formats
            )
            y = Quantized(codes_t, scales_t, scales_t.new_empty(0))
        else:
            dgate, dup, activation, _ = gated_activation_backward(
                dactivation, gate, up, *ctx.settings, trains
            )
            y = activation
            if trains and recipe.wgrad is not None:
                joined, columns = _joined(beside, activation), recipe.wgrad.b
                y = quantized(joined, None, columns, slot=ctx.slots.x).columns
        if trains and recipe.wgrad is None and beside is not None:
            (g,) = operands
            dweights: Any = [_weight_gradient(g, beside, activation, weight)]
        else:
            dweights = weight_gradients(operands, y, [weight], recipe)
        grads = (dgate, dup, dy[..., :width])
        given = (g if need else None for g, need in zip(grads, needs, strict=False))
        return None, None, *given, *dweights, *dbiases


def _weight_gradient(g: Any, beside: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """g^T [beside | activation] in the model's dtype, without joining the two."""
    dweight, width = torch.empty_like(weight), beside.shape[-1]
    for part, columns in ((beside, slice(0, width)), (activation, slice(width, None))):
        torch.mm(g.t(), part.reshape(-1, part.shape[-1]), out=dweight[:, columns])
    return dweight


def _norm_modulate_quantized_linears(*args: Any) -> tuple[list[Tensor], Tensor]:
    *operands, weights, biases, recipe = args
    decision = decide(recipe, weights)
    if decision is None:
        pieces = [i for piece in whole(weights) for i in piece]
        outs, h = norm_modulate_linears(*operands, weights, biases, pieces)
        return outs, h
    tensors, settings = operands[:8], tuple(operands[8:])
    *outs, h = NormModulateQuantizedLinears.apply(decision, settings, *tensors, *weights, *biases)
    return outs, h


def _gated_activation_quantized_linear(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    beside: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    recipe: str,
) -> Tensor:
    settings, parameters = (activation, packing), (beside, weight, bias)
    decision = decide(recipe, [weight])
    if decision is None:
        out: Tensor = gated_activation_linear(gate, up, *settings, beside, None, weight, bias)
        return out
    tensors = (gate, up, *parameters)
    return GatedActivationQuantizedLinear.apply(decision, settings, *tensors)


norm_modulate_quantized_linears = register_composite(
    "norm_modulate_quantized_linears(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, str norm, float eps, "
    "float weight_offset, float scale_offset, ScalarType h_dtype, ScalarType dtype, "
    "Tensor[] weights, Tensor?[] biases, str recipe) -> (Tensor[] outs, Tensor h)",
    _norm_modulate_quantized_linears,
)
gated_activation_quantized_linear = register_composite(
    "gated_activation_quantized_linear(Tensor gate, Tensor? up, str activation, str packing, "
    "Tensor? beside, Tensor weight, Tensor? bias, str recipe) -> Tensor",
    _gated_activation_quantized_linear,
)
