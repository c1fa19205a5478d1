"""gated_activation and the quantized linear on what it makes, as one autograd node for one or more
streams.

As in `norm_modulate_quantized_linears`, neither the activation nor its codes are kept.

Shapes: M tokens (all leading dims), K input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import activation_with_weights
from fxopt.kernels.delayed import slots_for
from fxopt.kernels.formats import Quantized
from fxopt.kernels.gated_activation import gated_activation, gated_activation_backward
from fxopt.kernels.gated_activation_linear import gated_activation_linear
from fxopt.kernels.in_force import Decision, save_for_backward, saved_tensors
from fxopt.kernels.linears import flat
from fxopt.kernels.magnitudes import hand_on, seen_in
from fxopt.kernels.packed_activation import packed_backward
from fxopt.kernels.quantize_group import quantize_rows
from fxopt.kernels.quantized_gradients import gradients, measures, weight_gradients
from fxopt.kernels.quantized_linears import (
    cast_weights,
    formats,
    fuses,
    operand,
    pieces_of,
    products,
    transposed,
)
from fxopt.kernels.quantized_producers import (
    gated_activation_quantize,
    gated_activation_quantize_backward,
)
from fxopt.kernels.registration import register_composite
from fxopt.kernels.saving import kept_in, packing, read_codes, room_for
from fxopt.kernels.streams import Call, Streams
from fxopt.kernels.together import Ask, Steps, mix, side_by_side


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
        rooms = room_for(ctx, gate, (gate, up)) if fuses(ctx.recipe) else ()
        (y, amax_t), copies = yield from side_by_side(
            _activated(ctx, gate, up, beside, rooms),
            cast_weights([weight], ctx, any(ctx.needs_input_grad)),
        )
        outs, amax = products(y, [weight], [bias], ctx, gate.dtype, copies)
        if fuses(ctx.recipe):
            activations = kept_in(rooms, (gate, up))
        else:
            activations = yield from packing(ctx, (gate, up))
        save_for_backward(ctx, *activations, beside, amax_t, weight, *amax)
        return outs

    @staticmethod
    def measures(ctx: Any, output: int) -> bool:
        return measures(ctx, output, True, ctx.needs_input_grad[5:])

    @staticmethod
    def backward_of(ctx: Any, *grads: Tensor | None) -> Steps[tuple[Any, ...]]:
        (grad,) = grads
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        recipe, needs = ctx.recipe, ctx.needs_input_grad[2:]
        trains, has_columns = needs[3], fuses(recipe) and recipe.wgrad is not None
        saved = saved_tensors(ctx)
        is_packed = [dtype is not None for dtype in ctx.packed]
        can_read = is_packed == [t is not None for t in saved[:2]] and trains and has_columns
        saved, scales = yield from read_codes(ctx, saved, grad.dtype, can_read)
        gate, up, beside, amax_t, weight, *amax = saved
        width = 0 if beside is None else beside.shape[-1]
        dy_MK, operands, dbiases = yield from gradients(
            ctx, [[flat(grad)]], [weight], amax, True, needs[3:]
        )
        assert dy_MK is not None
        dy = dy_MK.view(ctx.shape)
        dactivation, y = dy[..., width:], None
        if trains and has_columns:
            settings = *ctx.settings, str(recipe.wgrad.b), amax_t
            given, backward = (dactivation, gate, up), gated_activation_quantize_backward
            if scales[0] is not None:
                given, backward = (*given, *scales), packed_backward
            given = *given, beside, *settings
            rooms = ctx.room_for(0, dactivation), None if up is None else ctx.room_for(1, up)
            ask = Ask(backward, given, (ctx.slots.x.columns,), tuple(seen_in(*rooms)))
            ((dgate, dup, codes_t, scales_t),) = yield [ask]
            hand_on(rooms, (dgate, dup))
            y = Quantized(codes_t, scales_t, scales_t.new_empty(0))
        else:
            given = dactivation, gate, up, *ctx.settings, trains, None, False
            ((dgate, dup, activation, _),) = yield [Ask(gated_activation_backward, given)]
            y = activation
            if trains and recipe.wgrad is not None:
                joined, columns = _joined(beside, activation), recipe.wgrad.b
                y = yield from transposed(joined, columns, ctx.slots.x)
        if trains and recipe.wgrad is None and beside is not None:
            (g,) = operands
            dweights: Any = [_weight_gradient(g, beside, activation, weight)]
        else:
            dweights = weight_gradients(operands, y, [weight], recipe)
        each = zip((dgate, dup, dy[..., :width]), needs, strict=False)
        return None, None, *(g if need else None for g, need in each), *dweights, *dbiases


def _activated(
    ctx: Any,
    gate: Tensor,
    up: Tensor | None,
    beside: Tensor | None,
    rooms: Sequence[Tensor | None],
) -> Steps[tuple[Tensor | Quantized, Tensor]]:
    """[beside | act(gate) * up] for the product, and the magnitudes for its transposed copy."""
    slot, trains = ctx.slots.x, ctx.needs_input_grad[5]
    if not fuses(ctx.recipe):
        (activation,) = yield [Ask(gated_activation, (gate, up, *ctx.settings, None))]
        y = yield from operand(_joined(beside, activation), ctx.recipe, slot)
        return y, gate.new_empty(0)
    lines = slot.rows, slot.known, slot.seen
    given = gate, up, beside, *ctx.settings, *formats(ctx.recipe, trains, slot)
    ask = Ask(gated_activation_quantize, given, lines, tuple(rooms))
    ((codes, scales, amax_t),) = yield [ask]
    kept = amax_t if slot.known is None else slot.known
    return Quantized(codes, scales, scales.new_empty(0)), kept


def _weight_gradient(g: Any, beside: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """g^T [beside | activation] in the model's dtype, without joining the two."""
    dweight, width = torch.empty_like(weight), beside.shape[-1]
    for part, columns in ((beside, slice(0, width)), (activation, slice(width, None))):
        torch.mm(g.t(), part.reshape(-1, part.shape[-1]), out=dweight[:, columns])
    return dweight


def _joined(beside: Tensor | None, activation: Tensor) -> Tensor:
    return activation if beside is None else torch.cat([beside, activation], -1)


def _plain_activation(call: Call) -> Sequence[Tensor]:
    gate, up, beside, weight, bias = call.tensors
    given = gate, up, *call.settings, beside, None, weight, bias
    return (gated_activation_linear(*given),)


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
