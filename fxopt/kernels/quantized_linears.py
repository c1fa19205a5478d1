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
from torch.autograd.function import once_differentiable

from fxopt.kernels import counters, weight_casts
from fxopt.kernels.counters import UNWATCHED, Slot
from fxopt.kernels.delayed import slots_for
from fxopt.kernels.formats import Quantized
from fxopt.kernels.in_force import Decision, decide, save_for_backward, saved_tensors
from fxopt.kernels.linears import Linears, without_autocast
from fxopt.kernels.quantize import Pair, covers, quantize_pair
from fxopt.kernels.quantize_group import quantize_columns, quantize_rows
from fxopt.kernels.registration import call_counting, register_composite
from fxopt.kernels.scaled_matmul import multiply
from fxopt.kernels.sum_parts import sum_parts
from fxopt.recipes import Recipe


class QuantizedLinears(torch.autograd.Function):
    """x -> (x W_i^T + b_i) for several linears.

    Keeps x's transposed codes for backward; with `keeps_x`, x itself, if it need not be copied: for
    an x that is in memory anyway, as what made it keeps it.
    """

    @staticmethod
    def forward(
        ctx: Any, decision: Decision, keeps_x: bool, x: Tensor, *parameters: Tensor | None
    ) -> Any:
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        trains = any(ctx.needs_input_grad[3 : 3 + num_linears])
        ctx.recipe, ctx.step, _ = decision
        recipe = ctx.recipe
        fprop, wgrad = recipe.fprop, recipe.wgrad if trains else None
        ctx.shape, ctx.slots = x.shape, slots_for(decision, weights)
        ctx.keeps_x = keeps_x and trains and fuses(recipe) and x.is_contiguous()
        x = x.contiguous() if keeps_x else x
        ctx.set_materialize_grads(False)
        operand: Tensor | Quantized
        if ctx.keeps_x:
            slot = ctx.slots.x
            columns = wgrad.b if wgrad is not None and slot.known is None else None
            formats = str(fprop and fprop.a), None if columns is None else str(columns)
            lines = counters.lists([slot])
            (codes,), (scales,), (amax_t,) = call_counting(quantize_rows, lines, [x], *formats)
            operand = Quantized(codes, scales, scales.new_empty(0))
            kept = [x, amax_t if slot.known is None else slot.known]
        else:
            pair = quantized(x, fprop and fprop.a, wgrad and wgrad.b, slot=ctx.slots.x)
            operand, kept = x if fprop is None else pair.rows, list(pair.columns)
            kept = [x] if trains and wgrad is None else kept
        outs, amax = products(operand, weights, biases, ctx, x.dtype, ctx.needs_input_grad[2])
        save_for_backward(ctx, *kept, *weights, *amax)
        ctx.num_kept = len(kept)
        return outs

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved, recipe = saved_tensors(ctx), ctx.recipe
        kept, weights, amax = split(saved, ctx.num_kept, len(grads))
        _, _, needs_x, *needs = ctx.needs_input_grad
        dx_MK, operands, dbiases = gradients(ctx, grads, weights, amax, needs_x, needs)
        x: Tensor | Quantized = kept[0]
        if recipe.wgrad is not None and ctx.keeps_x and any(o is not None for o in operands):
            lines = counters.present([ctx.slots.x.columns])
            matrix = [kept[0]], str(recipe.wgrad.b), [kept[1]]
            (codes_t,), (scales_t,) = call_counting(quantize_columns, [lines], *matrix)
            x = Quantized(codes_t, scales_t, scales_t.new_empty(0))
        elif recipe.wgrad is not None:
            x = Quantized(*kept[:3])
        dweights = weight_gradients(operands, x, weights, recipe)
        dx = None if dx_MK is None else dx_MK.view(ctx.shape)
        return None, None, dx, *dweights, *dbiases


