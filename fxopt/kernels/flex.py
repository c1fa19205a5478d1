"""Attention by PyTorch's FlexAttention: its kernel is made with masks and windows as functions.

Blocks of scores that a mask hides whole are not computed. Which ones these are is found on the
device at each call, from all elements of the mask: worth it where much is hidden. A mask that is
added to the scores hides nothing.

B batch, H heads of queries, S queries, T keys; a dim of a mask may also be 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fxopt.kernels.attention_call import ALL, CAUSAL, Arguments, Call, Window

# Of the kernels that Inductor makes for GPUs.
LEAST_HEAD = 16
# More tokens than there are.
FAR = 1 << 30


def refusals(call: Call) -> Iterator[str]:
    """What speaks against `call`."""
    if call.dropout_p > 0:
        yield "FlexAttention has no dropout"
    if len(call.batch) != 1:
        yield f"FlexAttention takes tensors of four dims, not of {len(call.batch) + 3}"
    if call.is_causal and call.mask is not None:
        yield "the call is causal and has a mask"
    if call.mask is not None and call.mask[2]:
        yield "the mask gets a gradient, which FlexAttention would sum with atomics"
    if min(call.head_dims) < LEAST_HEAD:
        yield f"heads have {min(call.head_dims)} channels; FlexAttention takes {LEAST_HEAD} or more"
    (num_heads, num_kv_heads), (s, t) = call.heads, call.tokens
    if num_heads != num_kv_heads and (not call.is_grouped or num_heads % max(num_kv_heads, 1)):
        yield f"{num_heads} heads of queries cannot share {num_kv_heads} of keys"
    if not (s and t and all(call.batch)):
        yield "there are no queries or keys"
    yield from _of_device(call.device, call.needs_grad)


def _of_device(device: torch.device, needs_grad: bool) -> Iterator[str]:
    """PyTorch's own objection: it has no backward on a CPU."""
    from torch.nn.attention import flex_attention as flex

    stand_in = torch.empty(0, device="meta" if device.type == "cuda" else device)
    try:
        flex._validate_device(*(stand_in.requires_grad_(needs_grad),) * 3)
    except (NotImplementedError, ValueError) as refused:
        yield str(refused)


def attention(*args: Any, window: Window | None = None, **kwargs: Any) -> Tensor:
    """scaled_dot_product_attention by FlexAttention: [B, H, S, d].

    A query that sees no key gets zeros, as PyTorch gives it. Its kernel is compiled at the first
    call of each kind, once for all sizes. Where others trace the call they see its parts.

    Args:
        args, kwargs: as there; no dropout, and no gradient for the mask.
        window: what the mask is known to say; it is not read then.

    Source: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
    """
    a = Arguments(*args, **kwargs)
    sides = _sides(window or (CAUSAL if a.is_causal else ALL))
    mask = None if window or a.attn_mask is None else a.attn_mask[(None,) * (4 - a.attn_mask.dim())]
    qkv = a.query, a.key, a.value
    if _is_watched(a.query):
        return _flex(*qkv, mask, sides, a.scale, a.enable_gqa)
    return _compiled()(*qkv, mask, sides and _held(*sides, a.query.device), a.scale, a.enable_gqa)


def _sides(window: Window) -> tuple[int, int] | None:
    left, right = (n if n >= 0 else FAR for n in window)
    return None if window == ALL else (left, right)


@functools.lru_cache(256)
def _held(left: int, right: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of widths that are tensors, one graph serves all; they are copied to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(left, device=device), torch.tensor(right, device=device)


def _is_watched(x: Tensor) -> bool:
    """Whether a trace, or a mode that counts, is to see the call."""
    is_traced = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
    return is_traced or bool(_get_current_dispatch_mode_stack())


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex, dynamic=True)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sides: tuple[int | Tensor, int | Tensor] | None,
    scale: float | None,
    is_grouped: bool,
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    options: dict[str, Any] = {"scale": scale, "enable_gqa": is_grouped}
    S, T = q.shape[2], k.shape[2]
    if mask is None:
        if sides is not None:
            seen = _band(*sides)
            options["block_mask"] = create_block_mask(seen, None, None, S, T, device=q.device)
        return flex_attention(q, k, v, **options)
    B, H = (None if n == 1 else n for n in mask.shape[:2])
    at = _reader(mask.expand(-1, -1, S, T))
    if mask.dtype == torch.bool:
        options["block_mask"] = create_block_mask(at, B, H, S, T, device=q.device)
    else:
        options["score_mod"] = lambda score, *index: score + at(*index)
    return flex_attention(q, k, v, **options)


def _band(left: int | Tensor, right: int | Tensor) -> Callable[..., Tensor]:
    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j <= left) & (j - i <= right)

    return is_seen


def _reader(mask: Tensor) -> Callable[..., Tensor]:
    """The element that a score is masked by."""
    is_per_sample, is_per_head = (n != 1 for n in mask.shape[:2])

    def at(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[b if is_per_sample else 0, h if is_per_head else 0, i, j]

    return at
