"""linear_cross_entropy: a language model's last linear and its loss, without the logits as a whole.

    logits = x W^T + b
    loss   = sum_t c_t * (log(sum_v exp(logits_tv)) - logits_t[target_t])

c_t is 0 for tokens whose target is `ignore_index`; for the others it is 1 ("sum") or one over their
number ("mean").

Tokens are taken in chunks. The logits of a chunk give its loss and, as they are at hand, all
gradients, for a loss whose own gradient is 1; the backward scales them. Else the logits would have
to be kept, or computed twice. Chunks of the vocabulary would need them twice, a product that by
arithmetic takes longer than adding up the chunks' parts of the weight's gradient.

Shape suffixes: T tokens (all leading dims), C tokens of a chunk, K features, V logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.linears import flat, without_autocast
from fxopt.kernels.registration import (
    below_autograd,
    opmath_of,
    register,
    register_composite,
)
from fxopt.kernels.sharding import Arguments, Rule, each, is_absent, row

REDUCTIONS = ("mean", "sum")
# Tokens of a chunk. Adding its part of dweight moves 10 bytes per element of the weight, its
# products make 6 * CHUNK operations: below about 2,000 tokens a GPU would mostly move.
CHUNK = 2048


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss in plain, differentiable PyTorch.

    loss = sum_t c_t * (log(sum_v exp(logits_tv)) - logits_t[target_t]), logits = x W^T + b.

    Args:
        x: [..., K], floating point, any strides.
        weight, bias: [V, K] and [V] in x's dtype; bias may be None.
        target: [...], int64, in [0, V) or `ignore_index`.
        ignore_index: the target of tokens that do not count.
        reduction: "mean" over the tokens that count (NaN if there is none), or "sum".

    Returns the loss [], fp32 (fp64 for fp64).

    Raises:
        ValueError: sizes that do not fit, or another reduction.

    Numerics: logits are rounded to x's dtype, as by the linear alone; softmax and loss in fp32.
    Their gradient is rounded to x's dtype for the products; dweight and dbias of several chunks
    add up in fp32. In float16 the logits' gradient underflows, as what scales the loss comes later.
    """
    check(x, weight, target, reduction)
    logits_TV = flat(F.linear(x, weight, bias)).to(opmath_of(x))
    options: Any = {"ignore_index": ignore_index, "reduction": reduction}
    return F.cross_entropy(logits_TV, target.reshape(-1), **options)


