"""Attention over the keys that padding leaves: PyTorch's variable-length kernel on packed keys.

Where a mask hides the same keys from all queries of a sample, their rows need not be there. The
others go to the front of one buffer, sample by sample and in order, and flash attention, which
takes no mask, runs on that. Queries stay as they are. Nothing waits for the device: the buffer has
rows for all keys, and the kernel reads from its memory where each sample ends.

B batch, H heads of queries, K of keys and values, S queries, T keys, d channels of a head;
N = B T rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.attention_call import ALL, CAUSAL, Arguments, Call, Window


class Packing(NamedTuple):
    """Where each key goes.

    Args:
        sample_N, key_N: which key of which sample a packed row holds; past the last one, any.
        row_BT: the packed row of a key; of one that is left out, any.
        is_kept_BT: whether a key is there at all.
        offsets: [B + 1], int32: the first packed row of each sample, and the number of all.
    """

    sample_N: Tensor
    key_N: Tensor
    row_BT: Tensor
    is_kept_BT: Tensor
    offsets: Tensor


def pack_mask(is_kept_BT: Tensor) -> Packing:
    """Where keys go under a boolean mask, found on its device."""
    T = is_kept_BT.shape[1]
    num_N = is_kept_BT.flatten().cumsum(0)
    num_BT = num_N.view(is_kept_BT.shape)
    rows_N = torch.arange(1, num_N.shape[0] + 1, device=num_N.device)
    source_N = torch.searchsorted(num_N, rows_N).clamp(max=num_N.shape[0] - 1)
    offsets = F.pad(num_BT[:, -1].int(), (1, 0))
    return Packing(source_N // T, source_N % T, (num_BT - 1).clamp(min=0), is_kept_BT, offsets)


class Pack(torch.autograd.Function):
    """Keys or values x_BKTd to rows [N, K, d].

    Backward gathers as well: dx = drow[row], 0 for a key that is left out. No kernel writes the
    gradient of rows past the last one, and none of them is used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BKTd: Tensor,
        sample_N: Tensor,
        key_N: Tensor,
        row_BT: Tensor,
        is_kept_BT: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(row_BT, is_kept_BT)
        return x_BKTd.transpose(1, 2)[sample_N, key_N]

    @staticmethod
    def backward(ctx: Any, grad_NKd: Tensor) -> tuple[Tensor, None, None, None, None]:
        row_BT, is_kept_BT = ctx.saved_tensors
        dx_BTKd = torch.where(is_kept_BT[..., None, None], grad_NKd[row_BT], 0)
        return dx_BTKd.transpose(1, 2), None, None, None, None


def refusals(call: Call) -> Iterator[str]:
    """What speaks against `call` beside what flash attention refuses."""
    if call.mask_kind == "additive":
        yield "the mask is added to the scores; [B, 1, 1, T], boolean, says what is padding"
    elif call.mask_kind == "boolean":
        yield (
            "the mask may differ between queries or heads; [B, 1, 1, T] says what is padding, and "
            "a window is known where the graph makes its mask"
        )
    if call.is_causal and call.mask is not None:
        yield "the call is causal and has a mask"
    if call.is_causal and call.tokens[0] != call.tokens[1]:
        yield "the call is causal and has not as many keys as queries"
    if call.dropout_p > 0:
        yield "variable-length attention has no dropout"
    if call.head_dims[0] % 8:
        yield f"heads have {call.head_dims[0]} channels, no multiple of 8"
    key = torch._C._dispatch_key_for_device(call.device.type)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_flash_attention_forward", key):
        yield f"PyTorch has no torch.nn.attention.varlen on {call.device.type}"


def attention(*args: Any, window: Window | None = None, **kwargs: Any) -> Tensor:
    """scaled_dot_product_attention without the keys that a mask leaves out: [B, H, S, d].

    A sample without keys gets zeros, as PyTorch gives it. Numerics are those of flash attention.

    Args:
        query: [B, H, S, d].
        key, value: [B, K, T, d].
        attn_mask: boolean, False for padding; [B, 1, 1, T], or expanded from it.
        dropout_p: 0.
        is_causal: with as many keys as queries and no mask.
        scale, enable_gqa: as there.
        window: of as many keys as queries, what the mask is known to say; it is not read then.

    Source: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """
    a = Arguments(*args, **kwargs)
    (B, _, S, _), (_, K, T, _) = a.query.shape, a.key.shape
    starts = torch.arange(B + 1, dtype=torch.int32, device=a.query.device)
    kv = a.key.expand(B, -1, -1, -1), a.value.expand(B, K, T, -1)
    if a.attn_mask is None or window is not None:
        k_NKd, v_NKd = (x_BKTd.transpose(1, 2).flatten(0, 1) for x_BKTd in kv)
        offsets = starts * T
    else:
        *places, offsets = pack_mask(_per_key(a.attn_mask, B, T))
        k_NKd, v_NKd = (Pack.apply(x_BKTd, *places) for x_BKTd in kv)
    out = _kernel(a.enable_gqa)(
        *(a.query.transpose(1, 2).flatten(0, 1), k_NKd, v_NKd, starts * S, offsets, S, T),
        scale=a.scale,
        window_size=window or (CAUSAL if a.is_causal else ALL),
    )
    return out.unflatten(0, (B, S)).transpose(1, 2)


@functools.cache
def _kernel(is_grouped: bool) -> Callable[..., Tensor]:
    """PyTorch's; its module imports Dynamo. In 2.11 it takes fewer heads of keys without a word."""
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn
    has_option = "enable_gqa" in inspect.signature(kernel).parameters
    return functools.partial(kernel, enable_gqa=True) if is_grouped and has_option else kernel


def _per_key(mask: Tensor, B: int, T: int) -> Tensor:
    """[B, T] of a mask that is the same for all heads and queries."""
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in (1, 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.expand(B, 1, 1, T)[:, 0, 0]
