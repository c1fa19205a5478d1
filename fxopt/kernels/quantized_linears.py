"""Linears that share an input, their three GEMMs in the formats of a recipe, as one autograd node.

The input is quantized once, row-wise for the products and transposed for the weight gradients.
Weights stay parameters in their own dtype.

What several nodes share is here; those of a fused op and the linears behind it are in
`quantized_composites`.

Shapes: M tokens (all leading dims), K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import counters, weight_casts
from fxopt.kernels.counters import Slot
from fxopt.kernels.delayed import slots_for
from fxopt.kernels.formats import Quantized
from fxopt.kernels.in_force import Decision, save_for_backward, saved_tensors
from fxopt.kernels.linears import Linears
from fxopt.kernels.quantize import Cast, Pair, covers, pair_of
from fxopt.kernels.quantize_group import quantize_columns, quantize_rows
from fxopt.kernels.registration import register_composite
from fxopt.kernels.scaled_matmul import multiply
from fxopt.kernels.streams import Call, Streams
from fxopt.kernels.sum_parts import sum_parts
from fxopt.kernels.together import Ask, Steps, parts, side_by_side
from fxopt.kernels.weight_casts import Copies
from fxopt.recipes import Recipe


class QuantizedLinears(Streams):
    """x -> (x W_i^T + b_i) for several linears; for each stream.

    Keeps x's transposed codes for backward; with `keeps_x`, x itself, if it need not be copied: for
    an x that is in memory anyway, as what made it keeps it.
    """

    @staticmethod
    def forward_of(
        ctx: Any, decision: Decision, keeps_x: Any, *tensors: Tensor | None
    ) -> Steps[tuple[Any, ...]]:
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
    def backward_of(ctx: Any, *grads: Tensor | None) -> Steps[tuple[Any, ...]]:
        saved, recipe = saved_tensors(ctx), ctx.recipe
        kept, weights, amax = split(saved, ctx.num_kept, len(grads))
        _, _, needs_x, *needs = ctx.needs_input_grad
        trains = any(g is not None and need for g, need in zip(grads, needs, strict=False))
        (dx_MK, operands, dbiases), x = yield from side_by_side(
            gradients(ctx, grads, weights, amax, needs_x, needs), cast_kept(kept, ctx, trains)
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

    ctx: of the node, where what `gradients` needs beside is left.
    copies: of the weights, as `cast_weights` makes them.
    """
    present, outs = [w for w in weights if w is not None], []
    ctx.columns = copies.columns
    if not isinstance(x, Quantized):
        return tuple(F.linear(x, w, b) for w, b in zip(present, biases, strict=True)), []
    for copy, weight, bias in zip(copies.rows, present, biases, strict=True):
        y_MN = multiply(x, copy, ctx.recipe.fprop, dtype, bias)
        outs.append(y_MN.view(*ctx.shape[:-1], weight.shape[0]))
    return tuple(outs), copies.amax_t


