"""A fused op and the quantized linears on what it makes, as one autograd node for one or more
streams.

The op writes codes where its kernels can, and nothing is kept that can be made again from what the
op keeps anyway: neither its result nor the codes of it.

Shapes: M tokens (all leading dims), K input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import activation_with_weights
from fxopt.kernels.counters import Slot
from fxopt.kernels.delayed import slots_for
from fxopt.kernels.formats import Quantized
from fxopt.kernels.gated_activation import gated_activation, gated_activation_backward
from fxopt.kernels.gated_activation_linear import gated_activation_linear
from fxopt.kernels.in_force import Decision, save_for_backward, saved_tensors
from fxopt.kernels.linears import flat
from fxopt.kernels.norm_modulate import (
    is_own,
    norm_modulate,
    norm_modulate_backward,
    operand_gradients,
)
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears
from fxopt.kernels.norm_modulate_streams import NUM_OPERANDS
from fxopt.kernels.packed_activation import packed_backward
from fxopt.kernels.quantize import Cast
from fxopt.kernels.quantize_group import quantize_rows
from fxopt.kernels.quantized_gradients import by_linear, gradients, quantized, weight_gradients
from fxopt.kernels.quantized_linears import (
    cast_weights,
    fuses,
    pieces_by_stream,
    pieces_of,
    products,
    split,
)
from fxopt.kernels.quantized_producers import (
    gated_activation_quantize,
    gated_activation_quantize_backward,
    norm_modulate_quantize,
    norm_modulate_quantize_columns,
)
from fxopt.kernels.registration import register_composite
from fxopt.kernels.saving import as_codes, packing, unpacking
from fxopt.kernels.streams import Call, Streams
from fxopt.kernels.together import Ask, Steps, mix, parts, side_by_side
from fxopt.recipes import Operand, Recipe


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


def _operand(x: Tensor, recipe: Recipe, slot: Slot) -> Steps[Tensor | Quantized]:
    """What the products read of x."""
    if recipe.fprop is None:
        return x
    (pair,) = yield from quantized(Cast(x, recipe.fprop.a, None, slot=slot))
    return pair.rows


def _transposed(x: Tensor, columns: Operand, slot: Slot) -> Steps[Quantized]:
    """What the gradients of weights read of x."""
    (pair,) = yield from quantized(Cast(x, None, columns, slot=slot))
    return pair.columns


def _joined(beside: Tensor | None, activation: Tensor) -> Tensor:
    return activation if beside is None else torch.cat([beside, activation], -1)


class NormModulateQuantizedLinears(Streams):
    """norm_modulate, then linears on its y; h is returned as `NormModulateLinears` does."""

    @staticmethod
    def forward_of(
        ctx: Any, decision: Decision, settings: tuple[Any, ...], *tensors: Tensor | None
    ) -> Steps[tuple[Any, ...]]:
        ctx.recipe, ctx.step, _ = decision
        settings, ctx.pieces, recipe = settings[:-1], settings[-1], ctx.recipe
        operands, parameters = tensors[:8], tensors[8:]
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        trains = any(ctx.needs_input_grad[10 : 10 + num_linears])
        x, residual, gate, *others = operands
        assert x is not None
        y: Tensor | Quantized
        slot = (slots := slots_for(decision, weights)).x
        if fuses(recipe):
            given = *operands, *settings, *_formats(recipe, trains, slot)
            lines = slot.rows, slot.known, slot.seen
            (found,) = yield [Ask(norm_modulate_quantize, given, lines)]
            codes, scales, amax_t, h, mean, rstd = found
            amax_t = amax_t if slot.known is None else slot.known
            y = Quantized(codes, scales, scales.new_empty(0))
        else:
            ((normed, h, mean, rstd),) = yield [Ask(norm_modulate, (*operands, *settings))]
            amax_t = x.new_empty(0)
            y = yield from _operand(normed, recipe, slot)
        h = x if residual is None else h
        branch = None
        if gate is not None:
            branch = x if ctx.needs_input_grad[4] else x.new_empty(0)  # for its dtype
        ctx.settings, ctx.shape, ctx.slots = settings, x.shape, slots
        copies = yield from cast_weights(weights, ctx, any(ctx.needs_input_grad))
        outs, amax = products(y, weights, biases, ctx, settings[-1], copies)
        own = is_own(x, residual, others[3]), True
        activations = yield from packing(ctx, (h, branch), own)
        kept = (*activations, gate, *others, mean, rstd, amax_t)
        save_for_backward(ctx, *kept, *weights, *amax)
        return *outs, h

    @staticmethod
    def backward_of(ctx: Any, *grads: Tensor | None) -> Steps[tuple[Any, ...]]:
        saved, recipe = (yield from unpacking(ctx, saved_tensors(ctx))), ctx.recipe
        needs, needs_parameters = ctx.needs_input_grad[2:10], ctx.needs_input_grad[10:]
        (h, branch, gate, *others, mean, rstd, amax_t), weights, amax = split(
            saved, 11, len(needs_parameters) // 2
        )
        *grad_outs, grad_h = grads
        norm, eps, weight_offset, scale_offset, _, dtype = ctx.settings
        of_linears = by_linear(grad_outs, ctx.pieces, len(weights))
        dy_MK, operands, dbiases = yield from gradients(
            ctx, of_linears, weights, amax, True, needs_parameters
        )
        if dy_MK is None and grad_h is None:
            return (None,) * len(ctx.needs_input_grad)
        dy = None if dy_MK is None else dy_MK.view(h.shape)
        trains = any(operand is not None for operand in operands)
        has_columns = fuses(recipe) and recipe.wgrad is not None
        constants = (norm, weight_offset, scale_offset, dtype, needs, trains and not has_columns)
        tensors = dy, grad_h, h, branch, gate, *others, mean, rstd
        (found,) = yield [Ask(norm_modulate_backward, (*tensors, *constants))]
        operand_grads = operand_gradients(found, dy, grad_h, h, gate, others[3], needs)
        y: Tensor | Quantized = found[-1]
        if trains and recipe.wgrad is not None:
            columns = recipe.wgrad.b
            if has_columns:
                affine, offsets = others[:4], (weight_offset, scale_offset)
                formats = dtype, str(columns), amax_t
                given = h, *affine, mean, rstd, norm, eps, *offsets, *formats
                lines = (ctx.slots.x.columns,)
                ((codes_t, scales_t),) = yield [Ask(norm_modulate_quantize_columns, given, lines)]
                y = Quantized(codes_t, scales_t, scales_t.new_empty(0))
            else:
                y = yield from _transposed(found[-1], columns, ctx.slots.x)
        return None, None, *operand_grads, *weight_gradients(operands, y, weights, recipe), *dbiases


class GatedActivationQuantizedLinear(Streams):
    """[beside | act(gate) * up] -> linear: neither the activation nor its codes are kept."""

    @staticmethod
    def forward_of(
        ctx: Any, decision: Decision, settings: tuple[str, str], *tensors: Tensor | None
    ) -> Steps[tuple[Any, ...]]:
        gate, up, beside, weight, bias = tensors
        assert gate is not None and weight is not None
        ctx.recipe, ctx.step, _ = decision
        ctx.settings, ctx.slots = settings, slots_for(decision, [weight])
        ctx.shape, ctx.pieces = (*gate.shape[:-1], weight.shape[1]), pieces_of([weight], [])
        (y, amax_t), copies = yield from side_by_side(
            _activated(ctx, gate, up, beside),
            cast_weights([weight], ctx, any(ctx.needs_input_grad)),
        )
        outs, amax = products(y, [weight], [bias], ctx, gate.dtype, copies)
        activations = yield from packing(ctx, (gate, up))
        save_for_backward(ctx, *activations, beside, amax_t, weight, *amax)
        return outs

    @staticmethod
    def backward_of(ctx: Any, *grads: Tensor | None) -> Steps[tuple[Any, ...]]:
        (grad,) = grads
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        recipe, needs = ctx.recipe, ctx.needs_input_grad[2:]
        trains, has_columns = needs[3], fuses(recipe) and recipe.wgrad is not None
        saved = saved_tensors(ctx)
        saved, scales = as_codes(ctx, saved) if trains and has_columns else (saved, [])
        if not scales:
            saved = yield from unpacking(ctx, saved)
        gate, up, beside, amax_t, weight, *amax = saved
        width = 0 if beside is None else beside.shape[-1]
        dy_MK, operands, dbiases = yield from gradients(
            ctx, [[flat(grad)]], [weight], amax, True, needs[3:]
        )
        assert dy_MK is not None
        dy = dy_MK.view(ctx.shape)
        dactivation, y = dy[..., width:], None
        if trains and has_columns:
            formats = *ctx.settings, str(recipe.wgrad.b), amax_t
            given = dactivation, gate, up, *scales, beside, *formats
            backward = packed_backward if scales else gated_activation_quantize_backward
            (found,) = yield [Ask(backward, given, (ctx.slots.x.columns,))]
            dgate, dup, codes_t, scales_t = found
            y = Quantized(codes_t, scales_t, scales_t.new_empty(0))
        else:
            given = dactivation, gate, up, *ctx.settings, trains, None, False
            ((dgate, dup, activation, _),) = yield [Ask(gated_activation_backward, given)]
            y = activation
            if trains and recipe.wgrad is not None:
                joined, columns = _joined(beside, activation), recipe.wgrad.b
                y = yield from _transposed(joined, columns, ctx.slots.x)
        if trains and recipe.wgrad is None and beside is not None:
            (g,) = operands
            dweights: Any = [_weight_gradient(g, beside, activation, weight)]
        else:
            dweights = weight_gradients(operands, y, [weight], recipe)
        each = zip((dgate, dup, dy[..., :width]), needs, strict=False)
        return None, None, *(g if need else None for g, need in each), *dweights, *dbiases


def _activated(
    ctx: Any, gate: Tensor, up: Tensor | None, beside: Tensor | None
) -> Steps[tuple[Tensor | Quantized, Tensor]]:
    """[beside | act(gate) * up] for the product, and the magnitudes for its transposed copy."""
    slot, trains = ctx.slots.x, ctx.needs_input_grad[5]
    if not fuses(ctx.recipe):
        (activation,) = yield [Ask(gated_activation, (gate, up, *ctx.settings, None))]
        y = yield from _operand(_joined(beside, activation), ctx.recipe, slot)
        return y, gate.new_empty(0)
    lines = slot.rows, slot.known, slot.seen
    given = gate, up, beside, *ctx.settings, *_formats(ctx.recipe, trains, slot)
    ((codes, scales, amax_t),) = yield [Ask(gated_activation_quantize, given, lines)]
    kept = amax_t if slot.known is None else slot.known
    return Quantized(codes, scales, scales.new_empty(0)), kept


def _weight_gradient(g: Any, beside: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """g^T [beside | activation] in the model's dtype, without joining the two."""
    dweight, width = torch.empty_like(weight), beside.shape[-1]
    for part, columns in ((beside, slice(0, width)), (activation, slice(width, None))):
        torch.mm(g.t(), part.reshape(-1, part.shape[-1]), out=dweight[:, columns])
    return dweight


