"""Qwen-Image: diffusers' double-stream block with complex rotary tables and a padded text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends.swaps.fused import Segments, clip_half, modulation
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.operands import of_complex
from fxopt.backends.swaps.streams import (
    Stream,
    dispatch,
    draw_streams,
    image_and_text,
    joint,
)
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap


def double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    encoder_hidden_states_mask: Tensor | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    attn = block.attn
    own, own_text = image_and_text(attn)
    image_tables, text_tables = image_rotary_emb
    of_image, of_text, segments = _modulations(block, temb, modulate_index)
    streams = (
        Stream(
            encoder_hidden_states,
            of_text,
            (block.txt_norm1, block.txt_norm2),
            own_text,
            feed_forward(block.txt_mlp),
            of_complex(text_tables),
        ),
        Stream(
            hidden_states,
            of_image,
            (block.img_norm1, block.img_norm2),
            own,
            feed_forward(block.img_mlp),
            of_complex(image_tables),
            segments,
        ),
    )
    mask = encoder_hidden_states_mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(hidden_states.shape[:2])], 1)[:, None, None]
    text_out, image_out = joint(streams, attn.inner_dim // attn.heads, dispatch(attn, mask))
    return clip_half(text_out), clip_half(image_out)


def _modulations(
    block: Any, temb: Tensor, index: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Segments | None]:
    """Of the image, 6 times [B, 1, D], and of the text.

    An index comes with `zero_cond_t`: temb is of the noisy images and then of the clean ones, and
    those of the image tables [B, 2, D] of both.
    """
    image, text = block.img_mod[1], block.txt_mod[1]
    if index is None:
        of_image, of_text = modulation(temb, (image, 6), (text, 6))
        return of_image, of_text, None
    ((whole,),) = modulation(temb, (image, 1))
    (of_text,) = modulation(temb.chunk(2)[0], (text, 6))
    return torch.cat(whole.chunk(2), 1).chunk(6, -1), of_text, Segments(index != 0)


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    attn = block.attn
    pairs = attn.inner_dim // attn.heads // 2
    image, text = (torch.complex(*draw.tables(n, pairs)) for n in (draw.S, draw.T))
    arguments = {
        **draw_streams(draw, block.dim),
        "temb": draw.normal(draw.B * (1 + block.zero_cond_t), block.dim),
        "image_rotary_emb": (image, text),
    }
    if block.zero_cond_t:
        arguments["modulate_index"] = (torch.arange(draw.S) % 2).expand(draw.B, -1)
    mask = torch.arange(draw.T) < torch.tensor([[draw.T], [1]])
    yield {**arguments, "encoder_hidden_states_mask": mask}
    yield arguments


def small(block: Any) -> nn.Module:
    sizes = {"dim": 64, "num_attention_heads": 2, "attention_head_dim": 32}
    return type(block)(**sizes, zero_cond_t=block.zero_cond_t)


FAMILIES = (
    Family(
        ("diffusers.models.transformers.transformer_qwenimage.QwenImageTransformerBlock",),
        Swap(
            "double",
            double,
            examples,
            small,
            constants=("image_rotary_emb", "encoder_hidden_states_mask"),
        ),
    ),
)
