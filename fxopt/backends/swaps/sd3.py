"""Stable Diffusion 3 and 3.5: diffusers' JointTransformerBlock, with dual attention or without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxopt.backends.swaps import merged
from fxopt.backends.swaps.fused import Normed, gated_residual, modulation
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.operands import Part
from fxopt.backends.swaps.streams import (
    Ending,
    Projections,
    attend_directly,
    draw_streams,
    finish,
    image_and_text,
    joint_attention,
)
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap, Unfit


def joint_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor | None, Tensor]:
    if block._chunk_size is not None:
        raise Unfit("the feed-forward runs in chunks")
    attn, x, text = block.attn, hidden_states, encoder_hidden_states
    last = block.context_pre_only
    nums = 9 if block.use_dual_attention else 6, 2 if last else 6
    norms = block.norm1.linear, block.norm1_context.linear
    of_image, of_text = modulation(temb, *zip(norms, nums, strict=True))
    # Of attention, of the MLP and, if there is one, of `attn2`.
    nine: tuple[Any, ...] = (*of_image, None, None, None)[:9]
    shift, scale, *image, shift2, scale2, gate2 = nine
    if last:
        text_scale, text_shift = of_text
    else:
        text_shift, text_scale, *of_text_branch = of_text
    norm, norm_text = block.norm1.norm, block.norm1_context.norm
    normed = [Normed(norm, x, scale, shift), Normed(norm_text, text, text_scale, text_shift)]
    attentions = [*image_and_text(attn)]
    if block.use_dual_attention:
        normed.append(Normed(norm, x, scale2, shift2))
        attentions.append(Projections.of(block.attn2))
    held = [Part(a.qk_norms).holding(n.x, *a.qkv) for a, n in zip(attentions, normed, strict=True)]
    linears, parts = zip(*held, strict=True)
    (projected, x), (projected_text, text), *own = merged.into(normed, linears)
    head_dim = projected[0].shape[-1] // attn.heads
    projections = (projected, projected_text)
    attended, attended_text = joint_attention(projections, parts[:2], head_dim, attend_directly)
    results = [attended, attended_text][: 1 if last else 2]
    outs = [a.out for a in attentions][: len(results)]
    if own:
        results += joint_attention([own[0][0]], parts[2:], head_dim, attend_directly)
        outs.append(attentions[-1].out)
    all_sums = [not own, *[True] * (len(outs) - 1)]
    branch, *branches = merged.outs(outs, results, all_sums=all_sums)
    if own:
        x = gated_residual(x, image[0], branch.x, x_bias=branch.bias)
        image, branch = [gate2, *image[1:]], branches[-1]
    ending = Ending(x, branch, image, block.norm2, feed_forward(block.ff))
    if last:
        return None, finish(ending)[0]
    mlp = feed_forward(block.ff_context)
    ending_text = Ending(text, branches[0], of_text_branch, block.norm2_context, mlp)
    out, text = finish(ending, ending_text)
    return text, out


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    width = block.attn.query_dim
    yield {**draw_streams(draw, width), "temb": draw.normal(draw.B, width)}


def small(block: Any) -> nn.Module:
    return type(block)(
        dim=64,
        num_attention_heads=2,
        attention_head_dim=32,
        context_pre_only=block.context_pre_only,
        qk_norm=None if block.attn.norm_q is None else "rms_norm",
        use_dual_attention=block.use_dual_attention,
    )


FAMILIES = (
    Family(
        ("diffusers.models.attention.JointTransformerBlock",),
        Swap("joint", joint_block, examples, small),
    ),
)