def fuses(recipe: Recipe) -> bool:
    """Whether the copy for fprop can be cast first, and that for wgrad later in one pass."""
    fprop, wgrad = recipe.fprop, recipe.wgrad
    return fprop is not None and covers(fprop.a) and covers(None if wgrad is None else wgrad.b)


def split(saved: Sequence[Tensor], num_kept: int, num_weights: int) -> tuple[Any, Any, Any]:
    """What a node saved: its own, the weights, and what `products` returned for them."""
    end = num_kept + num_weights
    return saved[:num_kept], saved[num_kept:end], saved[end:]


def products(
    x: Tensor | Quantized,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    ctx: Any,
    dtype: torch.dtype,
    comes_back: bool,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs of the linears, from x or from its codes; and what `gradients` takes as `amax`.

    ctx: of the node, where what `gradients` needs beside is left.
    comes_back: whether x needs a gradient.
    """
    ctx.columns = []
    present = [w for w in weights if w is not None]
    if not isinstance(x, Quantized):
        return tuple(F.linear(x, w, b) for w, b in zip(present, biases, strict=True)), []
    copies = weight_casts.for_products(present, ctx.recipe, comes_back, ctx.slots.weights)
    ctx.columns, outs = copies.columns, []
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
) -> tuple[Tensor | None, list[Tensor | Quantized | None], list[Tensor | None]]:
    """The gradient of x [M, K]; for each linear the wgrad operand of its gradient, if its weight
    needs one; and the gradients of the biases. `needs` is of all weights, then of all biases."""
    recipe: Recipe = ctx.recipe
    parts: list[Tensor] = []
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
            factors = weight_casts.for_gradients(used, found, recipe, slots)
    for i, factor in zip(present, factors, strict=True):
        needs_weight, needs_bias = needs[i], needs[len(grads) + i]
        grad = grads[i]
        assert grad is not None
        g_MN = grad.reshape(-1, grad.shape[-1])
        needed = needs_x, needs_weight, needs_bias
        pair = _quantize_gradient(g_MN, recipe, *needed, ctx.slots.gradients[i])
        if needs_x:
            parts.append(_input_gradient(g_MN, pair.rows, factor, recipe))
        if needs_weight:
            operands[i] = g_MN if recipe.wgrad is None else pair.columns
        if needs_bias:
            dbiases[i] = pair.sum
    dx_MK = sum_parts(parts) if len(parts) > 1 else next(iter(parts), None)
    return dx_MK, operands, dbiases


def quantized(
    x: Tensor,
    rows: Any,
    columns: Any,
    seed: Tensor | None = None,
    wants_sum: bool = False,
    slot: Slot = UNWATCHED,
) -> Pair:
    if rows is None and columns is None:
        nothing = Quantized(*[x.new_empty(0) for _ in range(3)])
        return Pair(nothing, nothing, x.sum(0) if wants_sum else x.new_empty(0))
    return quantize_pair(x, rows, columns, seed, wants_sum, slot)


def _quantize_gradient(
    g_MN: Tensor, recipe: Recipe, for_input: bool, for_weight: bool, for_bias: bool, slot: Slot
) -> Pair:
    rows = recipe.dgrad.a if recipe.dgrad and for_input else None
    columns = recipe.wgrad.a if recipe.wgrad and for_weight else None
    seed = None
    if any(operand is not None and operand.stochastic for operand in (rows, columns)):
        seed = torch.randint(2**62, (1,), device=g_MN.device)
    return quantized(g_MN, rows, columns, seed, for_bias, slot)


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


def _quantized_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], recipe: str, keeps_x: bool
) -> list[Tensor]:
    decision = decide(recipe, weights)
    if decision is None:
        return list(Linears.apply(whole(weights), x, *weights, *biases))
    return list(QuantizedLinears.apply(decision, keeps_x, x, *weights, *biases))


quantized_linears = register_composite(
    "quantized_linears(Tensor x, Tensor[] weights, Tensor?[] biases, str recipe, bool keeps_x) -> "
    "Tensor[]",
    _quantized_linears,
)
