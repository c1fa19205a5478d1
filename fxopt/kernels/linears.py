"""Linears that share an input as one autograd node: they add up its gradient inside their GEMMs.

A linear keeps its input for its weight gradient. Where a fused op makes that input from tensors
that are kept anyway, `norm_modulate_linears` and `gated_activation_linear` keep only those: the
backward of the op makes the input once more in the pass that it does in any case.

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

from fxopt.kernels.registration import register_composite
from fxopt.kernels.saving import is_packing
from fxopt.kernels.stacks import stacks

Backward = TypeVar("Backward", bound=Callable[..., Any])


def without_autocast(backward: Backward) -> Backward:
    """A backward called under autocast computes in the dtypes of its forward all the same."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((g.device.type for g in grads if g is not None), "meta")
        # Of the devices without autocast only meta runs here; 2.11 cannot trace the question.
        if device != "meta" and torch.is_autocast_enabled(device):
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
        weights, biases = halves(parameters)
        keep(ctx, pieces, x, weights, outs := products(x, weights, biases, pieces))
        return outs

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, *weights = ctx.saved_tensors
        _, needs_x, *needs = ctx.needs_input_grad
        dx = input_gradient(grads, weights, ctx.pieces, x.shape) if needs_x else None
        return None, dx, *parameter_gradients(grads, x, weights, ctx.pieces, needs)


def keep(
    ctx: Any, pieces: Pieces, x: Tensor, weights: Sequence[Any], outs: Sequence[Tensor]
) -> None:
    """What the node of linears on x, that made `outs`, keeps; of (pieces, x, weights, biases)."""
    ctx.save_for_backward(x, *weights)
    ctx.pieces = pieces
    ctx.set_materialize_grads(False)
    _, needs_x, *needs = ctx.needs_input_grad
    ctx.mark_non_differentiable(*frozen(outs, needs_x, needs, pieces))


def products(
    x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor | None], pieces: Pieces
) -> tuple[Tensor, ...]:
    """The outputs of all linears on x, in pieces."""
    if is_packing():
        each = [(weights[i], biases[i], slice(start, stop)) for i, start, stop in pieces]
        return tuple(F.linear(x, w[rows], b if b is None else b[rows]) for w, b, rows in each)
    return in_pieces([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], pieces)


def in_pieces(wholes: Sequence[Tensor], pieces: Pieces) -> tuple[Tensor, ...]:
    """What all linears made, in pieces."""
    return tuple(
        y if (y := wholes[i]).shape[-1] == stop - start else y[..., start:stop]
        for i, start, stop in pieces
    )


def frozen(
    outs: Sequence[Tensor], needs_x: bool, needs: Sequence[bool], pieces: Pieces
) -> list[Tensor]:
    """The outputs that nothing goes into which needs a gradient; `needs` of weights, then biases.

    One node for all would have autograd ask for theirs as soon as it does for another's.
    """
    trains = [needs_x or any(pair) for pair in zip(*halves(needs), strict=True)]
    return [out for out, (i, _, _) in zip(outs, pieces, strict=True) if not trains[i]]


def halves(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def flat(x: Tensor) -> Tensor:
    """[T, features]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def input_gradient(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], pieces: Pieces, shape: torch.Size
) -> Tensor | None:
    """sum_i g_i W_i [*shape], accumulated in the GEMMs; None if no output has a gradient."""
    dx_TK: Tensor | None = None
    for grad, (i, start, stop) in zip(grads, pieces, strict=True):
        if grad is None:
            continue
        weight, grad_TN = weights[i], flat(grad)
        rows = weight if stop - start == weight.shape[0] else weight[start:stop]
        dx_TK = grad_TN @ rows if dx_TK is None else dx_TK.addmm_(grad_TN, rows)
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
    if all(grad is None for grad in grads):
        return [None] * len(needs)
    x_TK = flat(x) if any(needs[:num_linears]) else x  # else it may be empty
    dweights = _together(grads, x_TK, weights, pieces, needs)
    dbiases: list[Tensor | None] = [None] * num_linears
    for grad, (i, start, stop) in zip(grads, pieces, strict=True):
        if grad is None:
            continue
        grad_TN, whole = flat(grad), stop - start == weights[i].shape[0]
        if needs[i] and whole and dweights[i] is None:
            dweights[i] = _weight_gradient(grad_TN, x_TK, weights[i])
        elif needs[i] and not whole:
            dweight = _buffer(dweights, i, weights[i], pieces, grads)
            torch.mm(grad_TN.t(), x_TK, out=dweight[start:stop])
        if needs[num_linears + i] and whole:
            dbiases[i] = grad_TN.sum(0)
        elif needs[num_linears + i]:
            dbias = _buffer(dbiases, i, weights[i][:, 0], pieces, grads)
            torch.sum(grad_TN, 0, out=dbias[start:stop])
    return [*dweights, *dbiases]


def by_input(weight: Tensor) -> bool:
    """Whether a weight is the view [N, K] of a parameter that is stored [K, N]."""
    return weight.stride(0) == 1 and weight.stride(1) != 1


def _weight_gradient(grad_TN: Tensor, x_TK: Tensor, weight: Tensor) -> Tensor:
    """[N, K], in memory as the weight is: autograd copies gradients that are not."""
    return (x_TK.t() @ grad_TN).t() if by_input(weight) else grad_TN.t() @ x_TK


def _together(
    grads: Sequence[Tensor | None],
    x_TK: Tensor,
    weights: Sequence[Tensor],
    pieces: Pieces,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of weights of whole linears whose outputs' gradients are a stack: one product."""
    found: list[Tensor | None] = [None] * len(weights)
    wholes = [
        grad
        if needs[i] and stop - start == weights[i].shape[0] and not by_input(weights[i])
        else None
        for grad, (i, start, stop) in zip(grads, pieces, strict=True)
    ]
    for members, stack in stacks(wholes):
        x_ITK = x_TK.expand(len(members), -1, -1)
        grads_ITN = stack.reshape(len(members), -1, stack.shape[-1])
        dweights = torch.bmm(grads_ITN.mT, x_ITK)
        # No views to autograd: a write to one parameter's gradient is none to another's.
        each = dweights.flatten(0, 1).unsafe_chunk(len(members))
        for member, dweight in zip(members, each, strict=True):
            found[pieces[member][0]] = dweight
    return found


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


def as_pieces(flat: Sequence[int]) -> Pieces:
    """Pieces from their numbers one after the other, as ops take them."""
    return tuple(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def _linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], pieces: list[int]
) -> list[Tensor]:
    return list(Linears.apply(as_pieces(pieces), x, *weights, *biases))


linears = register_composite(
    "linears(Tensor x, Tensor[] weights, Tensor?[] biases, int[] pieces) -> Tensor[]", _linears
)
