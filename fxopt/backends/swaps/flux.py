"""FLUX.1, and who has its blocks, Chroma say: double-stream and single-stream blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from fxopt.backends.swaps.swap import Arguments, Draw, Form, Swap, narrow


def double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    attn = block.attn
    own, own_text = image_and_text(attn)
    image, text = modulations(temb, block.norm1, block.norm1_context)
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
    attend = dispatch(attn, of_pairs(attention_mask))
    text_out, image_out = joint(streams, attn.inner_dim // attn.heads, attend)
    return clip_half(text_out), image_out


def single(
    block: Any,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    x = hidden_states
    if encoder_hidden_states is not None:
        x = torch.cat([encoder_hidden_states, x], 1)
    (of_x,) = modulations(temb, block.norm)
    attend = dispatch(block.attn, of_pairs(attention_mask))
    x = clip_half(beside(block, x, of_x, tables(image_rotary_emb), attend))
    if encoder_hidden_states is None:
        return x
    length = encoder_hidden_states.shape[1]
    return x[:, :length], x[:, length:]


def modulations(temb: Tensor, *adaln: Any) -> list[tuple[Tensor, ...]]:
    """Of the norms of each stream: by their linears from [B, D], or [B, n, D] of all of them.

    A norm alone is of attention and MLP at once.
    """
    num = 6 if len(adaln) > 1 else 3
    if has_linear(adaln[0]):
        return modulation(temb, *((norm.linear, num) for norm in adaln))
    parts = temb.split(1, 1)
    return [parts[i : i + num] for i in range(0, len(parts), num)]


def has_linear(adaln: nn.Module) -> bool:
    """Whether it makes its own modulation; Chroma's comes from outside of the blocks."""
    return hasattr(adaln, "linear")


def of_pairs(mask: Tensor | None) -> Tensor | None:
    """[B, S] of who is no padding, as the model multiplies it out: [B, 1, S, S]."""
    return None if mask is None else mask[:, None, None] * mask[:, None, :, None]


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
    is_gated = block.proj_mlp.out_features + x.shape[-1] > block.proj_out.in_features
    packing = "up_gate" if is_gated else "none"
    mlp = Mlp((block.proj_mlp,), activation(block.act_mlp), packing, block.proj_out).holding(x)
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


def _examples(*, is_single: bool, is_joined: bool = False) -> Callable[..., Iterator[Arguments]]:
    def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
        attn, width, num_all = block.attn, block.attn.query_dim, draw.T + draw.S
        norm, num = (block.norm, 3) if is_single else (block.norm1, 12)
        shape = (width,) if has_linear(norm) else (num, width)
        streams = draw_streams(draw, width)
        if is_joined:
            streams = {"hidden_states": draw.normal(draw.B, num_all, width)}
        arguments = {
            **streams,
            "temb": draw.normal(draw.B, *shape),
            "image_rotary_emb": draw_tables(draw, attn.inner_dim // attn.heads),
        }
        yield arguments
        mask = torch.arange(num_all) < torch.tensor([[num_all], [num_all - 1]])
        yield arguments | {"attention_mask": mask}

    return examples


def _form(parts: str, forward: Callable[..., Any], **options: bool) -> Form:
    name, constants = f"{forward.__name__} {options}", ("image_rotary_emb", "attention_mask")
    swap = Swap(name, forward, _examples(**options), narrow, constants=constants)
    return Form(parts, swap)


SINGLE = "norm proj_mlp act_mlp proj_out attn"
FORMS = (
    _form("norm1 norm1_context attn norm2 ff norm2_context ff_context", double, is_single=False),
    _form(SINGLE, single, is_single=True),
    _form(SINGLE, single, is_single=True, is_joined=True),
)
