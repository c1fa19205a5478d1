"""Stable Diffusion 3 and 3.5: diffusers' JointTransformerBlock, with dual attention or without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.swaps.fused import Normed, gated_residual, modulation
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.streams import (
    Part,
    draw_streams,
    finish,
    image_and_text,
    joint_attention,
    through,
)
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap, Unfit


def joint_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor | None, Tensor]:
    if block._chunk_size is not None:
        raise Unfit("the feed-forward runs in chunks")
    attn, x, text = block.attn, hidden_states, encoder_hidden_states
    linears = (block.norm1.linear, block.norm1_context.linear)
    of_image, of_text = modulation(temb, *linears)
    shift, scale, *image, shift2, scale2, gate2 = _nine(of_image, block.use_dual_attention)
    last = block.context_pre_only
    if last:
        text_scale, text_shift = of_text.chunk(2, -1)
    else:
        text_shift, text_scale, *of_text_branch = of_text.chunk(6, -1)
    qkv, qkv_text = image_and_text(attn)
    norm, norm_text = block.norm1.norm, block.norm1_context.norm
    projected, x = Normed(norm, x, scale, shift).into(*qkv)
    projected_text, text = Normed(norm_text, text, text_scale, text_shift).into(*qkv_text)
    projections = (projected, projected_text)
    parts = (
        Part((attn.norm_q, attn.norm_k)),
        Part((attn.norm_added_q, attn.norm_added_k)),
    )
    head_dim = projections[0][0].shape[-1] // attn.heads
    attended, attended_text = joint_attention(projections, parts, head_dim, attend)
    branch = through(attn.to_out)(attended)
    if block.use_dual_attention:
        x = gated_residual(x, image[0], branch)
        attn2 = block.attn2
        qkv = (attn2.to_q, attn2.to_k, attn2.to_v)
        own = Normed(norm, hidden_states, scale2, shift2).into(*qkv)[0]
        part = Part((attn2.norm_q, attn2.norm_k))
        (attended,) = joint_attention([own], [part], head_dim, attend)
        branch, image = through(attn2.to_out)(attended), [gate2, *image[1:]]
    out = finish(x, branch, image, block.norm2, feed_forward(block.ff))
    if last:
        return None, out
    branch = through((attn.to_add_out,))(attended_text)
    mlp = feed_forward(block.ff_context)
    return finish(text, branch, of_text_branch, block.norm2_context, mlp), out


def _nine(modulation: Tensor, dual: bool) -> tuple[Any, ...]:
    """shift, scale and gate of attention, of the MLP and, if there is one, of `attn2`."""
    return modulation.chunk(9, -1) if dual else (*modulation.chunk(6, -1), None, None, None)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, H, d] each, to [B, S, H * d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    width = block.attn.query_dim
    yield {**draw_streams(draw, width), "temb": draw.normal(draw.B, width)}


def small(block: Any) -> nn.Module:
    return type(block)(
        dim=64,
        num_attention_heads=2,
        attention_head_dim=32,
        context_pre_only=block.context_pre_only,
        qk_norm=None if block.attn.norm_q is None else "rms_norm",
        use_dual_attention=block.use_dual_attention,
    )


FAMILIES = (
    Family(
        ("diffusers.models.attention.JointTransformerBlock",),
        Swap("joint", joint_block, examples, small),
    ),
)
