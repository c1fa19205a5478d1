"""AdaLN's linears on the SiLU of one row per sample, as one autograd node.

    y_i = silu(x) W_i^T + b_i

The SiLU, the biases, the gradients of outputs that are parts of one product, and the sums over the
samples are done by the kernels that read and write the weights. SiLU is not kept.

Shapes: B samples, K input features, N output features of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.kernels.linears import (
    Pieces,
    as_pieces,
    halves,
    in_pieces,
    keep,
    linears,
    without_autocast,
)
from fxopt.kernels.registration import register, register_composite, without_autograd

# The fewest that tensor cores take: fewer are padded. Above it the libraries' kernels run.
MAX_ROWS = 16


def native(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """y_i = silu(x) W_i^T + b_i.

    Args:
        x: [B, K], floating point.
        weights: [N, K] each, in x's dtype.
        biases: [N] each, or None.

    Returns [B, N] each, in x's dtype; silu(x) is rounded to it once.
    """
    activated = F.silu(x)
    return [F.linear(activated, w, b) for w, b in zip(weights, biases, strict=True)]


def native_backward(
    grads: list[Tensor | None],
    pieces: list[int],
    x: Tensor,
    weights: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, then of the weights, then of the biases; empty where not needed.

    Args:
        grads: of the outputs, [B, rows of the piece]; None for zeros.
        pieces: for each of them the linear and rows of its weight, first and last + 1, flat.
        x, weights: as for the products.
        needs: in the order of the results.
    """
    found: list[Tensor | None] = [None] * len(needs)
    num_linears = len(weights)
    wholes: list[list[Tensor]] = [[] for _ in weights]
    for grad, (i, _, _) in zip(_filled(grads, pieces, x), as_pieces(pieces), strict=True):
        wholes[i].append(grad)
    joined = [parts[0] if len(parts) == 1 else torch.cat(parts, -1) for parts in wholes]
    if needs[0]:
        dactivated = joined[0] @ weights[0]
        for grad, weight in zip(joined[1:], weights[1:], strict=True):
            dactivated.addmm_(grad, weight)
        found[0] = torch.ops.aten.silu_backward(dactivated, x)
    activated = F.silu(x) if any(needs[1 : 1 + num_linears]) else x
    for i, grad in enumerate(joined, start=1):
        if needs[i]:
            found[i] = grad.t() @ activated
        if needs[num_linears + i]:
            found[num_linears + i] = grad.sum(0)
    return [x.new_empty(0) if t is None else t for t in found]


def _filled(grads: Sequence[Tensor | None], pieces: Sequence[int], x: Tensor) -> list[Tensor]:
    sizes = [stop - start for _, start, stop in as_pieces(pieces)]
    return [
        x.new_zeros(x.shape[0], size) if grad is None else grad
        for grad, size in zip(grads, sizes, strict=True)
    ]


def outputs(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Uninitialised."""
    return [x.new_empty((x.shape[0], w.shape[0])) for w in weights]


def outputs_backward(
    grads: Any, pieces: Any, x: Tensor, weights: list[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Uninitialised, in the order of `needs`; empty where false."""
    shapes = [x.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights)]
    return [x.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True)]


def has_few_rows(x: Tensor) -> bool:
    """Whether the kernel for rows takes them."""
    return 0 < x.shape[0] <= MAX_ROWS and x.dtype != torch.float64


