"""Attention modules of diffusers with queries of one stream, found by structure.

Self-attention or cross-attention, normed by head or across heads, beside an image's keys or alone.
How the rotary tables are to be read is not read off the processor but tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxopt.backends.swaps import flux, ltx, wan
from fxopt.backends.swaps.branches import Out
from fxopt.backends.swaps.fused import project, read_norm
from fxopt.backends.swaps.operands import Part, Rotation
from fxopt.backends.swaps.streams import draw_streams
from fxopt.backends.swaps.swap import SIZES, Arguments, Draw, Swap, Unfit, is_library, narrow

PARTS = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
OF_IMAGE = ("add_k_proj", "add_v_proj", "norm_added_k")


class Spelling(NamedTuple):
    """How tables are given to attention.

    read: tables and head dim to a rotation. draw: an example of S tokens of H heads, by (draw, S,
    H, head dim).
    """

    read: Callable[[Any, int], Rotation]
    draw: Callable[[Draw, int, int, int], Any]


def _read_halves(tables: tuple[Tensor, Tensor], _: int) -> Rotation:
    """[S, d] each: the second half of a head's channels turns against the first."""
    return flux.tables(tables)._replace(kind="half")


def _read_head_halves(tables: tuple[Tensor, Tensor], _: int) -> Rotation:
    """[B, H, S, d / 2] each: the same with other angles for each head."""
    cos, sin = (t.transpose(1, 2) for t in tables)
    return Rotation("half", "pairs", cos, sin)


def _read_angles(angles: Tensor, _: int) -> Rotation:
    """[B, S, 1, d]."""
    return Rotation("half", "channels", angles.cos(), angles.sin())


SPELLINGS = {
    "neighbours": Spelling(lambda t, _: flux.tables(t), lambda draw, s, h, d: draw.tables(s, d)),
    "halves": Spelling(_read_halves, lambda draw, s, h, d: draw.tables(s, d)),
    "pairs": Spelling(
        lambda t, _: wan.tables(t), lambda draw, s, h, d: wan.draw_tables(draw, s, d)
    ),
    "joined pairs": Spelling(
        lambda t, _: wan.tables(t), lambda draw, s, h, d: wan.draw_tables(draw, s, d, joined=True)
    ),
    "neighbours by head": Spelling(ltx.tables, lambda draw, s, h, d: draw.tables(draw.B, s, h * d)),
    "halves by head": Spelling(
        _read_head_halves, lambda draw, s, h, d: draw.tables(draw.B, h, s, d // 2)
    ),
    "angles": Spelling(_read_angles, lambda draw, s, h, d: draw.tables(draw.B, s, 1, d)[0]),
}


def candidates(module: Any, forward: Any) -> Iterator[Swap]:
    linears = [getattr(module, name, None) for name in PARTS[:3]]
    children = {name for name, _ in module.named_children()} - {*OF_IMAGE}
    is_known = children <= {*PARTS} and all(isinstance(m, nn.Linear) for m in linears)
    if not is_known or not hasattr(module, "processor") or not is_library(forward):
        return
    if len({m.out_features for m in linears if m is not None}) > 1:
        return  # fewer heads of keys
    names = *signature(forward).parameters, *signature(type(module.processor).__call__).parameters
    rotary = list(dict.fromkeys(name for name in names if "rotary" in name))
    is_own = module.to_q.in_features == module.to_k.in_features
    for spelling in [*(SPELLINGS if rotary else ()), *([] if rotary and is_own else ["no tables"])]:
        yield Swap(
            f"attention, {spelling}",
            partial(attend, spelling=SPELLINGS.get(spelling), rotary=rotary),
            partial(examples, spelling=SPELLINGS.get(spelling), rotary=rotary),
            small,
            constants=(*rotary, "attention_mask"),
        )


def attend(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    spelling: Spelling | None,
    rotary: list[str],
    **tables: Any,
) -> Tensor:
    """rotary: the names of the tables, of all or of the queries first."""
    if isinstance(attn.__dict__.get("dropout"), float) and attn.dropout > 0:
        raise Unfit("a dropout with p > 0, which may be of attention")
    x, keys, image = hidden_states, encoder_hidden_states, None
    head_dim = attn.to_q.out_features // attn.heads
    found = [spelling.read(tables[n], head_dim) for n in rotary if n in tables and spelling]
    part = Part((attn.norm_q, attn.norm_k), found[0] if found else None)
    if keys is not None:
        keys, image = wan.split_image(attn, keys)
        part = part._replace(key_rotation=found[1] if len(found) > 1 else None)
    linears, part = part.holding(x, attn.to_q, attn.to_k, attn.to_v, keys_of=keys)
    if keys is None:
        qkv, mask = project(x, *linears), per_head(attn, attention_mask, x)
    else:
        qkv = [*project(x, linears[0]), *project(keys, *linears[1:])]
        mask = per_head(attn, attention_mask, keys)
    return Out(getattr(attn, "to_out", ()))(wan.attention(attn, qkv, part, mask, image))


def per_head(attn: Any, mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """[B, 1, S] to [B, H, 1, S]; one of four dims as it is."""
    return mask if mask is None or mask.dim() == 4 else ltx.per_head(attn, mask, keys)


def examples(
    attn: Any, draw: Draw, *, spelling: Spelling | None, rotary: list[str]
) -> Iterator[Arguments]:
    width, heads = attn.to_q.in_features, attn.heads
    sizes = heads, attn.to_q.out_features // heads
    streams = draw_streams(draw, width)
    streams["encoder_hidden_states"] = wan.draw_keys(attn, draw, attn.to_k.in_features)
    alone = {"hidden_states": streams["hidden_states"]}
    of_queries, of_keys = {}, {}
    if spelling is not None:
        of_queries = {rotary[0]: spelling.draw(draw, draw.S, *sizes)}
        of_keys = {name: spelling.draw(draw, draw.T, *sizes) for name in rotary[1:]}
    if attn.to_k.in_features == width:
        yield alone | of_queries
        mask = torch.ones(draw.B, 1, draw.S, draw.S).tril().bool()
        yield alone | of_queries | {"attention_mask": mask}
    # With tables first: without them every way to read them is right.
    for tables in (of_queries | of_keys, of_queries, {}):
        yield streams | tables
        yield streams | tables | {"attention_mask": ltx.draw_mask(draw)}


def small(attn: Any) -> nn.Module:
    norm, width = attn.norm_q, SIZES["dim"]
    kind = read_norm(norm, attn.to_q.weight).kind
    across = wan.is_across_heads(norm, attn.to_q.out_features // attn.heads)
    own_keys = attn.to_k.in_features != attn.to_q.in_features
    has_weight = getattr(norm, "weight", None) is not None
    return narrow(
        attn,
        query_dim=width,
        heads=2,
        kv_heads=2,
        dim_head=32,
        out_dim=width,
        cross_attention_dim=48 if own_keys else None,
        cross_attention_dim_head=32 if getattr(attn, "is_cross_attention", False) else None,
        added_kv_proj_dim=width if getattr(attn, "add_k_proj", None) is not None else None,
        qk_norm=None if kind == "none" else f"{kind}_norm" + "_across_heads" * across,
        bias=attn.to_q.bias is not None,
        out_bias=attn.to_out[0].bias is not None if hasattr(attn, "to_out") else True,
        pre_only=not hasattr(attn, "to_out"),
        elementwise_affine=has_weight,
        norm_elementwise_affine=has_weight,
    )