def check(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        known = " and ".join(map(repr, REDUCTIONS))
        raise ValueError(f"linear_cross_entropy reduces by {known}, not by {reduction!r}")
    if x.shape[-1] != weight.shape[-1] or x.shape[:-1] != target.shape:
        raise ValueError(
            "linear_cross_entropy takes x [..., K], weight [V, K] and target [...], but theirs are "
            f"{list(x.shape)}, {list(weight.shape)} and {list(target.shape)}"
        )


def softmax_native(
    logits_CV: Tensor,
    target_C: Tensor,
    coefficient: Tensor,
    ignore_index: int,
    loss_C: Tensor,
    wants_gradient: bool,
) -> None:
    """Write the tokens' losses and, if asked to, the logits' gradient over the logits.

    Args:
        coefficient: [], c_t of the tokens that count.
    """
    counts_C = target_C != ignore_index
    picked_C1 = torch.where(counts_C, target_C, 0)[:, None]
    # Below the largest logit: what is added to that rounds the others off.
    below_CV = logits_CV.to(loss_C.dtype) - logits_CV.amax(-1, keepdim=True)
    chosen_C = below_CV.gather(1, picked_C1)[:, 0]
    exp_CV = below_CV.exp_()
    total_C1 = exp_CV.sum(-1, keepdim=True)
    loss_C.copy_(torch.where(counts_C, total_C1[:, 0].log() - chosen_C, 0.0))
    if wants_gradient:
        gradient_CV = exp_CV.div_(total_C1)
        gradient_CV.scatter_(1, picked_C1, gradient_CV.gather(1, picked_C1) - 1)
        logits_CV.copy_(gradient_CV.mul_(torch.where(counts_C, coefficient, 0.0)[:, None]))


def by_chunks(
    softmax: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dx, dweight, dbias); gradients that are not needed have no elements."""
    check(x, weight, target, reduction)
    loss, dx, dweight, dbias = outputs(x, weight, needs)
    x_TK, target_T = flat(x), target.reshape(-1)
    is_mean = reduction == "mean"
    num_counted = (target_T != ignore_index).sum() if is_mean else loss.new_ones(())
    coefficient = num_counted.to(loss.dtype).reciprocal()
    loss_T = loss.new_empty(len(target_T))
    in_chunks = not 0 < len(target_T) <= CHUNK
    totals = [t.new_zeros(t.shape, dtype=loss.dtype) if in_chunks else t for t in (dweight, dbias)]
    for start in range(0, len(target_T), CHUNK):
        rows = slice(start, start + CHUNK)
        x_CK = x_TK[rows]
        logits_CV = F.linear(x_CK, weight, bias)
        softmax(logits_CV, target_T[rows], coefficient, ignore_index, loss_T[rows], any(needs))
        if needs[0]:
            torch.mm(logits_CV, weight, out=flat(dx)[rows])
        if needs[1] and in_chunks:
            _add_product(totals[0], logits_CV.t(), x_CK)
        elif needs[1]:
            torch.mm(logits_CV.t(), x_CK, out=dweight)
        if needs[2]:
            column_sums = logits_CV.sum(0, dtype=loss.dtype)
            totals[1] = totals[1].add_(column_sums) if in_chunks else column_sums
    if in_chunks:
        dweight = totals[0].to(dweight.dtype)
    return loss_T.sum() * coefficient, dx, dweight, totals[1].to(dbias.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the sum is as exact as `total`, whatever the dtype of the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def outputs(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised loss, dx, dweight and dbias; the last argument is what needs a gradient."""
    needs_x, needs_weight, needs_bias = others[-1]
    return (
        x.new_empty((), dtype=opmath_of(x)),
        x.new_empty(x.shape if needs_x else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        x.new_empty(weight.shape[0] if needs_bias else 0),
    )


def native(*args: Any) -> tuple[Tensor, ...]:
    return by_chunks(softmax_native, *args)


def triton(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from fxopt.kernels import triton_linear_cross_entropy

    in_fp64 = x.dtype == torch.float64
    return by_chunks(softmax_native if in_fp64 else triton_linear_cross_entropy.softmax, x, *args)


def _launches(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *settings: Any
) -> int:
    """For each chunk its products, the softmax and the sums; those over tokens around them."""
    needs, num_chunks = settings[-1], -(-target.numel() // CHUNK)
    sums = (needs[1] + needs[2]) if num_chunks > 1 else 0
    return 5 + num_chunks * (2 + sum(needs) + sums)


def _flops(x: Sequence[int], weight: Sequence[int], *args: Any, **_: Any) -> int:
    """2 T K V for the logits, and as much for dx and for dweight."""
    needs_x, needs_weight, _ = args[-1]
    return 2 * math.prod(x) * weight[0] * (1 + needs_x + needs_weight)


def _sharded_dims(a: Arguments) -> Sequence[int]:
    """Tokens can be shared out if they are summed; a mean would need the number of all first."""
    return range(len(a["x"].shape) - 1) if a["reduction"] == "sum" else ()


def _placed_inputs(a: Arguments, dim: int) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [row(t.shape, dim) if name in ("x", "target") else Replicate() for name, t in each(a)]


def _placed_outputs(a: Arguments, dim: int, shapes: list[torch.Size]) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate

    _, dx, *of_parameters = shapes
    sums = [Replicate() if is_absent(shape) else Partial() for shape in of_parameters]
    return [Partial(), row(dx, dim), *sums]


class LinearCrossEntropy(torch.autograd.Function):
    """Autograd of `fxopt::linear_cross_entropy`; saves the gradients."""

    @staticmethod
    def forward(ctx: Any, needs: list[bool], *args: Any) -> Tensor:
        loss, *grads = below_autograd(linear_cross_entropy_gradients, *args, needs)
        ctx.save_for_backward(*grads)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * 3
        for i, t in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[1 + i] and grad is not None:
                # As a vector of one: a number would be rounded to t's dtype before the product.
                found[i] = torch.mul(t, grad.reshape(1), out=torch.empty_like(t))
        return None, *found, None, None, None


def _linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    tracks = torch.is_grad_enabled()
    needs = [tracks and t is not None and t.requires_grad for t in (x, weight, bias)]
    return LinearCrossEntropy.apply(needs, x, weight, bias, *args)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, str reduction"
linear_cross_entropy_gradients = register(
    f"linear_cross_entropy_gradients({_ARGUMENTS}, bool[3] needs) "
    "-> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    native=native,
    fake=outputs,
    triton=triton,
    flops=_flops,
    launches=_launches,
    sharding=Rule(("x",), _sharded_dims, _placed_inputs, _placed_outputs),
)
linear_cross_entropy = register_composite(
    f"linear_cross_entropy({_ARGUMENTS}) -> Tensor", _linear_cross_entropy
)
