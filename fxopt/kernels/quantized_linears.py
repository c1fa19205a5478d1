"""Linears that share an input, their three GEMMs in the formats of a recipe, as one autograd node.

The input is quantized once, row-wise for the products and transposed for the weight gradients.
Weights stay parameters in their own dtype.

What several nodes share is here; those of a fused op and the linears behind it are in
`norm_modulate_quantized_linears` and `gated_activation_quantized_linear`.

Shapes: M tokens (all leading dims), K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import counters, linears, weight_casts
from fxopt.kernels.counters import Slot
from fxopt.kernels.delayed import slots_for
from fxopt.kernels.formats import Quantized
from fxopt.kernels.in_force import Decision, save_for_backward, saved_tensors
from fxopt.kernels.linears import Linears, Pieces, as_pieces
from fxopt.kernels.quantize import Cast, covers
from fxopt.kernels.quantize_group import quantize_columns, quantize_rows
from fxopt.kernels.quantized_gradients import (
    by_linear,
    gradients,
    measures,
    quantized,
    weight_gradients,
)
from fxopt.kernels.registration import register_composite
from fxopt.kernels.saving import is_packing
from fxopt.kernels.scaled_matmul import multiply
from fxopt.kernels.streams import Call, Streams
from fxopt.kernels.together import Ask, Steps, parts, side_by_side
from fxopt.kernels.weight_casts import Copies
from fxopt.recipes import Operand, Recipe


class QuantizedLinears(Streams):
    """x -> (x W_i^T + b_i) for several linears; for each stream.

    Keeps x's transposed codes for backward; with `keeps_x`, x itself, if it need not be copied: for
    an x that is in memory anyway, as what made it keeps it.
    """

    @staticmethod
    def forward_of(
        ctx: Any, decision: Decision, settings: tuple[bool, Pieces], *tensors: Tensor | None
    ) -> Steps[tuple[Any, ...]]:
        keeps_x, ctx.pieces = settings
        x, *parameters = tensors
        assert x is not None
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        trains = any(ctx.needs_input_grad[3 : 3 + num_linears])
        ctx.recipe, ctx.step, _ = decision
        ctx.shape, ctx.slots = x.shape, slots_for(decision, weights)
        ctx.keeps_x = keeps_x and trains and fuses(ctx.recipe) and x.is_contiguous()
        x = x.contiguous() if keeps_x else x
        (operand, kept), copies = yield from side_by_side(
            cast_x(x, ctx, trains), cast_weights(weights, ctx, ctx.needs_input_grad[2])
        )
        outs, amax = products(operand, weights, biases, ctx, x.dtype, copies)
        save_for_backward(ctx, *kept, *weights, *amax)
        ctx.num_kept = len(kept)
        return outs

    @staticmethod
    def measures(ctx: Any, output: int) -> bool:
        _, _, needs_x, *needs = ctx.needs_input_grad
        return measures(ctx, output, needs_x, needs)

    @staticmethod
    def backward_of(ctx: Any, *grads: Tensor | None) -> Steps[tuple[Any, ...]]:
        saved, recipe = saved_tensors(ctx), ctx.recipe
        _, _, needs_x, *needs = ctx.needs_input_grad
        kept, weights, amax = split(saved, ctx.num_kept, len(needs) // 2)
        of_linears = by_linear(grads, ctx.pieces, len(weights))
        trains = any(g and need for g, need in zip(of_linears, needs, strict=False))
        (dx_MK, operands, dbiases), x = yield from side_by_side(
            gradients(ctx, of_linears, weights, amax, needs_x, needs), cast_kept(kept, ctx, trains)
        )
        dweights = weight_gradients(operands, x, weights, recipe)
        dx = None if dx_MK is None else dx_MK.view(ctx.shape)
        return None, None, dx, *dweights, *dbiases


def cast_x(x: Tensor, ctx: Any, trains: bool) -> Steps[tuple[Tensor | Quantized, Sequence[Tensor]]]:
    """What the products read of x, and what is kept of it for the gradients of weights."""
    fprop, wgrad = ctx.recipe.fprop, ctx.recipe.wgrad if trains else None
    if not ctx.keeps_x:
        cast = Cast(x, fprop and fprop.a, wgrad and wgrad.b, slot=ctx.slots.x)
        (pair,) = yield from quantized(cast)
        kept = [x] if trains and wgrad is None else [*pair.columns]
        return x if fprop is None else pair.rows, kept
    slot = ctx.slots.x
    columns = wgrad.b if wgrad is not None and slot.known is None else None
    formats = str(fprop.a), None if columns is None else str(columns)
    (found,) = yield [Ask(quantize_rows, ([x], *formats), tuple(counters.lists([slot])))]
    (codes,), (scales,), (amax_t,) = found
    amax_t = amax_t if slot.known is None else slot.known
    return Quantized(codes, scales, scales.new_empty(0)), [x, amax_t]


def cast_kept(kept: Sequence[Tensor], ctx: Any, trains: bool) -> Steps[Tensor | Quantized]:
    """What the gradients of weights read of what `cast_x` kept."""
    if ctx.recipe.wgrad is None or not trains:
        return kept[0]
    if not ctx.keeps_x:
        return Quantized(*kept)
    x, amax_t = kept
    lines = counters.present([ctx.slots.x.columns])
    (found,) = yield [Ask(quantize_columns, ([x], str(ctx.recipe.wgrad.b), [amax_t]), (lines,))]
    (codes_t,), (scales_t,) = found
    return Quantized(codes_t, scales_t, scales_t.new_empty(0))


def op_of(name: str, recipe: Recipe) -> str:
    """The op behind a producer under a recipe: its form that writes codes, where it has one."""
    return f"{name}_quantize" if fuses(recipe) else name


def formats(recipe: Recipe, trains: bool, slot: Slot) -> tuple[str, str | None]:
    """How a producer quantizes for the products; and for the gradients of weights that train, where
    the magnitude for that is still to be found."""
    assert recipe.fprop is not None
    is_open = recipe.wgrad is not None and trains and slot.known is None
    columns = recipe.wgrad.b if recipe.wgrad is not None and is_open else None
    return str(recipe.fprop.a), None if columns is None else str(columns)


def operand(x: Tensor, recipe: Recipe, slot: Slot) -> Steps[Tensor | Quantized]:
    """What the products read of x."""
    if recipe.fprop is None:
        return x
    (pair,) = yield from quantized(Cast(x, recipe.fprop.a, None, slot=slot))
    return pair.rows


def transposed(x: Tensor, columns: Operand, slot: Slot) -> Steps[Quantized]:
    """What the gradients of weights read of x."""
    (pair,) = yield from quantized(Cast(x, None, columns, slot=slot))
    return pair.columns


def fuses(recipe: Recipe) -> bool:
    """Whether the copy for fprop can be cast first, and that for wgrad later in one pass."""
    fprop, wgrad = recipe.fprop, recipe.wgrad
    return fprop is not None and covers(fprop.a) and covers(None if wgrad is None else wgrad.b)


def split(saved: Sequence[Tensor], num_kept: int, num_weights: int) -> tuple[Any, Any, Any]:
    """What a node saved: its own, the weights, and what `products` returned for them."""
    end = num_kept + num_weights
    return saved[:num_kept], saved[num_kept:end], saved[end:]


def cast_weights(weights: Sequence[Tensor | None], ctx: Any, comes_back: bool) -> Steps[Copies]:
    """The copies of the weights for `products`; comes_back: whether x needs a gradient."""
    present = [w for w in weights if w is not None]
    if ctx.recipe.fprop is None:
        return Copies([], [], [])
    given = present, ctx.recipe, comes_back, ctx.slots.weights
    return (yield from weight_casts.for_products(*given))


def products(
    x: Tensor | Quantized,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    ctx: Any,
    dtype: torch.dtype,
    copies: Copies,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs of the linears, from x or from its codes; and what `gradients` takes as `amax`.

    ctx: of the node, which has its pieces, and where what `gradients` needs beside is left.
    copies: of the weights, as `cast_weights` makes them.
    """
    present, outs = [w for w in weights if w is not None], []
    ctx.columns = copies.columns
    if not isinstance(x, Quantized):
        return linears.products(x, present, biases, ctx.pieces), []
    is_apart = is_packing() and covers(ctx.recipe.fprop.b)
    for i, start, stop in ctx.pieces if is_apart else pieces_of(present, []):
        bias, copy = biases[i], copies.rows[i]
        if stop - start < len(copy.codes):
            bias, copy = None if bias is None else bias[start:stop], _rows(copy, start, stop)
        y_MN = multiply(x, copy, ctx.recipe.fprop, dtype, bias)
        outs.append(y_MN.view(*ctx.shape[:-1], stop - start))
    return tuple(outs) if is_apart else linears.in_pieces(outs, ctx.pieces), copies.amax_t


