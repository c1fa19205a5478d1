"""Attention modules of diffusers, for blocks of no known family that are built with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxopt.backends.swaps import ltx, wan
from fxopt.backends.swaps.branches import Out
from fxopt.backends.swaps.flux import tables
from fxopt.backends.swaps.fused import project
from fxopt.backends.swaps.operands import Part
from fxopt.backends.swaps.streams import (
    dispatch,
    draw_streams,
    joint_attention,
)
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap

MODULE = "diffusers.models.transformers.transformer_"


def joint(
    attn: Any,
    hidden_states: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    encoder_hidden_states: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """FLUX: one stream, or image and text."""
    rotation, norms = tables(image_rotary_emb), (attn.norm_q, attn.norm_k)
    out, attend = Out(getattr(attn, "to_out", ())), dispatch(attn)
    of_image = rotation
    if encoder_hidden_states is not None:
        of_text, of_image = rotation.split(encoder_hidden_states.shape[1])
    linears, part = Part(norms, of_image).holding(hidden_states, attn.to_q, attn.to_k, attn.to_v)
    image = project(hidden_states, *linears)
    if encoder_hidden_states is None:
        return out(joint_attention([image], [part], attn.head_dim, attend)[0])
    linears, part_text = Part((attn.norm_added_q, attn.norm_added_k), of_text).holding(
        encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    )
    text = project(encoder_hidden_states, *linears)
    parts = (part_text, part)
    text_out, image_out = joint_attention((text, image), parts, attn.head_dim, attend)
    return out(image_out), Out((attn.to_add_out,))(text_out)


def joint_examples(attn: Any, draw: Draw) -> Iterator[Arguments]:
    streams = draw_streams(draw, attn.query_dim)
    if attn.added_kv_proj_dim is not None:
        yield {**streams, "image_rotary_emb": draw.tables(draw.T + draw.S, attn.head_dim)}
    else:
        x, rope = streams["hidden_states"], draw.tables(draw.S, attn.head_dim)
        yield {"hidden_states": x, "image_rotary_emb": rope}


def joint_small(attn: Any) -> nn.Module:
    options = {"pre_only": attn.pre_only} if hasattr(attn, "pre_only") else {}
    return type(attn)(
        query_dim=64,
        heads=2,
        dim_head=32,
        bias=attn.use_bias,
        added_kv_proj_dim=None if attn.added_kv_proj_dim is None else 64,
        **options,
    )


def across_heads(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Wan (`rotary_emb`) and LTX (`image_rotary_emb`): self-attention or cross-attention."""
    rotation = mask = image = None
    if rotary_emb is not None:
        rotation = wan.tables(rotary_emb)
    elif image_rotary_emb is not None:
        rotation = ltx.tables(image_rotary_emb, attn.head_dim)
    keys = encoder_hidden_states
    if keys is not None:
        keys, image = wan.split_image(attn, keys)
    linears, part = Part((attn.norm_q, attn.norm_k), rotation).holding(
        hidden_states, attn.to_q, attn.to_k, attn.to_v, keys_of=keys
    )
    if keys is None:
        qkv = project(hidden_states, *linears)
    else:
        kv = project(keys, *linears[1:])
        qkv = [*project(hidden_states, linears[0]), *kv]
        mask = ltx.per_head(attn, attention_mask, keys)
    return Out(attn.to_out)(wan.attention(attn, qkv, part, mask, image))


def wan_examples(attn: Any, draw: Draw) -> Iterator[Arguments]:
    streams = draw_streams(draw, attn.to_q.in_features)
    streams["encoder_hidden_states"] = wan.draw_keys(attn, draw, attn.to_k.in_features)
    rope = wan.draw_tables(draw, attn.inner_dim // attn.heads)
    alone = {"hidden_states": streams["hidden_states"], "rotary_emb": rope}
    yield from (streams, alone) if attn.is_cross_attention else (alone, streams)


def ltx_examples(attn: Any, draw: Draw) -> Iterator[Arguments]:
    streams = draw_streams(draw, attn.query_dim)
    streams["encoder_hidden_states"] = draw.normal(draw.B, draw.T, attn.cross_attention_dim)
    rope = draw.tables(draw.B, draw.S, attn.inner_dim)
    alone = {"hidden_states": streams["hidden_states"], "image_rotary_emb": rope}
    if attn.cross_attention_dim == attn.query_dim:
        yield alone
    yield streams
    yield {**streams, "attention_mask": ltx.draw_mask(draw)}


FAMILIES = (
    Family(
        (f"{MODULE}flux.FluxAttention", f"{MODULE}flux2.Flux2Attention"),
        Swap("attention", joint, joint_examples, joint_small, constants=("image_rotary_emb",)),
    ),
    Family(
        (f"{MODULE}wan.WanAttention",),
        Swap(
            "attention",
            across_heads,
            wan_examples,
            lambda attn: type(attn)(dim=64, heads=2, dim_head=32),
            constants=("rotary_emb",),
        ),
    ),
    Family(
        (f"{MODULE}ltx.LTXAttention",),
        Swap(
            "attention",
            across_heads,
            ltx_examples,
            lambda attn: type(attn)(query_dim=64, heads=2, kv_heads=2, dim_head=32),
            constants=("image_rotary_emb", "attention_mask"),
        ),
    ),
)
