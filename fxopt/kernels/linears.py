"""Linears that share an input, and the op that makes that input, as one autograd node.

A linear keeps its input for its weight gradient. Where a fused op makes that input from tensors
that are kept anyway, the pair keeps only those: the backward of the op makes the input once more in
the pass that it does in any case. Linears on one input add up its gradient inside their GEMMs.

The backward of a linear whose output is split runs one product per piece, on rows of its one
weight: the gradients of the pieces then need not be joined.

Shapes: T tokens (all leading dims), K input features, N output features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.norm_modulate import (
    norm_modulate,
    norm_modulate_backward,
    operand_gradients,
)
from fxopt.kernels.registration import below_autograd, register_composite

Backward = TypeVar("Backward", bound=Callable[..., Any])


def without_autocast(backward: Backward) -> Backward:
    """A backward called under autocast computes in the dtypes of its forward all the same."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((g.device.type for g in grads if g is not None), "meta")
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return backward(ctx, *grads)
        return backward(ctx, *grads)

    return cast("Backward", run)


# For each output: which linear, and which rows of its weight, first and last + 1.
Pieces = tuple[tuple[int, int, int], ...]


class Linears(torch.autograd.Function):
    """x -> (x W_i^T + b_i) for several linears."""

    @staticmethod
    def forward(ctx: Any, pieces: Pieces, x: Tensor, *parameters: Tensor | None) -> Any:
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        ctx.save_for_backward(x, *weights)
        ctx.pieces = pieces
        ctx.set_materialize_grads(False)
        return _forward(x, weights, biases, pieces)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, *weights = ctx.saved_tensors
        _, needs_x, *needs = ctx.needs_input_grad
        dx = input_gradient(grads, weights, ctx.pieces, x.shape) if needs_x else None
        return None, dx, *parameter_gradients(grads, x, weights, ctx.pieces, needs)


class NormModulateLinears(torch.autograd.Function):
    """norm_modulate, then linears on its y: y is not kept.

    Without a residual, h is x itself, for those that go on with x: their gradient then comes back
    through this node, which adds it in its own pass.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], pieces: Pieces, *tensors: Tensor | None
    ) -> Any:
        operands, parameters = tensors[:8], tensors[8:]
        num_linears = len(parameters) // 2
        weights, biases = parameters[:num_linears], parameters[num_linears:]
        y, h, mean, rstd = below_autograd(norm_modulate, *operands, *settings)
        x, residual, gate, *others = operands
        h = x if residual is None else h
        branch = x if gate is not None else None
        ctx.save_for_backward(h, branch, gate, *others, mean, rstd, *weights)
        ctx.settings, ctx.pieces = settings, pieces
        ctx.set_materialize_grads(False)
        return (*_forward(y, weights, biases, pieces), h)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        (h, branch, gate, *others, mean, rstd), weights = saved[:10], saved[10:]
        *grad_outs, grad_h = grads
        norm, _, weight_offset, scale_offset, _, dtype = ctx.settings
        needs, needs_parameters = ctx.needs_input_grad[2:10], ctx.needs_input_grad[10:]
        dy = input_gradient(grad_outs, weights, ctx.pieces, h.shape)
        if dy is None and grad_h is None:
            return (None,) * len(ctx.needs_input_grad)
        recompute = dy is not None and any(needs_parameters)
        constants = (norm, weight_offset, scale_offset, dtype, needs, recompute)
        found = norm_modulate_backward(dy, grad_h, h, branch, gate, *others, mean, rstd, *constants)
        operand_grads = operand_gradients(found, dy, grad_h, h, gate, others[3], needs)
        y = found[-1]
        parameter_grads = parameter_gradients(grad_outs, y, weights, ctx.pieces, needs_parameters)
        return None, None, *operand_grads, *parameter_grads


class GatedActivationLinear(torch.autograd.Function):
    """[beside | act(gate) * up] -> linear: neither the activation nor the concatenation is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[str, str],
        gate: Tensor,
        up: Tensor | None,
        beside: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, beside, weight)
        ctx.settings = settings
        y = below_autograd(gated_activation, gate, up, *settings)
        if beside is None:
            return F.linear(y, weight, bias)
        # Two products into one output instead of a copy of both operands into one input. The first
        # writes where it is told: a checkpoint may keep what a product returns, as it was.
        width = beside.shape[-1]
        out = y.new_empty(*y.shape[:-1], weight.shape[0])
        out_TN, first = _flat(out), (_flat(beside), weight[:, :width].t())
        if bias is None:
            torch.mm(*first, out=out_TN)
        else:
            torch.addmm(bias, *first, out=out_TN)
        out_TN.addmm_(_flat(y), weight[:, width:].t())
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up, beside, weight = ctx.saved_tensors
        _, needs_gate, needs_up, needs_beside, needs_weight, needs_bias = ctx.needs_input_grad
        width = 0 if beside is None else beside.shape[-1]
        grad_TN = _flat(grad)
        d_input = (grad_TN @ weight).view(*gate.shape[:-1], weight.shape[1])
        dgate, dup, y = torch.ops.fxopt.gated_activation_backward(
            d_input[..., width:], gate, up, *ctx.settings, needs_weight
        )
        dweight = None
        if needs_weight:
            dweight = torch.empty_like(weight)
            torch.mm(grad_TN.t(), _flat(y), out=dweight[:, width:])
            if beside is not None:
                torch.mm(grad_TN.t(), _flat(beside), out=dweight[:, :width])
        return (
            None,
            dgate if needs_gate else None,
            dup if needs_up else None,
            d_input[..., :width] if needs_beside else None,
            dweight,
            grad_TN.sum(0) if needs_bias else None,
        )