def gradients(
    ctx: Any,
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    amax: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> Steps[tuple[Tensor | None, list[Tensor | Quantized | None], list[Tensor | None]]]:
    """The gradient of x [M, K]; for each linear the wgrad operand of its gradient, if its weight
    needs one; and the gradients of the biases. `needs` is of all weights, then of all biases."""
    recipe: Recipe = ctx.recipe
    products_MK: list[Tensor] = []
    operands: list[Tensor | Quantized | None] = [None] * len(grads)
    dbiases: list[Tensor | None] = [None] * len(grads)
    present = [i for i, grad in enumerate(grads) if grad is not None]
    used = [weights[i] for i in present]
    factors: Sequence[Tensor | Quantized] = used
    if recipe.dgrad is not None and needs_x:
        if ctx.columns:
            factors = [weight_casts.columns_of(ctx.columns[i]) for i in present]
        else:
            found = [amax[i] for i in present] if amax else []
            slots = [ctx.slots.weights[i] for i in present]
            factors = yield from weight_casts.for_gradients(used, found, recipe, slots)
    casts = []
    for i in present:
        g_MN, needed = _flat(grads[i]), (needs_x, needs[i], needs[len(grads) + i])
        casts.append(_of_gradient(g_MN, recipe, *needed, ctx.slots.gradients[i]))
    pairs = yield from quantized(*casts)
    for i, factor, cast, pair in zip(present, factors, casts, pairs, strict=True):
        if needs_x:
            products_MK.append(_input_gradient(cast.x, pair.rows, factor, recipe))
        if needs[i]:
            operands[i] = cast.x if recipe.wgrad is None else pair.columns
        if cast.wants_sum:
            dbiases[i] = pair.sum
    dx_MK = sum_parts(products_MK) if len(products_MK) > 1 else next(iter(products_MK), None)
    return dx_MK, operands, dbiases


def _flat(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.reshape(-1, grad.shape[-1])


def quantized(*casts: Cast) -> Steps[list[Pair]]:
    """The copies of each tensor; nothing is launched for one that has none but its sum."""
    is_cast = [cast.rows is not None or cast.columns is not None for cast in casts]
    found = iter((yield [c.ask() for c, needed in zip(casts, is_cast, strict=True) if needed]))
    return [
        pair_of(next(found)) if needed else _nothing(cast)
        for cast, needed in zip(casts, is_cast, strict=True)
    ]


def _nothing(cast: Cast) -> Pair:
    empty = Quantized(*[cast.x.new_empty(0) for _ in range(3)])
    return Pair(empty, empty, cast.x.sum(0) if cast.wants_sum else cast.x.new_empty(0))


def _of_gradient(
    g_MN: Tensor, recipe: Recipe, for_input: bool, for_weight: bool, for_bias: bool, slot: Slot
) -> Cast:
    rows = recipe.dgrad.a if recipe.dgrad and for_input else None
    columns = recipe.wgrad.a if recipe.wgrad and for_weight else None
    seed = None
    if any(operand is not None and operand.stochastic for operand in (rows, columns)):
        seed = torch.randint(2**62, (1,), device=g_MN.device)
    return Cast(g_MN, rows, columns, seed, for_bias, slot)


def _input_gradient(
    g_MN: Tensor, rows: Quantized, factor: Tensor | Quantized, recipe: Recipe
) -> Tensor:
    """g W, for a weight or its transposed copy."""
    if recipe.dgrad is None:
        assert isinstance(factor, Tensor)
        return g_MN @ factor
    assert isinstance(factor, Quantized)
    return multiply(rows, factor, recipe.dgrad, g_MN.dtype)


def weight_gradients(
    operands: Sequence[Tensor | Quantized | None],
    x: Tensor | Quantized,
    weights: Sequence[Tensor],
    recipe: Recipe,
) -> list[Tensor | None]:
    return [
        None if operand is None else _weight_gradient(operand, x, weight, recipe)
        for operand, weight in zip(operands, weights, strict=True)
    ]


def _weight_gradient(
    g: Tensor | Quantized, x: Tensor | Quantized, weight: Tensor, recipe: Recipe
) -> Tensor:
    if isinstance(g, Quantized) and isinstance(x, Quantized):
        assert recipe.wgrad is not None
        return multiply(g, x, recipe.wgrad, weight.dtype)
    assert isinstance(g, Tensor) and isinstance(x, Tensor)
    return g.t() @ x.reshape(-1, x.shape[-1])


def whole(weights: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    return tuple((i, 0, w.shape[0]) for i, w in enumerate(weights))


def _plain(call: Call) -> Sequence[Tensor]:
    outs: Sequence[Tensor] = Linears.apply(whole(call.weights), *call.tensors)
    return outs


def _quantized_linears_streams(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    num_linears: Sequence[int],
    recipe: str,
    keeps_x: bool,
) -> list[Tensor]:
    parameters = parts(weights, num_linears), parts(biases, num_linears)
    calls = [Call(keeps_x, (x, *w, *b), w, len(w)) for x, w, b in zip(xs, *parameters, strict=True)]
    return [out for own in QuantizedLinears.run(recipe, calls, _plain) for out in own]


def _quantized_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *settings: Any
) -> list[Tensor]:
    return _quantized_linears_streams([x], weights, biases, [len(weights)], *settings)


quantized_linears = register_composite(
    "quantized_linears(Tensor x, Tensor[] weights, Tensor?[] biases, str recipe, bool keeps_x) -> "
    "Tensor[]",
    _quantized_linears,
)
# The linears of all streams follow one another; of each its `num_linears`.
quantized_linears_streams = register_composite(
    "quantized_linears_streams(Tensor[] x, Tensor[] weights, Tensor?[] biases, int[] num_linears, "
    "str recipe, bool keeps_x) -> Tensor[]",
    _quantized_linears_streams,
)
