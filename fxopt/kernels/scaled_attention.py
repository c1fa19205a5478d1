"""scaled_attention: attention of e4m3 codes, by flash-attention 3 on Hopper or emulated.

Shapes: B batch, H heads of queries, h those of keys and values, which G = H / h heads of queries
share; S queries, T keys, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as sdpa

from fxopt.kernels.formats import FORMATS, round_to
from fxopt.kernels.registration import register
from fxopt.recipe_errors import AttentionRefused

# Of Hopper; flash-attention 3 runs on no other architecture.
CAPABILITY = 9
E4M3 = FORMATS["e4m3"]
# Softmax numerators lie in [0, 1]; times this they use more of the range of e4m3.
RANGE = 2.0**8
# Queries whose scores are in memory at a time.
CHUNK = 1024
# PyTorch lines up the first query and key, flash-attention 3 the last.
NOT_SQUARE = "it is causal with {} queries and {} keys; it takes as many of both"


def missing(device: torch.device) -> str | None:
    """What the units lack on `device`, or None."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    if not is_there or torch.cuda.get_device_capability(device)[0] != CAPABILITY:
        return f"compute capability {CAPABILITY}.0"
    if "quantized" not in torch.ops.aten._scaled_dot_product_flash_attention.overloads():
        return "a PyTorch with flash attention of quantized operands"
    if sdpa.current_flash_attention_impl() != "FA3":
        return (
            "flash-attention 3: install its package, and call "
            "torch.nn.attention.activate_flash_attention_impl('FA3')"
        )
    return None


def emulated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    is_causal: bool,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """out = softmax(scale * q k^T) v of the values behind the codes, as flash-attention 3 rounds.

    Args:
        q: codes [B, H, S, d]. k, v: codes [B, h, T, d].
        q_scale, k_scale, v_scale: fp32 [B, h], of each head of keys and values and of the heads of
            queries that share it.
        is_causal: each query sees the keys up to its own; there are as many.
        dtype: of the result.

    Numerics: scores, softmax and sums are fp32. The numerators exp(s - max) are rounded to e4m3,
    times 2^8, before they multiply v; their sum is that of the unrounded ones. The result is
    rounded to bf16, then to `dtype`. The kernel takes the maximum of the keys that it has met so
    far, so its numerators may round elsewhere, by as much.
    Source: https://github.com/Dao-AILab/flash-attention/blob/main/hopper/softmax.h (Max_offset).
    """
    with torch.autocast(q.device.type, enabled=False):
        num_kv_heads = k.shape[1]
        q_BhGSd = q.float().unflatten(1, (num_kv_heads, -1))
        k_BhdT, v_BhTd = k.float().mT[:, :, None], v.float()[:, :, None]
        factor = (scale * q_scale * k_scale)[:, :, None, None, None]
        chunks = []
        for first in range(0, q.shape[2], CHUNK):
            scores = q_BhGSd[..., first : first + CHUNK, :] @ k_BhdT * factor
            if is_causal:
                later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
                scores.masked_fill_(later.triu(first + 1), -torch.inf)
            numerators = (scores - scores.amax(-1, keepdim=True)).exp()
            weighted = round_to(RANGE * numerators, E4M3) @ v_BhTd
            sums = RANGE * numerators.sum(-1, keepdim=True)
            chunks.append(weighted * (v_scale[:, :, None, None, None] / sums))
        out = torch.empty_like(q, dtype=dtype)
        return out.copy_(torch.cat(chunks, -2).flatten(1, 2).bfloat16())


def on_units(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    """The same by the kernel that PyTorch has flash-attention 3 registered for."""
    *scales, is_causal, scale, dtype = settings
    flash = torch.ops.aten._scaled_dot_product_flash_attention.quantized
    out: Tensor = flash(q, k, v, *scales, 0.0, is_causal, False, scale=scale)[0]
    return out.to(dtype)


def native(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    is_causal, num_queries, num_keys = settings[3], q.shape[2], k.shape[2]
    if is_causal and num_queries != num_keys:
        # A compiled graph asked when it was traced, with other sizes.
        call = f"codes q {list(q.shape)}, k {list(k.shape)}"
        raise AttentionRefused("fp8", call, [NOT_SQUARE.format(num_queries, num_keys)])
    run = on_units if missing(q.device) is None else emulated
    return run(q, k, v, *settings)


def fake(q: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(q, dtype=args[-1])


def flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """2 B H S T (d + d) from the shapes, of two products; causal ones count whole."""
    batch, num_heads, num_queries, head_dim = q
    return 2 * batch * num_heads * num_queries * k[2] * (head_dim + v[3])


scaled_attention = register(
    "scaled_attention(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, "
    "Tensor v_scale, bool is_causal, float scale, ScalarType dtype) -> Tensor",
    native=native,
    fake=fake,
    flops=flops,
)
