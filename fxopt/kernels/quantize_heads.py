"""quantize_heads: queries, keys and values of an attention as e4m3 codes, a scale for each head.

Shapes: B batch, H heads of queries, h those of keys and values, which G = H / h heads of queries
share; S tokens of a tensor, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels.counters import UNWATCHED
from fxopt.kernels.formats import FORMATS, quantize_matrix
from fxopt.kernels.quantize import can_cast
from fxopt.kernels.registration import register
from fxopt.recipes import Operand

OPERAND = Operand.parse("e4m3/row/fp32")


def magnitudes(x_BHSd: Tensor, num_scales: int) -> Tensor:
    """fp32 [B, h], the largest magnitude of each group of heads; NaN where one is not finite."""
    groups = x_BHSd.unflatten(1, (num_scales, -1))
    amax = torch.linalg.vector_norm(groups, torch.inf, (2, 3, 4), dtype=torch.float32)
    return torch.where(amax < torch.inf, amax, torch.nan)


def token_major(x_BHSd: Tensor) -> Tensor:
    """[B * S * H, d]: the order in which projections leave heads and attention kernels read them,
    a view of such tensors."""
    return x_BHSd.transpose(1, 2).reshape(-1, x_BHSd.shape[-1])


def of_tokens(amax_Bh: Tensor, shape: torch.Size) -> Tensor:
    """The magnitude for each row of `token_major`, [B * S * H]."""
    batch, num_heads, num_tokens, _ = shape
    num_scales = amax_Bh.shape[1]
    groups = batch, num_tokens, num_scales, num_heads // num_scales
    return amax_Bh[:, None, :, None].expand(groups).reshape(-1)


def head_major(codes_RC: Tensor, shape: torch.Size) -> Tensor:
    """Codes as [B, H, S, d], in the memory of `token_major`."""
    batch, num_heads, num_tokens, head_dim = shape
    tokens = codes_RC[:, :head_dim].contiguous()
    return tokens.view(batch, num_tokens, num_heads, head_dim).transpose(1, 2)


def of_heads(scales: Tensor, shape: torch.Size, num_scales: int) -> Tensor:
    """fp32 [B, h], one of the equal scales of a head's rows."""
    return scales.view(shape[0], shape[2], num_scales, -1)[:, 0, :, 0].contiguous()


def native(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """code = round(x / scale), scale = amax / 448, for each sample and head of keys and values.

    Args:
        q: [B, H, S, d], fp32, bf16 or fp16, any strides; taken as fp32. Heads that share one of k
            share a scale.
        k, v: [B, h, T, d], likewise. No tensor is empty.

    Returns the codes of q, k and v, shaped as these and laid out as [B, S, H, d], then their
    scales, fp32 [B, h].

    Numerics: to nearest, ties to even, rounded once from fp32; nothing saturates. A head of zeros
    has scale 1; one that holds a NaN or Inf becomes NaN.
    """
    codes, scales = [], []
    for x in (q, k, v):
        known = of_tokens(magnitudes(x, k.shape[1]), x.shape)
        found = quantize_matrix(token_major(x), OPERAND, known=known)
        codes.append(head_major(found.codes, x.shape))
        scales.append(of_heads(found.scales, x.shape, k.shape[1]))
    return *codes, *scales


def triton(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """All casts in one launch."""
    from fxopt.kernels import triton_quantize as launch
    from fxopt.kernels import triton_quantize_group as group

    if not can_cast(q):
        return native(q, k, v)
    xs: Sequence[Tensor] = (q, k, v)
    amaxes = []
    for x in xs:
        bits = of_tokens(magnitudes(x, k.shape[1]), x.shape).view(torch.int32)
        amaxes.append(launch.Amax(bits.view(1, -1), None, None))
    matrices = [launch.of_tensors(token_major(x)) for x in xs]
    formats, slots = [(OPERAND, None)] * len(xs), [UNWATCHED] * len(xs)
    pairs = group.cast(group.cast_kernel, matrices, amaxes, formats, slots)
    codes = [head_major(found.codes, x.shape) for (found, _), x in zip(pairs, xs, strict=True)]
    scales = [
        of_heads(found.scales, x.shape, k.shape[1]) for (found, _), x in zip(pairs, xs, strict=True)
    ]
    return *codes, *scales


def fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    dtype, sizes = FORMATS[OPERAND.format].dtype, k.shape[:2]
    codes = [x.new_empty(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2) for x in (q, k, v)]
    return *codes, *(x.new_empty(sizes, dtype=torch.float32) for x in (q, k, v))


quantize_heads = register(
    "quantize_heads(Tensor q, Tensor k, Tensor v) -> (Tensor q_codes, Tensor k_codes, "
    "Tensor v_codes, Tensor q_scale, Tensor k_scale, Tensor v_scale)",
    native=native,
    fake=fake,
    triton=triton,
    # Of each tensor its magnitudes, a comparison and a choice, their copies for the tokens and one
    # scale for each head; one cast.
    launches=lambda *_: 16,
    # For the scale, then for the values.
    rereads=lambda args, _: args,
)
