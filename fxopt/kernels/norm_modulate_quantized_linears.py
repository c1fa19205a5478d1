"""norm_modulate and the quantized linears on what it makes, as one autograd node for one or more
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

from fxopt.kernels.delayed import slots_for
from fxopt.kernels.formats import Quantized
from fxopt.kernels.in_force import Decision, save_for_backward, saved_tensors
from fxopt.kernels.magnitudes import hand_on, seen_in
from fxopt.kernels.native_norm_modulate import measured
from fxopt.kernels.norm_modulate import is_own, operand_gradients
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears
from fxopt.kernels.norm_modulate_segments_linears import norm_modulate_segments_linears
from fxopt.kernels.norm_modulate_segments_quantize import reading
from fxopt.kernels.norm_modulate_streams import NUM_OPERANDS
from fxopt.kernels.quantized_gradients import by_linear, gradients, measures, weight_gradients
from fxopt.kernels.quantized_linears import (
    cast_weights,
    formats,
    fuses,
    operand,
    pieces_by_stream,
    products,
    split,
    transposed,
)
from fxopt.kernels.registration import register_composite
from fxopt.kernels.saving import is_packing, kept_in, packing, read_codes, room_for
from fxopt.kernels.streams import Call, Streams
from fxopt.kernels.together import Ask, Steps, parts


class NormModulateQuantizedLinears(Streams):
    """norm_modulate, by segment where there is an index behind its operands, then linears on its y;
    h is returned as `NormModulateLinears` does.

    settings: shift_per_token, then those of norm_modulate.
    """

    @staticmethod
    def forward_of(
        ctx: Any, decision: Decision, settings: tuple[Any, ...], *tensors: Tensor | None
    ) -> Steps[tuple[Any, ...]]:
        ctx.recipe, ctx.step, _ = decision
        recipe = ctx.recipe
        operands, index, parameters = tensors[:8], tensors[8], tensors[9:]
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        trains = any(ctx.needs_input_grad[11 : 11 + num_linears])
        shift_per_token, settings, ctx.pieces = settings[0], settings[1:-1], settings[-1]
        read = reading(index, shift_per_token)
        given = *operands, *read.arguments, *settings
        x, residual, gate, *others = operands
        assert x is not None
        y: Tensor | Quantized
        slot = (slots := slots_for(decision, weights)).x
        branch = None
        if gate is not None:
            branch = x if ctx.needs_input_grad[4] else x.new_empty(0)  # for its dtype
        own = is_own(x, residual, None if read.shift_is_table else others[3]), True
        leaves_codes = fuses(recipe) or index is None
        h = x
        if is_packing() and residual is not None:
            h = torch.empty(x.shape, dtype=settings[4], device="meta")
        rooms = room_for(ctx, x, (h, branch), own) if leaves_codes else ()
        if fuses(recipe):
            lines = slot.rows, slot.known, slot.seen
            asked = *given, *formats(recipe, trains, slot)
            (found,) = yield [Ask(read.codes, asked, lines, tuple(rooms))]
            codes, scales, amax_t, h, mean, rstd = found
            amax_t = amax_t if slot.known is None else slot.known
            y = Quantized(codes, scales, scales.new_empty(0))
        else:
            ((normed, h, mean, rstd),) = yield [Ask(read.forward, given, (), tuple(rooms))]
            amax_t = x.new_empty(0)
            y = yield from operand(normed, recipe, slot)
        h = x if residual is None else h
        ctx.settings, ctx.shape, ctx.slots = settings, x.shape, slots
        ctx.shift_per_token, ctx.by_segment = shift_per_token, index is not None
        copies = yield from cast_weights(weights, ctx, any(ctx.needs_input_grad))
        outs, amax = products(y, weights, biases, ctx, settings[-1], copies)
        if leaves_codes:
            activations = kept_in(rooms, (h, branch))
        else:
            activations = yield from packing(ctx, (h, branch), own)
        kept = (*activations, gate, *others, index, mean, rstd, amax_t)
        save_for_backward(ctx, *kept, *weights, *amax)
        return *outs, h

    @staticmethod
    def measures(ctx: Any, output: int) -> bool:
        is_of_linear = output < len(ctx.pieces)  # and not h
        return is_of_linear and measures(ctx, output, True, ctx.needs_input_grad[11:])

    @staticmethod
    def backward_of(ctx: Any, *grads: Tensor | None) -> Steps[tuple[Any, ...]]:
        recipe, dtype = ctx.recipe, ctx.settings[5]
        saved, scales = yield from read_codes(ctx, saved_tensors(ctx), dtype, not ctx.by_segment)
        needs, needs_parameters = ctx.needs_input_grad[2:10], ctx.needs_input_grad[11:]
        (h, branch, gate, *others, index, mean, rstd, amax_t), weights, amax = split(
            saved, 12, len(needs_parameters) // 2
        )
        read = reading(index, ctx.shift_per_token)
        *grad_outs, grad_h = grads
        norm, eps, weight_offset, scale_offset, *_ = ctx.settings
        of_linears = by_linear(grad_outs, ctx.pieces, len(weights))
        dy_MK, operands, dbiases = yield from gradients(
            ctx, of_linears, weights, amax, True, needs_parameters
        )
        if dy_MK is None and grad_h is None:
            return (None,) * len(ctx.needs_input_grad)
        dy = None if dy_MK is None else dy_MK.view(h.shape)
        trains = any(operand is not None for operand in operands)
        has_columns = fuses(recipe) and recipe.wgrad is not None
        # The gradient of a shift per token is that of y.
        asks = [*needs[:6], needs[6] and not ctx.shift_per_token, needs[7]]
        constants = (norm, weight_offset, scale_offset, dtype, asks, trains and not has_columns)
        tensors = dy, grad_h, h, branch, gate, *others, *read.arguments, mean, rstd
        like = measured(norm, h, gate, dy) if index is None else None
        room = ctx.room_for(0, like)
        rooms = *scales, *seen_in(room)
        (found,) = yield [Ask(read.backward, (*tensors, *constants), (), rooms)]
        shift = None if read.shift_is_table else others[3]
        operand_grads = operand_gradients(found, dy, grad_h, h, gate, shift, needs)
        hand_on([room], operand_grads)
        y: Tensor | Quantized = found[-1]
        if trains and recipe.wgrad is not None:
            columns = recipe.wgrad.b
            if has_columns:
                affine, offsets = others[:4], (weight_offset, scale_offset)
                given = h, *affine, *read.arguments, mean, rstd, norm, eps, *offsets
                given = *given, dtype, str(columns), amax_t
                lines = (ctx.slots.x.columns,)
                ((codes_t, scales_t),) = yield [Ask(read.codes_t, given, lines, scales[:1])]
                y = Quantized(codes_t, scales_t, scales_t.new_empty(0))
            else:
                y = yield from transposed(found[-1], columns, ctx.slots.x)
        dweights = weight_gradients(operands, y, weights, recipe)
        return None, None, *operand_grads, None, *dweights, *dbiases


def _plain_norm(call: Call) -> Sequence[Tensor]:
    """The outputs of a call that quantizes nothing now."""
    operands, index = call.tensors[:NUM_OPERANDS], call.tensors[NUM_OPERANDS]
    biases = call.tensors[NUM_OPERANDS + 1 + len(call.weights) :]
    shift_per_token, *settings, pieces = call.settings
    numbers = [i for piece in pieces for i in piece]
    op, arguments = norm_modulate_linears, reading(index, shift_per_token).arguments
    if arguments:
        op = norm_modulate_segments_linears
    outs, h = op(*operands, *arguments, *settings, call.weights, biases, numbers)
    return *outs, h


def norm_linears_streams(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What the linears of each stream make, and h of each; with an index and whether the shift is
    per token behind the operands."""
    *operands, shift_per_token, norm, eps, weight_offset, scale_offset, h_dtype, dtype = args[:16]
    weights, biases, num_linears, recipe, *pieces = args[16:]
    own = parts(weights, num_linears)
    each = zip(
        *(zip(*operands, strict=True), own, parts(biases, num_linears)),
        zip(shift_per_token, eps, weight_offset, scale_offset, strict=True),
        pieces_by_stream(own, *pieces),
        strict=True,
    )
    calls = [
        Call((per_token, norm, *n, h_dtype, dtype, p), (*tensors, *w, *b), w, len(p) + 1)
        for tensors, w, b, (per_token, *n), p in each
    ]
    found = NormModulateQuantizedLinears.run(recipe, calls, _plain_norm)
    return [out for own in found for out in own[:-1]], [own[-1] for own in found]


def norm_linears(*args: Any) -> tuple[list[Tensor], Tensor]:
    """`norm_linears_streams` of one stream."""
    tensors, settings = args[: NUM_OPERANDS + 1], args[NUM_OPERANDS + 1 : 16]
    weights, biases, recipe, *numbers = args[16:]
    (pieces,) = pieces_by_stream([weights], *numbers, *([len(n) // 3] for n in numbers))
    given = *tensors, *weights, *biases
    call = Call((*settings, pieces), given, weights, len(pieces) + 1)
    ((*outs, h),) = NormModulateQuantizedLinears.run(recipe, [call], _plain_norm)
    return outs, h


def _norm_modulate_quantized_linears_streams(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    operands, num = args[:NUM_OPERANDS], len(args[0])
    return norm_linears_streams(*operands, [None] * num, [False] * num, *args[NUM_OPERANDS:])


def _norm_modulate_quantized_linears(*args: Any) -> tuple[list[Tensor], Tensor]:
    return norm_linears(*args[:NUM_OPERANDS], None, False, *args[NUM_OPERANDS:])


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