def _forward(
    x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor | None], pieces: Pieces
) -> tuple[Tensor, ...]:
    wholes = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return tuple(
        y if (y := wholes[i]).shape[-1] == stop - start else y[..., start:stop]
        for i, start, stop in pieces
    )


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def input_gradient(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], pieces: Pieces, shape: torch.Size
) -> Tensor | None:
    """sum_i g_i W_i [*shape], accumulated in the GEMMs; None if no output has a gradient."""
    dx_TK: Tensor | None = None
    for grad, (i, start, stop) in zip(grads, pieces, strict=True):
        if grad is None:
            continue
        rows = weights[i][start:stop]
        dx_TK = _flat(grad) @ rows if dx_TK is None else dx_TK.addmm_(_flat(grad), rows)
    return None if dx_TK is None else dx_TK.view(shape)


def parameter_gradients(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    pieces: Pieces,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of all weights, then of all biases; `needs` in that order."""
    num_linears = len(weights)
    dweights: list[Tensor | None] = [None] * num_linears
    dbiases: list[Tensor | None] = [None] * num_linears
    for grad, (i, start, stop) in zip(grads, pieces, strict=True):
        if grad is None:
            continue
        whole = stop - start == weights[i].shape[0]
        if needs[i] and whole:
            dweights[i] = _flat(grad).t() @ _flat(x)
        elif needs[i]:
            dweight = _buffer(dweights, i, weights[i], pieces, grads)
            torch.mm(_flat(grad).t(), _flat(x), out=dweight[start:stop])
        if needs[num_linears + i] and whole:
            dbiases[i] = _flat(grad).sum(0)
        elif needs[num_linears + i]:
            dbias = _buffer(dbiases, i, weights[i][:, 0], pieces, grads)
            torch.sum(_flat(grad), 0, out=dbias[start:stop])
    return [*dweights, *dbiases]


def _buffer(
    buffers: list[Tensor | None],
    i: int,
    like: Tensor,
    pieces: Pieces,
    grads: Sequence[Tensor | None],
) -> Tensor:
    """The gradient of parameter `i` while its pieces come in; zero where a piece has none."""
    if buffers[i] is None:
        complete = all(g is not None for g, p in zip(grads, pieces, strict=True) if p[0] == i)
        buffers[i] = torch.empty_like(like) if complete else torch.zeros_like(like)
    return buffers[i]  # type: ignore[return-value]


def _pieces(flat: list[int]) -> Pieces:
    return tuple(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def _linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], pieces: list[int]
) -> list[Tensor]:
    return list(Linears.apply(_pieces(pieces), x, *weights, *biases))


def _norm_modulate_linears(*args: Any) -> tuple[list[Tensor], Tensor]:
    operands, settings, (weights, biases, pieces) = args[:8], args[8:14], args[14:]
    *outs, h = NormModulateLinears.apply(settings, _pieces(pieces), *operands, *weights, *biases)
    return outs, h


def _gated_activation_linear(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    beside: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    settings = (activation, packing)
    return GatedActivationLinear.apply(settings, gate, up, beside, weight, bias)


linears = register_composite(
    "linears(Tensor x, Tensor[] weights, Tensor?[] biases, int[] pieces) -> Tensor[]", _linears
)
norm_modulate_linears = register_composite(
    "norm_modulate_linears(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor? x_bias, str norm, float eps, float weight_offset, "
    "float scale_offset, ScalarType h_dtype, ScalarType dtype, Tensor[] weights, Tensor?[] biases, "
    "int[] pieces) -> (Tensor[] outs, Tensor h)",
    _norm_modulate_linears,
)
gated_activation_linear = register_composite(
    "gated_activation_linear(Tensor gate, Tensor? up, str activation, str packing, "
    "Tensor? beside, Tensor weight, Tensor? bias) -> Tensor",
    _gated_activation_linear,
)
