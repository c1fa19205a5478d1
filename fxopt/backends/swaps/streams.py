"""Transformer blocks of two token streams that meet in one attention, as all MMDiTs have them.

A family says where its block keeps the parts of a stream; the order of the ops is the same in all.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.swaps import attending, merged
from fxopt.backends.swaps.branches import Branch, Mlp, Out
from fxopt.backends.swaps.fused import Normed, Segments
from fxopt.backends.swaps.operands import Part, Rotation, heads, queries_keys
from fxopt.backends.swaps.swap import Draw, Unfit, is_library

DISPATCH = "diffusers.models.attention_dispatch"


class Projections(NamedTuple):
    """What attention has of its own for one stream. qk_norms: of its queries and keys."""

    qkv: tuple[nn.Module, nn.Module, nn.Module]
    qk_norms: tuple[nn.Module, nn.Module]
    out: Out

    @classmethod
    def of(cls, attn: Any) -> Projections:
        """Those of diffusers' attention of one stream, or of the image."""
        qk_norms = attn.norm_q, attn.norm_k
        return cls((attn.to_q, attn.to_k, attn.to_v), qk_norms, Out(attn.to_out))


def image_and_text(attn: Any) -> tuple[Projections, Projections]:
    """Those of diffusers' joint attention."""
    return Projections.of(attn), Projections(
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        (attn.norm_added_q, attn.norm_added_k),
        Out((attn.to_add_out,)),
    )


class Stream(NamedTuple):
    """One stream of tokens on its way through a block.

    x: [B, S, D]. modulation: shift, scale and gate of attention, then of the MLP, as
    [B, 1, D] each, or as `segments` says. norms: before attention and before the MLP.
    """

    x: Tensor
    modulation: Sequence[Tensor]
    norms: tuple[nn.Module, nn.Module]
    attention: Projections
    mlp: Mlp
    rotation: Rotation | None = None
    segments: Segments | None = None

    def normed(self) -> Normed:
        """What the projections read."""
        shift, scale = self.modulation[:2]
        return Normed(self.norms[0], self.x, scale, shift, segments=self.segments)

    def ending(self, residual: Tensor, branch: Branch) -> Ending:
        """The rest of the block, from what the stream's part of the attention's result gave."""
        rest = self.modulation[2:], self.norms[1], self.mlp, self.segments
        return Ending(residual, branch, *rest)


class Ending(NamedTuple):
    """h = residual + gate * branch, then h + gate_mlp * mlp(norm(h) * (1 + scale) + shift).

    modulation: gate, shift, scale, gate_mlp, of one row or as `segments` says.
    """

    residual: Tensor
    branch: Branch
    modulation: Sequence[Tensor]
    norm: nn.Module
    mlp: Mlp
    segments: Segments | None = None

    def normed(self) -> Normed:
        """What the MLP reads."""
        gate, shift, scale, _ = self.modulation
        more: Any = {"x_bias": self.branch.bias, "segments": self.segments}
        return Normed(self.norm, self.branch.x, scale, shift, self.residual, gate, **more)


def finish(*endings: Ending) -> list[Tensor]:
    """Each stream behind the block. Dropouts draw random numbers in this order."""
    mlps = [e.mlp.holding(e.residual) for e in endings]
    normed = [e.normed() for e in endings]
    hidden, hs = zip(*merged.into(normed, [m.inputs for m in mlps]), strict=True)
    branches = merged.branches(mlps, hidden)
    gates, segments = [e.modulation[3] for e in endings], [e.segments for e in endings]
    return merged.gated_residuals(hs, gates, branches, segments)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def joint(streams: Sequence[Stream], head_dim: int, attend: Attend) -> list[Tensor]:
    """The text and the image stream behind the block; attention sees them in this order."""
    own = [s.attention for s in streams]
    held = [
        Part(a.qk_norms, s.rotation).holding(s.x, *a.qkv) for s, a in zip(streams, own, strict=True)
    ]
    linears, parts = zip(*held, strict=True)
    found = merged.into([s.normed() for s in streams], linears)
    projections, residuals = zip(*found, strict=True)
    attended = joint_attention(projections, parts, head_dim, attend)
    # Image first, as the blocks do it.
    outs = [a.out for a in own][::-1]
    branches = merged.outs(outs, attended[::-1], all_sums=[True] * len(outs))
    each = zip(streams[::-1], residuals[::-1], branches, strict=True)
    return finish(*(s.ending(residual, branch) for s, residual, branch in each))[::-1]


def joint_attention(
    projections: Sequence[Sequence[Tensor]],
    parts: Sequence[Part],
    head_dim: int,
    attend: Attend,
) -> Sequence[Tensor]:
    """The result of one attention over all sections, section by section, [B, S, H * d] each.

    projections: queries, keys and values of each section.
    """
    q, k = queries_keys(projections, parts, head_dim)
    values = [p[2] for p in projections]
    v = heads(values[0] if len(values) == 1 else torch.cat(values, 1), head_dim)
    return attend(q, k, v).split([p[0].shape[1] for p in projections], 1)


def dispatch(attn: Any, mask: Tensor | None = None) -> Attend:
    """diffusers' attention with the backend that was chosen for `attn`: [B, S, H * d].

    Raises:
        Unfit: a processor of the user's would not be called.
    """
    processor, library = attn.processor, sys.modules[DISPATCH]
    if not is_library(type(processor)):
        raise Unfit(f"the attention processor {type(processor).__name__} is not diffusers'")
    code = getattr(inspect.unwrap(type(processor).__call__), "__code__", None)
    if code is not None and "scaled_dot_product_attention" in code.co_names:
        return partial(attend_directly, mask=mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = partial(
            library.dispatch_attention_fn,
            *(q, k, v),
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=getattr(processor, "_attention_backend", None),
            parallel_config=getattr(processor, "_parallel_config", None),
        )

        return attending.attend(run, q, partial(_setting, library, processor)).flatten(2, 3)

    return attend


def attend_directly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """scaled_dot_product_attention of [B, S, H, d] each: [B, S, H * d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = attending.attend(partial(F.scaled_dot_product_attention, q, k, v, mask), q)
    return out.transpose(1, 2).flatten(2)


def _setting(library: Any, processor: Any) -> str | None:
    """By what setting diffusers calls something else than plain scaled_dot_product_attention."""
    if getattr(processor, "_parallel_config", None) is not None:
        return "a parallel_config"
    active, _ = library._AttentionBackendRegistry.get_active_backend()
    chosen = getattr(processor, "_attention_backend", None)
    name = library.AttentionBackendName(chosen or active).value
    return None if name == "native" else f"the attention backend {name!r}"


def draw_streams(draw: Draw, width: int) -> dict[str, Tensor]:
    """`hidden_states` and `encoder_hidden_states` of diffusers' blocks."""
    return {
        "hidden_states": draw.normal(draw.B, draw.S, width),
        "encoder_hidden_states": draw.normal(draw.B, draw.T, width),
    }
