"""LTX-Video: diffusers' block of self-attention, cross-attention and MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends.swaps.branches import Out
from fxopt.backends.swaps.fused import Normed, gated_residual, project
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.operands import Part, Rotation, heads
from fxopt.backends.swaps.streams import draw_streams
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap
from fxopt.backends.swaps.wan import attention


def fused_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    x, mlp = hidden_states, feed_forward(block.ff).holding(hidden_states)
    modulation = block.scale_shift_table + temb.unflatten(-1, block.scale_shift_table.shape)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)

    attn = block.attn1
    part = Part((attn.norm_q, attn.norm_k), tables(image_rotary_emb, attn.head_dim))
    linears, part = part.holding(x, attn.to_q, attn.to_k, attn.to_v)
    qkv, x = Normed(block.norm1, x, scale, shift).into(*linears)
    out, bias = Out(attn.to_out).branch(attention(attn, qkv, part), all_sums=False)
    x = gated_residual(x, gate, out, x_bias=bias)

    attn = block.attn2
    (to_q, *to_kv), part = Part((attn.norm_q, attn.norm_k)).holding(
        x, attn.to_q, attn.to_k, attn.to_v, keys_of=encoder_hidden_states
    )
    kv = project(encoder_hidden_states, *to_kv)
    mask = per_head(attn, encoder_attention_mask, encoder_hidden_states)
    attended = attention(attn, [*project(x, to_q), *kv], part, mask)
    out, bias = Out(attn.to_out).branch(attended, all_sums=False)

    normed = Normed(block.norm2, out, scale_mlp, shift_mlp, x, x_bias=bias)
    hidden, x = normed.into(*mlp.inputs)
    out, bias = mlp.branch(hidden)
    return gated_residual(x, gate_mlp, out, x_bias=bias)


def tables(cos_sin: tuple[Tensor, Tensor], head_dim: int) -> Rotation:
    """[B, S, H * d] each: other angles for each head."""
    cos, sin = (heads(t, head_dim) for t in cos_sin)
    return Rotation("interleaved", "channels", cos, sin)


def per_head(attn: Any, mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """The additive mask [B, 1, S] of the keys [B, S, D], as [B, H, 1, S]."""
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask, keys.shape[1], keys.shape[0])
    return mask.view(keys.shape[0], attn.heads, -1, mask.shape[-1])


def draw_mask(draw: Draw) -> Tensor:
    return torch.tensor([[[0.0, 0.0, -1e4]], [[0.0, -1e4, -1e4]]], dtype=draw.dtype)


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    width = block.attn1.inner_dim
    arguments = {
        **draw_streams(draw, width),
        "temb": draw.normal(draw.B, 1, 6 * width),
        "image_rotary_emb": draw.tables(draw.B, draw.S, width),
    }
    yield {**arguments, "encoder_attention_mask": draw_mask(draw)}
    yield arguments


def small(block: Any) -> nn.Module:
    return type(block)(dim=64, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64)


FAMILIES = (
    Family(
        ("diffusers.models.transformers.transformer_ltx.LTXVideoTransformerBlock",),
        Swap(
            "block",
            fused_block,
            examples,
            small,
            constants=("image_rotary_emb", "encoder_attention_mask"),
        ),
    ),
)
