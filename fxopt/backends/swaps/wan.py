"""Wan: diffusers' block of self-attention, cross-attention and MLP, modulated in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxopt.backends.swaps.branches import Out
from fxopt.backends.swaps.fused import (
    Normed,
    gated_residual,
    project,
)
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.operands import Part, Rotation, queries_keys
from fxopt.backends.swaps.operands import heads as in_heads
from fxopt.backends.swaps.streams import dispatch, draw_streams
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap, Unfit

MODULE = "diffusers.models.transformers.transformer_wan"


def fused_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> Tensor:
    x, dtype = hidden_states, hidden_states.dtype
    if block.attn2.add_k_proj is not None:
        raise Unfit("the cross-attention has image keys beside the text")
    modulation = (
        block.scale_shift_table.unsqueeze(-3) + temb.float()
        if temb.dim() == 4
        else (block.scale_shift_table + temb.float())
    )
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
        m.squeeze(-2) if temb.dim() == 4 else m for m in modulation.chunk(6, -2)
    )

    attn = block.attn1
    part = Part((attn.norm_q, attn.norm_k), tables(rotary_emb))
    linears, part = part.holding(x, attn.to_q, attn.to_k, attn.to_v)
    qkv, x = Normed(block.norm1, x, scale, shift).into(*linears)
    attended = attention(attn, qkv, part)
    has_weight = getattr(block.norm2, "weight", None) is not None
    out, bias = Out(attn.to_out).branch(attended, all_sums=has_weight)

    attn = block.attn2
    normed = Normed(block.norm2, out, None, None, x, gate, h_dtype=dtype, x_bias=bias)
    (to_q, *to_kv), part = Part((attn.norm_q, attn.norm_k)).holding(
        out, attn.to_q, attn.to_k, attn.to_v, keys_of=encoder_hidden_states
    )
    (q,), x = normed.into(to_q)
    attended = attention(attn, [q, *project(encoder_hidden_states, *to_kv)], part)
    out, bias = Out(attn.to_out).branch(attended, all_sums=False)

    mlp = feed_forward(block.ffn).holding(x)
    normed = Normed(block.norm3, out, scale_mlp, shift_mlp, x, x_bias=bias)
    hidden, x = normed.into(*mlp.inputs)
    out, bias = mlp.branch(hidden)
    return gated_residual(x, gate_mlp, out, dtype, bias)


def tables(rotary_emb: tuple[Tensor, Tensor]) -> Rotation:
    """[1, S, 1, d] each, every entry twice."""
    cos, sin = rotary_emb
    return Rotation("interleaved", "pairs", cos[..., 0::2], sin[..., 1::2])


def attention(attn: Any, qkv: list[Tensor], part: Part, mask: Tensor | None = None) -> Tensor:
    """Attention whose queries and keys are normed across heads; qkv are [B, S, H * d]."""
    head_dim = qkv[0].shape[-1] // attn.heads
    q, k = queries_keys([qkv], [part], head_dim, across_heads=True)
    return dispatch(attn, mask)(q, k, in_heads(qkv[2], head_dim))


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    attn = block.attn1
    width, head_dim = attn.inner_dim, attn.inner_dim // attn.heads
    cos, sin = draw.tables(1, draw.S, 1, head_dim // 2)
    arguments = {
        **draw_streams(draw, width),
        "rotary_emb": tuple(t.repeat_interleave(2, -1) for t in (cos, sin)),
    }
    yield arguments | {"temb": draw.normal(draw.B, 6, width)}
    yield arguments | {"temb": draw.normal(draw.B, draw.S, 6, width)}


def small(block: Any) -> nn.Module:
    cross_attn_norm = type(block.norm2) is not nn.Identity
    return type(block)(dim=64, ffn_dim=96, num_heads=2, cross_attn_norm=cross_attn_norm)


FAMILIES = (
    Family(
        (f"{MODULE}.WanTransformerBlock",),
        Swap("block", fused_block, examples, small, constants=("rotary_emb",)),
    ),
)
