"""HunyuanVideo with its FramePack and 1.5, HunyuanImage: diffusers' double and single streams.

Attention sees the image, or video, before the text, and only the image is rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.swaps.flux import beside, tables
from fxopt.backends.swaps.fused import Segments, modulation
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.streams import (
    Stream,
    dispatch,
    draw_streams,
    image_and_text,
    joint,
)
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap

MODULE = "diffusers.models.transformers.transformer_hunyuan"
Masking = Callable[[Tensor, int], Tensor]


def double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
    *,
    masking: Masking = lambda mask, _: mask,
) -> tuple[Tensor, Tensor]:
    attn = block.attn
    own, own_text = image_and_text(attn)
    of_image, of_text = modulation(temb, (block.norm1.linear, 6), (block.norm1_context.linear, 6))
    linear = block.norm1.linear
    of_image, segments = _replaced(hidden_states, of_image, linear, token_replace_emb, num_tokens)
    rotary = freqs_cis or image_rotary_emb
    streams = (
        Stream(
            hidden_states,
            of_image,
            (block.norm1.norm, block.norm2),
            own,
            feed_forward(block.ff),
            None if rotary is None else tables(rotary),
            segments,
        ),
        Stream(
            encoder_hidden_states,
            of_text,
            (block.norm1_context.norm, block.norm2_context),
            own_text,
            feed_forward(block.ff_context),
        ),
    )
    if attention_mask is not None:
        num_all = hidden_states.shape[1] + encoder_hidden_states.shape[1]
        attention_mask = masking(attention_mask, num_all)
    image, text = joint(streams, attn.inner_dim // attn.heads, dispatch(attn, attention_mask))
    return image, text


def single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    length = hidden_states.shape[1]
    x = torch.cat([hidden_states, encoder_hidden_states], 1)
    (of_x,) = modulation(temb, (block.norm.linear, 3))
    of_x, segments = _replaced(x, of_x, block.norm.linear, token_replace_emb, num_tokens)
    rotation = None
    if image_rotary_emb is not None:
        rotation = tables(image_rotary_emb)._replace(rotated="first")
    x = beside(block, x, of_x, rotation, dispatch(block.attn, attention_mask), segments)
    return x[:, :length], x[:, length:]


def _replaced(
    x: Tensor,
    of_x: tuple[Tensor, ...],
    linear: nn.Module,
    token_replace_emb: Tensor | None,
    num_tokens: int | None,
) -> tuple[tuple[Tensor, ...], Segments | None]:
    """Modulation of `x`, whose first `num_tokens`, an image, may have rows of their own."""
    if token_replace_emb is None:
        return of_x, None
    assert num_tokens is not None
    (of_first,) = modulation(token_replace_emb, (linear, len(of_x)))
    rows = tuple(torch.cat(pair, 1) for pair in zip(of_first, of_x, strict=True))
    is_other = torch.arange(x.shape[1], device=x.device) >= num_tokens
    return rows, Segments(is_other.expand(x.shape[:2]))


def of_pairs(mask: Tensor, num_all: int) -> Tensor:
    """HunyuanVideo 1.5: who is no padding sees who is none; the mask comes for the text alone."""
    mask = F.pad(mask, (num_all - mask.shape[1], 0), value=True).bool()
    keys = mask[:, None, None].repeat(1, 1, num_all, 1)
    return keys & keys.transpose(2, 3)


def _examples(
    rotary: str, *, replaces: bool = False, masks_text: bool = False
) -> Callable[[Any, Draw], Iterator[Arguments]]:
    def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
        width = block.attn.query_dim
        num_all = draw.T if masks_text else draw.S + draw.T
        mask = torch.arange(num_all) < torch.tensor([[num_all], [num_all - 1]])
        arguments = {
            **draw_streams(draw, width),
            "temb": draw.normal(draw.B, width),
            "attention_mask": mask if masks_text else mask[:, None, None],
            rotary: draw.tables(draw.S, block.attn.inner_dim // block.attn.heads),
        }
        if replaces:
            arguments |= {"token_replace_emb": draw.normal(draw.B, width), "num_tokens": 2}
        yield arguments
        yield {n: v for n, v in arguments.items() if n != "attention_mask"}

    return examples


def small(block: Any) -> nn.Module:
    return type(block)(num_attention_heads=2, attention_head_dim=32, mlp_ratio=2.0)


def _family(forward: Callable[..., Any], rotary: str, *classes: str, **options: bool) -> Family:
    swap = Swap(
        forward.func.__name__ if isinstance(forward, partial) else forward.__name__,
        forward,
        _examples(rotary, **options),
        small,
        constants=(rotary, "attention_mask"),
        numbers=("num_tokens",),
        ignores_more=not options.get("replaces", False),
    )
    return Family(tuple(f"{MODULE}{name}" for name in classes), swap)


FAMILIES = (
    _family(double, "freqs_cis", "_video.HunyuanVideoTransformerBlock"),
    _family(double, "image_rotary_emb", "image.HunyuanImageTransformerBlock"),
    _family(
        double,
        "freqs_cis",
        "_video.HunyuanVideoTokenReplaceTransformerBlock",
        replaces=True,
    ),
    _family(
        partial(double, masking=of_pairs),
        "freqs_cis",
        "_video15.HunyuanVideo15TransformerBlock",
        masks_text=True,
    ),
    _family(
        single,
        "image_rotary_emb",
        "_video.HunyuanVideoSingleTransformerBlock",
        "image.HunyuanImageSingleTransformerBlock",
    ),
    _family(
        single,
        "image_rotary_emb",
        "_video.HunyuanVideoTokenReplaceSingleTransformerBlock",
        replaces=True,
    ),
)