def _rows(copy: Quantized, start: int, stop: int) -> Quantized:
    """Some rows of a matrix that has one scale, or one for each row."""
    scales = copy.scales if len(copy.scales) == 1 else copy.scales[start:stop]
    return Quantized(copy.codes[start:stop], scales, copy.tensor_scale)


def pieces_of(weights: Sequence[Tensor], pieces: Sequence[int]) -> Pieces:
    """Pieces from their numbers; without any, all outputs whole."""
    return as_pieces(pieces) or tuple((i, 0, w.shape[0]) for i, w in enumerate(weights))


def pieces_by_stream(
    weights: Sequence[Sequence[Tensor]],
    pieces: Sequence[int] = (),
    num_pieces: Sequence[int] = (),
) -> list[Pieces]:
    """The same of all streams, whose pieces follow one another."""
    own = parts(pieces, [3 * num for num in num_pieces] or [0] * len(weights))
    return [pieces_of(w, p) for w, p in zip(weights, own, strict=True)]


def _plain(call: Call) -> Sequence[Tensor]:
    _, pieces = call.settings
    outs: Sequence[Tensor] = Linears.apply(pieces, *call.tensors)
    return outs


def _quantized_linears_streams(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    num_linears: Sequence[int],
    recipe: str,
    keeps_x: bool,
    *pieces: Sequence[int],
) -> list[Tensor]:
    own = parts(weights, num_linears)
    each = zip(xs, own, parts(biases, num_linears), pieces_by_stream(own, *pieces), strict=True)
    calls = [Call((keeps_x, p), (x, *w, *b), w, len(p)) for x, w, b, p in each]
    return [out for own in QuantizedLinears.run(recipe, calls, _plain) for out in own]


def _quantized_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    recipe: str,
    keeps_x: bool,
    pieces: Sequence[int] = (),
) -> list[Tensor]:
    settings = recipe, keeps_x, pieces, [len(pieces) // 3]
    return _quantized_linears_streams([x], weights, biases, [len(weights)], *settings)


quantized_linears = register_composite(
    "quantized_linears(Tensor x, Tensor[] weights, Tensor?[] biases, str recipe, bool keeps_x, "
    "int[] pieces=[]) -> Tensor[]",
    _quantized_linears,
)
# The linears and pieces of all streams follow one another; of each its `num_linears`, `num_pieces`.
quantized_linears_streams = register_composite(
    "quantized_linears_streams(Tensor[] x, Tensor[] weights, Tensor?[] biases, int[] num_linears, "
    "str recipe, bool keeps_x, int[] pieces=[], int[] num_pieces=[]) -> Tensor[]",
    _quantized_linears_streams,
)
