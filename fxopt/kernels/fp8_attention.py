"""Attention whose forward multiplies e4m3 codes and whose backward is that of the model's dtype.

For recipes that ask for it by name, and nobody else.

Shapes: B batch, H heads of queries, h of keys and values, S queries, T keys, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.attention_call import Arguments, Call
from fxopt.kernels.in_force import is_high_precision
from fxopt.kernels.quantize_heads import quantize_heads
from fxopt.kernels.scaled_attention import CAPABILITY, NOT_SQUARE, missing, scaled_attention
from fxopt.recipe_errors import AttentionRefused
from fxopt.recipes import FP8_ATTENTION

NAME, NATIVE = FP8_ATTENTION
LARGEST_HEAD, HEAD_MULTIPLE = 256, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fp8Attention(torch.autograd.Function):
    """softmax(scale * q k^T) v of the codes of q, k and v; gradients as if it were of themselves.

    The backward computes the forward once more, in the model's dtype. Softmax's gradient is what is
    left after cancellation, of P * (dP - D) with D = dO * O: with the statistic and the result of
    the codes it does not cancel, and what all keys have in common, which has no gradient, gets one.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None, gqa: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = {"is_causal": is_causal, "scale": scale, "enable_gqa": gqa}
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return scaled_attention(*quantize_heads(q, k, v), is_causal, factor, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        own = [t.detach() for t in ctx.saved_tensors]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            own = [t.requires_grad_(n) for t, n in zip(own, needed, strict=True)]
            out = F.scaled_dot_product_attention(*own, **ctx.options)
            wanted = [t for t in own if t.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, grad))
        return *(next(found) if n else None for n in needed), None, None, None


def refusals(call: Call) -> Iterator[str]:
    """All reasons why the kernel cannot run `call`; on a device that emulates it as well, where a
    recipe would otherwise hold no longer than until it moves."""
    (num_heads, num_kv_heads), (d, e), (s, t) = call.heads, call.head_dims, call.tokens
    if call.dtype not in DTYPES:
        dtype = str(call.dtype).removeprefix("torch.")
        yield f"its inputs are {dtype}; it quantizes float32, bfloat16 and float16"
    if len(call.batch) != 1:
        yield f"it takes tensors of four dims, not of {len(call.batch) + 3}"
    if call.mask is not None:
        yield f"it takes no mask, and this is {call.mask_kind}"
    if call.dropout_p > 0:
        yield f"it has no dropout, and this is {call.dropout_p:g}"
    if d != e or d > LARGEST_HEAD or d % HEAD_MULTIPLE:
        yield (
            f"heads have {d} channels for queries and {e} for values; it takes equally many, a "
            f"multiple of {HEAD_MULTIPLE} up to {LARGEST_HEAD}"
        )
    if num_heads != num_kv_heads and (not call.is_grouped or num_heads % max(num_kv_heads, 1)):
        yield (
            f"{num_heads} heads of queries cannot share {num_kv_heads} of keys: that takes "
            "enable_gqa and a multiple"
        )
    if not (s and t and all(call.batch)):
        yield "there are no queries or keys"
    if call.is_causal and s != t:
        yield NOT_SQUARE.format(s, t)


def why(call: Call, target: str | None) -> str:
    """For the report: what runs it, on the call's device or on a `target` that is planned for."""
    if target is not None:
        return (
            f"forward alone, as the recipe says; compute capability {CAPABILITY}.0 and "
            "flash-attention 3 run it, others emulate it"
        )
    lacking = missing(call.device)
    by = "by flash-attention 3" if lacking is None else f"emulated for want of {lacking}"
    return f"forward alone, as the recipe says, {by}"


def attend(asked: str, given: Arguments) -> Tensor:
    """scaled_dot_product_attention with its forward in FP8.

    Args:
        asked: one of `FP8_ATTENTION`.
        given: query [B, H, S, d], key and value [B, h, T, d]; fp32, bf16 or fp16.

    Raises:
        AttentionRefused: with all reasons.
    """
    call = Call.of(*given)
    query, key, value, _, _, is_causal, scale, enable_gqa = given
    reasons = [*refusals(call)]
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        reasons.append("queries, keys and values have other batches")
    if asked == NATIVE and (lacking := missing(call.device)) is not None:
        reasons.append(f"it may not be emulated and needs {lacking}")
    if reasons:
        raise AttentionRefused(NAME, str(call), reasons)
    if is_high_precision():
        return F.scaled_dot_product_attention(**given._asdict())
    out: Tensor = Fp8Attention.apply(query, key, value, is_causal, scale, enable_gqa)
    return out
