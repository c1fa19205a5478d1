"""Linears that share an input, their three GEMMs in the formats of a recipe, as one autograd node.

The input is quantized once, row-wise for the products and transposed for the weight gradients;
the transposed copy is what is kept for backward. Weights are quantized where they are used and
stay parameters in their own dtype.

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

from fxopt.kernels.formats import Quantized
from fxopt.kernels.linears import Linears, without_autocast
from fxopt.kernels.quantize import Pair, quantize_pair
from fxopt.kernels.registration import register_composite
from fxopt.kernels.scaled_matmul import multiply
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
        pair = _quantize(x, fprop and fprop.a, wgrad.b if wgrad and trains else None)
        kept = [x] if trains and not wgrad else list(pair.columns)
        ctx.save_for_backward(*weights, *kept)
        ctx.recipe, ctx.shape, ctx.dtype = recipe, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        outs = []
        for weight, bias in zip(weights, biases, strict=True):
            assert weight is not None
            if fprop is None:
                outs.append(F.linear(x, weight, bias))
                continue
            rows = _quantize(weight, fprop.b, None).rows
            y_MN = multiply(pair.rows, rows, fprop, x.dtype, bias)
            outs.append(y_MN.view(*x.shape[:-1], weight.shape[0]))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        num_linears = len(grads)
        saved = ctx.saved_tensors
        weights, kept = saved[:num_linears], saved[num_linears:]
        _, needs_x, *needs = ctx.needs_input_grad
        dx_MK: Tensor | None = None
        dweights: list[Tensor | None] = [None] * num_linears
        dbiases: list[Tensor | None] = [None] * num_linears
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is None:
                continue
            g_MN = grad.reshape(-1, grad.shape[-1])
            pair = _quantize_gradient(g_MN, ctx.recipe, needs_x, needs[i])
            if needs_x:
                part = _input_gradient(g_MN, pair.rows, weight, ctx.recipe)
                dx_MK = part if dx_MK is None else dx_MK.add_(part)
            if needs[i]:
                dweights[i] = _weight_gradient(g_MN, pair.columns, kept, weight, ctx.recipe)
            if needs[num_linears + i]:
                dbiases[i] = g_MN.sum(0)
        return None, None if dx_MK is None else dx_MK.view(ctx.shape), *dweights, *dbiases


def _quantize(x: Tensor, rows: Any, columns: Any, seed: Tensor | None = None) -> Pair:
    if rows is None and columns is None:
        nothing = Quantized(*[x.new_empty(0) for _ in range(3)])
        return Pair(nothing, nothing)
    return quantize_pair(x, rows, columns, seed)


def _quantize_gradient(g_MN: Tensor, recipe: Recipe, for_input: bool, for_weight: bool) -> Pair:
    rows = recipe.dgrad.a if recipe.dgrad and for_input else None
    columns = recipe.wgrad.a if recipe.wgrad and for_weight else None
    seed = None
    if any(operand is not None and operand.stochastic for operand in (rows, columns)):
        seed = torch.randint(2**62, (1,), device=g_MN.device)
    return _quantize(g_MN, rows, columns, seed)


def _input_gradient(g_MN: Tensor, rows: Quantized, weight: Tensor, recipe: Recipe) -> Tensor:
    if recipe.dgrad is None:
        return g_MN @ weight
    columns = _quantize(weight, None, recipe.dgrad.b).columns
    return multiply(rows, columns, recipe.dgrad, g_MN.dtype)


def _weight_gradient(
    g_MN: Tensor, columns: Quantized, kept: Sequence[Tensor], weight: Tensor, recipe: Recipe
) -> Tensor:
    if recipe.wgrad is None:
        (x,) = kept
        return g_MN.t() @ x.reshape(-1, x.shape[-1])
    return multiply(columns, Quantized(*kept), recipe.wgrad, weight.dtype)


def _quantized_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], recipe: str
) -> list[Tensor]:
    if is_high_precision():
        pieces = tuple((i, 0, w.shape[0]) for i, w in enumerate(weights))
        return list(Linears.apply(pieces, x, *weights, *biases))
    return list(QuantizedLinears.apply(find(recipe), x, *weights, *biases))


quantized_linears = register_composite(
    "quantized_linears(Tensor x, Tensor[] weights, Tensor?[] biases, str recipe) -> Tensor[]",
    _quantized_linears,
)
