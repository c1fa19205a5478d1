"""Linears that share an input, their three GEMMs in the formats of a recipe, as one autograd node.

The input is quantized once, row-wise for the products and transposed for the weight gradients; the
transposed copy is what is kept for backward. Weights stay parameters in their own dtype.

What several nodes share is here; those of a fused op and the linears behind it are in
`quantized_composites`.

Shapes: M tokens (all leading dims), K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels import weight_casts
from fxopt.kernels.formats import Quantized
from fxopt.kernels.linears import Linears, without_autocast
from fxopt.kernels.quantize import Pair, quantize_pair
from fxopt.kernels.registration import register_composite
from fxopt.kernels.scaled_matmul import multiply
from fxopt.kernels.sum_parts import sum_parts
from fxopt.kernels.weight_casts import WeightCasts
from fxopt.recipes import Recipe, find

_off: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def high_precision() -> Iterator[None]:
    """Multiply in the model's own dtype, to see what else a rewrite changes."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def is_high_precision() -> bool:
    """Whether `high_precision` is on."""
    return _off.get()


class QuantizedLinears(torch.autograd.Function):
    """x -> (x W_i^T + b_i) for several linears."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, x: Tensor, *parameters: Tensor | None) -> Any:
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        trains = any(ctx.needs_input_grad[2 : 2 + num_linears])
        fprop, wgrad = recipe.fprop, recipe.wgrad
        pair = quantized(x, fprop and fprop.a, wgrad.b if wgrad and trains else None)
        kept = [x] if trains and not wgrad else list(pair.columns)
        ctx.save_for_backward(*weights, *kept)
        ctx.recipe, ctx.shape, ctx.casts = recipe, x.shape, weight_casts.active()
        ctx.set_materialize_grads(False)
        return products(x if fprop is None else pair.rows, weights, biases, ctx, x.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        weights, kept = saved[: len(grads)], saved[len(grads) :]
        _, needs_x, *needs = ctx.needs_input_grad
        dx_MK, operands, dbiases = gradients(ctx, grads, weights, needs_x, needs)
        x = kept[0] if ctx.recipe.wgrad is None else Quantized(*kept)
        dweights = weight_gradients(operands, x, weights, ctx.recipe)
        return None, None if dx_MK is None else dx_MK.view(ctx.shape), *dweights, *dbiases


def products(
    x: Tensor | Quantized,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    ctx: Any,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Outputs of the linears, from x or from its codes."""
    fprop, outs = ctx.recipe.fprop, []
    for weight, bias in zip(weights, biases, strict=True):
        assert weight is not None
        if not isinstance(x, Quantized):
            outs.append(F.linear(x, weight, bias))
            continue
        pair = _kept(ctx, weight) or quantized(weight, fprop.b, None)
        y_MN = multiply(x, pair.rows, fprop, dtype, bias)
        outs.append(y_MN.view(*ctx.shape[:-1], weight.shape[0]))
    return tuple(outs)


def _kept(ctx: Any, weight: Tensor) -> Pair | None:
    casts: WeightCasts | None = ctx.casts
    return None if casts is None else casts.of(weight, ctx.recipe)


def gradients(
    ctx: Any,
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | Quantized | None], list[Tensor | None]]:
    """The gradient of x [M, K]; for each linear the wgrad operand of its gradient, if its weight
    needs one; and the gradients of the biases. `needs` is of all weights, then of all biases."""
    recipe: Recipe = ctx.recipe
    parts: list[Tensor] = []
    operands: list[Tensor | Quantized | None] = [None] * len(grads)
    dbiases: list[Tensor | None] = [None] * len(grads)
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if grad is None:
            continue
        needs_weight, needs_bias = needs[i], needs[len(grads) + i]
        g_MN = grad.reshape(-1, grad.shape[-1])
        pair = _quantize_gradient(g_MN, recipe, needs_x, needs_weight, needs_bias)
        if needs_x:
            parts.append(_input_gradient(g_MN, pair.rows, weight, ctx))
        if needs_weight:
            operands[i] = g_MN if recipe.wgrad is None else pair.columns
        if needs_bias:
            dbiases[i] = pair.sum
    dx_MK = sum_parts(parts) if len(parts) > 1 else next(iter(parts), None)
    return dx_MK, operands, dbiases


def quantized(
    x: Tensor, rows: Any, columns: Any, seed: Tensor | None = None, wants_sum: bool = False
) -> Pair:
    if rows is None and columns is None:
        nothing = Quantized(*[x.new_empty(0) for _ in range(3)])
        return Pair(nothing, nothing, x.sum(0) if wants_sum else x.new_empty(0))
    return quantize_pair(x, rows, columns, seed, wants_sum)


def _quantize_gradient(
    g_MN: Tensor, recipe: Recipe, for_input: bool, for_weight: bool, for_bias: bool
) -> Pair:
    rows = recipe.dgrad.a if recipe.dgrad and for_input else None
    columns = recipe.wgrad.a if recipe.wgrad and for_weight else None
    seed = None
    if any(operand is not None and operand.stochastic for operand in (rows, columns)):
        seed = torch.randint(2**62, (1,), device=g_MN.device)
    return quantized(g_MN, rows, columns, seed, for_bias)


def _input_gradient(g_MN: Tensor, rows: Quantized, weight: Tensor, ctx: Any) -> Tensor:
    dgrad = ctx.recipe.dgrad
    if dgrad is None:
        return g_MN @ weight
    pair = _kept(ctx, weight) or quantized(weight, None, dgrad.b)
    return multiply(rows, pair.columns, dgrad, g_MN.dtype)


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
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], recipe: str
) -> list[Tensor]:
    if is_high_precision():
        return list(Linears.apply(whole(weights), x, *weights, *biases))
    return list(QuantizedLinears.apply(find(recipe), x, *weights, *biases))


quantized_linears = register_composite(
    "quantized_linears(Tensor x, Tensor[] weights, Tensor?[] biases, str recipe) -> Tensor[]",
    _quantized_linears,
)
