"""FLUX.2: double-stream and single-stream blocks of diffusers; the model makes the modulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxopt.backends.swaps.branches import Mlp
from fxopt.backends.swaps.flux import draw_tables, tables
from fxopt.backends.swaps.fused import Normed, clip_half, gated_residual
from fxopt.backends.swaps.operands import Part
from fxopt.backends.swaps.streams import (
    Stream,
    dispatch,
    draw_streams,
    image_and_text,
    joint,
    joint_attention,
)
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap

MODULE = "diffusers.models.transformers.transformer_flux2"


def double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    attn = block.attn
    own, own_text = image_and_text(attn)
    text_tables, image_tables = tables(image_rotary_emb).split(encoder_hidden_states.shape[1])
    streams = (
        Stream(
            encoder_hidden_states,
            split(temb_mod_txt, 6),
            (block.norm1_context, block.norm2_context),
            own_text,
            feed_forward(block.ff_context),
            text_tables,
        ),
        Stream(
            hidden_states,
            split(temb_mod_img, 6),
            (block.norm1, block.norm2),
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
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> Tensor:
    attn, x = block.attn, hidden_states
    shift, scale, gate = split(temb_mod, 3)
    linear, width = attn.to_qkv_mlp_proj, attn.inner_dim
    sizes = [width, width, width, linear.out_features - 3 * width]
    (*qkv, hidden), x = Normed(block.norm, x, scale, shift).into(linear, sizes=sizes)
    part = Part((attn.norm_q, attn.norm_k), tables(image_rotary_emb))
    (attended,) = joint_attention([qkv], [part], attn.head_dim, dispatch(attn))
    mlp = Mlp((), "silu", "gate_up", attn.to_out)
    out, bias = mlp.branch([hidden], beside=attended)
    return clip_half(gated_residual(x, gate, out, x_bias=bias))


def split(mod: Tensor, num: int) -> tuple[Tensor, ...]:
    """[B, num * D] or [B, 1, num * D] to its parts [B, 1, D]."""
    return (mod.unsqueeze(1) if mod.dim() == 2 else mod).chunk(num, -1)


def feed_forward(ff: Any) -> Mlp:
    return Mlp((ff.linear_in,), "silu", "gate_up", ff.linear_out)


def double_examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    width = block.attn.query_dim
    yield {
        **draw_streams(draw, width),
        "temb_mod_img": draw.normal(draw.B, 6 * width),
        "temb_mod_txt": draw.normal(draw.B, 6 * width),
        "image_rotary_emb": draw_tables(draw, block.attn.head_dim),
    }


def single_examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    width, length = block.attn.query_dim, draw.T + draw.S
    yield {
        "hidden_states": draw.normal(draw.B, length, width),
        "temb_mod": draw.normal(draw.B, 3 * width),
        "image_rotary_emb": draw_tables(draw, block.attn.head_dim),
    }


def small(block: Any) -> nn.Module:
    bias = block.attn.use_bias
    return type(block)(dim=64, num_attention_heads=2, attention_head_dim=32, bias=bias)


FAMILIES = (
    Family(
        (f"{MODULE}.Flux2TransformerBlock",),
        Swap("double", double, double_examples, small, constants=("image_rotary_emb",)),
    ),
    Family(
        (f"{MODULE}.Flux2SingleTransformerBlock",),
        Swap("single", single, single_examples, small, constants=("image_rotary_emb",)),
    ),
)