def _plain_norm(call: Call) -> Sequence[Tensor]:
    operands, biases = call.tensors[:NUM_OPERANDS], call.tensors[NUM_OPERANDS + len(call.weights) :]
    *settings, pieces = call.settings
    numbers = [i for piece in pieces for i in piece]
    outs, h = norm_modulate_linears(*operands, *settings, call.weights, biases, numbers)
    return *outs, h


def _plain_activation(call: Call) -> Sequence[Tensor]:
    gate, up, beside, weight, bias = call.tensors
    given = gate, up, *call.settings, beside, None, weight, bias
    return (gated_activation_linear(*given),)


def _norm_modulate_quantized_linears_streams(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    *operands, norm, eps, weight_offset, scale_offset, h_dtype, dtype = args[:14]
    weights, biases, num_linears, recipe, *pieces = args[14:]
    numbers = zip(eps, weight_offset, scale_offset, strict=True)
    own, own_biases = parts(weights, num_linears), parts(biases, num_linears)
    parameters = own, own_biases, pieces_by_stream(own, *pieces)
    calls = [
        Call((norm, *n, h_dtype, dtype, p), (*tensors, *w, *b), w, len(p) + 1)
        for tensors, n, w, b, p in zip(
            zip(*operands, strict=True), numbers, *parameters, strict=True
        )
    ]
    found = NormModulateQuantizedLinears.run(recipe, calls, _plain_norm)
    return [out for own in found for out in own[:-1]], [own[-1] for own in found]


def _norm_modulate_quantized_linears(*args: Any) -> tuple[list[Tensor], Tensor]:
    tensors, settings = args[:NUM_OPERANDS], args[NUM_OPERANDS:14]
    weights, biases, recipe, *numbers = args[14:]
    (pieces,) = pieces_by_stream([weights], *numbers, *([len(n) // 3] for n in numbers))
    given = *tensors, *weights, *biases
    call = Call((*settings, pieces), given, weights, len(pieces) + 1)
    ((*outs, h),) = NormModulateQuantizedLinears.run(recipe, [call], _plain_norm)
    return outs, h


def _gated_activation_quantized_linear_streams(
    gates: Sequence[Tensor],
    ups: Sequence[Tensor | None],
    activation: str,
    packing: str,
    *others: Any,
) -> list[Tensor]:
    *parameters, recipe = others
    calls = [
        Call((activation, packing), tensors, [tensors[3]], 1)
        for tensors in zip(gates, ups, *parameters, strict=True)
    ]
    found = GatedActivationQuantizedLinear.run(recipe, calls, _plain_activation)
    return [out for own in found for out in own]


def _gated_activation_quantized_linear(
    gate: Tensor, up: Tensor | None, activation: str, packing: str, *others: Any
) -> Tensor:
    *parameters, recipe = others
    given = [gate], [up], activation, packing, *([p] for p in parameters), recipe
    (out,) = _gated_activation_quantized_linear_streams(*given)
    return out


norm_modulate_quantized_linears = register_composite(
    "norm_modulate_quantized_linears(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, str norm, float eps, "
    "float weight_offset, float scale_offset, ScalarType h_dtype, ScalarType dtype, "
    "Tensor[] weights, Tensor?[] biases, str recipe, int[] pieces=[]) -> "
    "(Tensor[] outs, Tensor h)",
    _norm_modulate_quantized_linears,
)
# The linears and pieces of all streams follow one another; of each its `num_linears`, `num_pieces`.
norm_modulate_quantized_linears_streams = register_composite(
    "norm_modulate_quantized_linears_streams(Tensor[] x, Tensor?[] residual, Tensor?[] gate, "
    "Tensor?[] weight, Tensor?[] bias, Tensor?[] scale, Tensor?[] shift, Tensor?[] x_bias, "
    "str norm, float[] eps, float[] weight_offset, float[] scale_offset, ScalarType h_dtype, "
    "ScalarType dtype, Tensor[] weights, Tensor?[] biases, int[] num_linears, str recipe, "
    "int[] pieces=[], int[] num_pieces=[]) -> (Tensor[] outs, Tensor[] h)",
    _norm_modulate_quantized_linears_streams,
)
gated_activation_quantized_linear = register_composite(
    "gated_activation_quantized_linear(Tensor gate, Tensor? up, str activation, str packing, "
    "Tensor? beside, Tensor weight, Tensor? bias, str recipe) -> Tensor",
    _gated_activation_quantized_linear,
)
gated_activation_quantized_linear_streams = register_composite(
    "gated_activation_quantized_linear_streams(Tensor[] gate, Tensor?[] up, str activation, "
    "str packing, Tensor?[] beside, Tensor[] weight, Tensor?[] bias, str recipe) -> Tensor[]",
    _gated_activation_quantized_linear_streams,
)
mix((gated_activation_quantize, quantize_rows), activation_with_weights.together)
