"""FLUX.1, and who has its blocks: double-stream and single-stream blocks of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends.swaps.branches import Mlp
from fxopt.backends.swaps.fused import (
    Normed,
    Segments,
    clip_half,
    gated_residual,
    modulation,
)
from fxopt.backends.swaps.mlps import activation, feed_forward
from fxopt.backends.swaps.operands import Part, Rotation
from fxopt.backends.swaps.streams import (
    Attend,
    Stream,
    dispatch,
    draw_streams,
    image_and_text,
    joint,
    joint_attention,
)
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap

MODULE = "diffusers.models.transformers.transformer_flux"


def double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    attn = block.attn
    own, own_text = image_and_text(attn)
    image, text = modulation(temb, (block.norm1.linear, 6), (block.norm1_context.linear, 6))
    text_tables, image_tables = tables(image_rotary_emb).split(encoder_hidden_states.shape[1])
    streams = (
        Stream(
            encoder_hidden_states,
            text,
            (block.norm1_context.norm, block.norm2_context),
            own_text,
            feed_forward(block.ff_context),
            text_tables,
        ),
        Stream(
            hidden_states,
            image,
            (block.norm1.norm, block.norm2),
            own,
            feed_forward(block.ff),
            image_tables,
        ),
    )
    text_out, image_out = joint(streams, attn.head_dim, dispatch(attn))
    return clip_half(text_out), image_out


def single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], 1)
    (of_x,) = modulation(temb, (block.norm.linear, 3))
    x = clip_half(beside(block, x, of_x, tables(image_rotary_emb), dispatch(block.attn)))
    return x[:, :length], x[:, length:]


def beside(
    block: Any,
    x: Tensor,
    of_x: Sequence[Tensor],
    rotation: Rotation | None,
    attend: Attend,
    segments: Segments | None = None,
) -> Tensor:
    """Attention beside the MLP, from one norm and into one projection.

    of_x: shift, scale and gate, as `Stream` has them.
    """
    attn, (shift, scale, gate) = block.attn, of_x
    mlp = Mlp((block.proj_mlp,), activation(block.act_mlp), "none", block.proj_out).holding(x)
    part = Part((attn.norm_q, attn.norm_k), rotation)
    linears, part = part.holding(x, attn.to_q, attn.to_k, attn.to_v, *mlp.inputs)
    normed = Normed(block.norm.norm, x, scale, shift, segments=segments)
    (*qkv, hidden), x = normed.into(*linears)
    (attended,) = joint_attention([qkv], [part], attn.inner_dim // attn.heads, attend)
    out, bias = mlp.branch([hidden], beside=attended)
    return gated_residual(x, gate, out, x_bias=bias, segments=segments)


def tables(cos_sin: tuple[Tensor, Tensor]) -> Rotation:
    """[S, d] each, joint over both streams."""
    cos, sin = (t[None, :, None] for t in cos_sin)
    return Rotation("interleaved", "channels", cos, sin)


def draw_tables(draw: Draw, head_dim: int) -> tuple[Tensor, Tensor]:
    return draw.tables(draw.T + draw.S, head_dim)


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    width = block.attn.query_dim
    yield {
        **draw_streams(draw, width),
        "temb": draw.normal(draw.B, width),
        "image_rotary_emb": draw_tables(draw, block.attn.head_dim),
    }


def small(block: Any) -> nn.Module:
    return type(block)(dim=64, num_attention_heads=2, attention_head_dim=32)


def _classes(block: str, *models: str) -> tuple[str, ...]:
    """Of FLUX and of models that have its blocks under names of their own."""
    own = (f"{path}.{name}{block}" for path, name in map(LIKE.__getitem__, models))
    return (f"{MODULE}.Flux{block}", *own)


LIBRARY = "diffusers.models.transformers.transformer"
LIKE = {
    "bria": (f"{LIBRARY}_bria", "Bria"),
    "longcat": (f"{LIBRARY}_longcat_image", "LongCatImage"),
    "ovis": (f"{LIBRARY}_ovis_image", "OvisImage"),
}
FAMILIES = (
    Family(
        _classes("TransformerBlock", "bria", "longcat", "ovis"),
        Swap("double", double, examples, small, constants=("image_rotary_emb",)),
    ),
    Family(
        _classes("SingleTransformerBlock", "bria", "longcat"),
        Swap("single", single, examples, small, constants=("image_rotary_emb",)),
    ),
)
