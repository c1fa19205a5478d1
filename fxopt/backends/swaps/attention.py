"""Attention modules of diffusers, for blocks of no known family that are built with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

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


FAMILIES = (
    Family(
        (f"{MODULE}flux.FluxAttention", f"{MODULE}flux2.Flux2Attention"),
        Swap("attention", joint, joint_examples, joint_small, constants=("image_rotary_emb",)),
    ),
)
