"""Wan, and who has its block: self-attention, cross-attention and MLP, modulated in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends.swaps.branches import Out
from fxopt.backends.swaps.fused import (
    Normed,
    gated_residual,
    project,
)
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.operands import Part, Rotation, Section, operand, queries_keys
from fxopt.backends.swaps.operands import heads as in_heads
from fxopt.backends.swaps.streams import dispatch, draw_streams
from fxopt.backends.swaps.swap import SIZES, Arguments, Draw, Form, Swap, narrow

Rotary = tuple[Tensor, Tensor] | Tensor
LENGTH_OF_TEXT = 512  # the number of its tokens where an image's come before it


def fused_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Rotary,
    attention_mask: Tensor | None = None,
    original_context_length: int | None = None,
    *,
    dim_of_parts: int = 2,
) -> Tensor:
    """dim_of_parts: where shift, scale and gate are in what comes for each token."""
    x, dtype, table = hidden_states, hidden_states.dtype, block.scale_shift_table
    is_per_token = temb.dim() == 4
    dim = dim_of_parts if is_per_token else 1
    parts = (table.unsqueeze(3 - dim) if is_per_token else table) + temb.float()
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
        m.squeeze(dim) if is_per_token else m for m in parts.chunk(6, dim)
    )

    attn = block.attn1
    part = Part((attn.norm_q, attn.norm_k), tables(rotary_emb))
    linears, part = part.holding(x, attn.to_q, attn.to_k, attn.to_v)
    qkv, x = Normed(block.norm1, x, scale, shift).into(*linears)
    attended = attention(attn, qkv, part, attention_mask)
    has_weight = getattr(block.norm2, "weight", None) is not None
    out, bias = Out(attn.to_out).branch(attended, all_sums=has_weight)

    attn = block.attn2
    text, image = split_image(attn, encoder_hidden_states)
    normed = Normed(block.norm2, out, None, None, x, gate, h_dtype=dtype, x_bias=bias)
    (to_q, *to_kv), part = Part((attn.norm_q, attn.norm_k)).holding(
        out, attn.to_q, attn.to_k, attn.to_v, keys_of=text
    )
    (q,), x = normed.into(to_q)
    attended = attention(attn, [q, *project(text, *to_kv)], part, image=image)
    out, bias = Out(attn.to_out).branch(attended, all_sums=False)

    mlp = feed_forward(block.ffn).holding(x)
    normed = Normed(block.norm3, out, scale_mlp, shift_mlp, x, x_bias=bias)
    hidden, x = normed.into(*mlp.inputs)
    out, bias = mlp.branch(hidden)
    return gated_residual(x, gate_mlp, out, dtype, bias)


def tables(rotary_emb: Rotary) -> Rotation:
    """[1, S, 1, d] each, every entry twice; or [B, S, 2d] that hold both."""
    if isinstance(rotary_emb, Tensor):
        cos, sin = rotary_emb.unsqueeze(-2).chunk(2, -1)
    else:
        cos, sin = rotary_emb
    return Rotation("interleaved", "pairs", cos[..., 0::2], sin[..., 1::2])


def split_image(attn: Any, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """The text, and the tokens of an image before it if `attn` has keys of its own for them."""
    if getattr(attn, "add_k_proj", None) is None:
        return keys, None
    length = keys.shape[1] - LENGTH_OF_TEXT
    return keys[:, length:], keys[:, :length]


def attention(
    attn: Any,
    qkv: list[Tensor],
    part: Part,
    mask: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """Attention of one stream; qkv are [B, S, H * d].

    image: what the queries see in an attention of its own, whose result is added.
    """
    head_dim = qkv[0].shape[-1] // attn.heads
    across_heads = is_across_heads(attn.norm_q, head_dim)
    q, k = queries_keys([qkv], [part], head_dim, across_heads=across_heads)
    out = dispatch(attn, mask)(q, k, in_heads(qkv[2], head_dim))
    if image is None:
        return out
    linears, part = Part((attn.norm_added_k, None)).holding(image, attn.add_k_proj, attn.add_v_proj)
    of_image, v = project(image, *linears)
    section = Section(of_image, attn.norm_added_k, None, part.biases[0])
    k = operand(section, head_dim, across_heads=across_heads)
    return out + dispatch(attn)(q, k, in_heads(v, head_dim))


def is_across_heads(norm: Any, head_dim: int) -> bool:
    """Whether a norm of queries is over all heads at once."""
    weight: Any = getattr(norm, "weight", None)
    shape: Any = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", (head_dim,))
    return bool((shape if weight is None else weight.shape)[-1] > head_dim)


def draw_keys(attn: Any, draw: Draw, width: int) -> Tensor:
    """Of the text, and of an image if `attn` takes both."""
    has_image = getattr(attn, "add_k_proj", None) is not None
    return draw.normal(draw.B, draw.T + has_image * LENGTH_OF_TEXT, width)


def draw_tables(draw: Draw, length: int, head_dim: int, *, joined: bool = False) -> Rotary:
    """As `tables` reads them, of `length` tokens."""
    cos, sin = (t.repeat_interleave(2, -1) for t in draw.tables(1, length, 1, head_dim // 2))
    return torch.cat([cos, sin], -1).squeeze(2) if joined else (cos, sin)


def _examples(*, joined: bool = False, dim: int = 2) -> Callable[[Any, Draw], Iterator[Arguments]]:
    def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
        attn = block.attn1
        width, head_dim = attn.inner_dim, attn.inner_dim // attn.heads
        arguments = {
            **draw_streams(draw, width),
            "encoder_hidden_states": draw_keys(block.attn2, draw, width),
            "rotary_emb": draw_tables(draw, draw.S, head_dim, joined=joined),
        }
        per_token = draw.normal(draw.B, draw.S, 6, width)
        tembs = per_token.movedim(2, dim).contiguous(), draw.normal(draw.B, 6, width)
        mask = torch.ones(1, 1, draw.S, draw.S).tril().bool()
        for temb in tembs:
            yield arguments | {"temb": temb}
            yield arguments | {"temb": temb, "attention_mask": mask}
            yield arguments | {"temb": temb, "original_context_length": draw.S}

    return examples


def small(block: Any) -> nn.Module:
    image = getattr(block.attn2, "add_k_proj", None) is not None
    return narrow(
        block,
        cross_attn_norm=type(block.norm2) is not nn.Identity,
        added_kv_proj_dim=SIZES["dim"] if image else None,
    )


def _form(forward: Callable[..., Any], **options: Any) -> Form:
    swap = Swap(
        f"block {options}",
        forward,
        _examples(**options),
        small,
        constants=("rotary_emb", "attention_mask"),
        numbers=("original_context_length",),
    )
    return Form(PARTS, swap)


PARTS = "norm1 attn1 norm2 attn2 norm3 ffn scale_shift_table"
FORMS = (
    _form(fused_block),
    _form(partial(fused_block, dim_of_parts=1), dim=1),
    _form(fused_block, joined=True),
)