def triton(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    from fxopt.kernels import triton_silu_linears

    if not has_few_rows(x):
        return native(x, weights, biases)
    ys = outputs(x, weights, biases)
    triton_silu_linears.forward(x, weights, biases, ys)
    return ys


def triton_backward(
    grads: list[Tensor | None],
    pieces: list[int],
    x: Tensor,
    weights: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    from fxopt.kernels import triton_silu_linears

    if not has_few_rows(x):
        return native_backward(grads, pieces, x, weights, needs)
    found = outputs_backward(grads, pieces, x, weights, needs)
    needs_weights, needs_biases = halves(needs[1:])
    dweights, dbiases = halves(found[1:])
    dweights = _all_or_none(dweights, needs_weights, weights)
    dbiases = _all_or_none(dbiases, needs_biases, [w[:, 0] for w in weights])
    calls = []
    for grad, (i, start, stop) in zip(_filled(grads, pieces, x), as_pieces(pieces), strict=True):
        rows = slice(start, stop)
        dweight, dbias = (None if t is None else t[rows] for t in (dweights[i], dbiases[i]))
        calls.append((grad, weights[i][rows], dweight, dbias))
    triton_silu_linears.backward(calls, x, found[0] if needs[0] else None)
    return found


def _all_or_none(
    grads: Sequence[Tensor], needs: Sequence[bool], like: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Where to write gradients of which some are needed: the others to be left to themselves."""
    if not any(needs):
        return [None] * len(needs)
    return [
        g if need else t.new_empty(t.shape) for g, need, t in zip(grads, needs, like, strict=True)
    ]


def launches(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> int:
    return 1 if has_few_rows(x) else 1 + len(weights)


def launches_backward(grads: Any, pieces: Any, x: Tensor, weights: Any, needs: Any) -> int:
    """The second one adds up what the shares of the weights' rows make of x's gradient."""
    if has_few_rows(x):
        return 1 + needs[0]
    num_joined = sum(pieces[0::3].count(i) > 1 for i in range(len(weights)))
    of_input = len(weights) + 1 if needs[0] else 0
    return num_joined + of_input + sum(needs[1:]) + any(halves(needs[1:])[0])


def flops(x: Any, weights: Any, *_: Any, **__: Any) -> int:
    """From shapes."""
    return sum(2 * x[0] * w[0] * w[1] for w in weights)


def flops_backward(grads: Any, pieces: Any, x: Any, weights: Any, needs: Any, **_: Any) -> int:
    """From shapes."""
    each = [2 * x[0] * w[0] * w[1] for w in weights]
    of_weights = sum(f for f, need in zip(each, halves(needs[1:])[0], strict=True) if need)
    return sum(each) * needs[0] + of_weights


silu_products = register(
    "silu_products(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    native=native,
    fake=outputs,
    triton=triton,
    flops=flops,
    launches=launches,
)
silu_products_backward = register(
    "silu_products_backward(Tensor?[] grads, int[] pieces, Tensor x, Tensor[] weights, "
    "bool[] needs) -> Tensor[]",
    native=native_backward,
    fake=outputs_backward,
    triton=triton_backward,
    flops=flops_backward,
    launches=launches_backward,
)


class SiluLinears(torch.autograd.Function):
    """Keeps x and the weights."""

    @staticmethod
    def forward(ctx: Any, pieces: Pieces, x: Tensor, *parameters: Tensor | None) -> Any:
        weights, biases = halves(parameters)
        outs = in_pieces(without_autograd(silu_products, x, weights, biases), pieces)
        keep(ctx, pieces, x, weights, outs)
        return outs

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, *weights = ctx.saved_tensors
        each = list(zip(grads, ctx.pieces, strict=True))
        reached = sorted({i for g, (i, *_) in each if g is not None})
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if not reached:
            return tuple(results)
        # The others' parameters get None, as of linears by themselves: optimizers skip it.
        of_reached = {i: place for place, i in enumerate(reached)}
        each = [(g, (of_reached[i], *rows)) for g, (i, *rows) in each if i in of_reached]
        starts = 2, 2 + len(weights)
        places = [1, *(start + i for start in starts for i in reached)]
        needs = [ctx.needs_input_grad[place] for place in places]
        given = [g for g, _ in each], [number for _, piece in each for number in piece], x
        of_these = [weights[i] for i in reached]
        found = without_autograd(silu_products_backward, *given, of_these, needs)
        for place, need, grad in zip(places, needs, found, strict=True):
            results[place] = grad if need else None
        return tuple(results)


def _silu_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], pieces: list[int]
) -> list[Tensor]:
    if any(map(is_traceable_wrapper_subclass, (x, *weights))):
        # These know ATen's ops: DTensors, quantized weights. So do compilers, and fuse the SiLU.
        return list(linears(F.silu(x), weights, biases, pieces))
    return list(SiluLinears.apply(as_pieces(pieces), x, *weights, *biases))


# `pieces` as for `linears`; of each linear they cover all rows, in order.
silu_linears = register_composite(
    "silu_linears(Tensor x, Tensor[] weights, Tensor?[] biases, int[] pieces) -> Tensor[]",
    _silu_linears,
)
