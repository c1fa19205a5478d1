"""CogView4, GLM-Image, CogVideoX: two streams that are joined before attention's projections.

The weights see both streams at once, as the models have it: their gradients are one product each.
Only the image, or video, is rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends.swaps import merged
from fxopt.backends.swaps.branches import Branch, Out
from fxopt.backends.swaps.flux import tables
from fxopt.backends.swaps.fused import Normed, modulation, project
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.operands import Part, Rotation
from fxopt.backends.swaps.streams import Ending, dispatch, draw_streams, finish, joint_attention
from fxopt.backends.swaps.swap import Arguments, Draw, Form, Swap, narrow

# Of the text and of the image: shift, scale and gate of attention and of the MLP, and both norms.
Modulated = tuple[list[tuple[Tensor, ...]], list[tuple[nn.Module, nn.Module]]]


def block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *,
    modulated: Callable[[Any, Tensor], Modulated],
    end: Callable[[list[Ending]], tuple[Tensor, Tensor]],
    kind: str,
) -> tuple[Tensor, Tensor]:
    """modulated: modulations and norms of both streams. end: runs what is behind attention, of text
    and image, and gives image and text. kind: of the rotation."""
    modulations, norms = modulated(block, temb)
    xs = encoder_hidden_states, hidden_states
    ys = [
        Normed(norm, x, scale, shift).value()[0]
        for (norm, _), x, (shift, scale, *_) in zip(norms, xs, modulations, strict=True)
    ]
    rotation = None
    if image_rotary_emb is not None:
        rotation = tables(image_rotary_emb)._replace(kind=kind, rotated="last")
    mask = None if attention_mask is None else weights(attention_mask, hidden_states)
    lengths = [x.shape[1] for x in xs]
    attended = attention(block.attn1, torch.cat(ys, 1), rotation, mask).split(lengths, 1)
    mlp = feed_forward(block.ff)
    rest = [
        Ending(x, Branch(out), parts[2:], norm, mlp)
        for x, out, parts, (_, norm) in zip(xs, attended, modulations, norms, strict=True)
    ]
    return end(rest)


def attention(attn: Any, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
    """Self-attention of x [B, S, D]."""
    linears, part = Part((attn.norm_q, attn.norm_k), rotation).holding(
        x, attn.to_q, attn.to_k, attn.to_v
    )
    head_dim = attn.to_q.out_features // attn.heads
    qkv = project(x, *linears)
    (out,) = joint_attention([qkv], [part], head_dim, dispatch(attn, mask))
    return Out(attn.to_out)(out)


def by_turns(block: Any, temb: Tensor) -> Modulated:
    """CogView4: one linear makes a part for the image, then the same for the text, and so on."""
    (whole,) = project(temb, block.norm1.linear)
    parts = whole.unsqueeze(1).chunk(12, -1)
    norms = (block.norm1.norm_context, block.norm2_context), (block.norm1.norm, block.norm2)
    return [parts[1::2], parts[0::2]], list(norms)


def by_branch(block: Any, temb: Tensor) -> Modulated:
    """CogVideoX: a linear for attention and one for the MLP, each first of the video; the streams
    share norms."""
    before, behind = modulation(temb, (block.norm1.linear, 6), (block.norm2.linear, 6))
    norms = block.norm1.norm, block.norm2.norm
    return [before[3:] + behind[3:], before[:3] + behind[:3]], [norms, norms]


def apart(rest: list[Ending]) -> tuple[Tensor, Tensor]:
    """Each stream runs the MLP alone."""
    image, text = finish(*rest[::-1])
    return image, text


def joined(rest: list[Ending]) -> tuple[Tensor, Tensor]:
    """Both run the MLP at once."""
    normed, hs = zip(*(e.normed().value() for e in rest), strict=True)
    y = torch.cat(normed, 1)
    mlp = rest[0].mlp.holding(y)
    out = mlp(project(y, *mlp.inputs)).split([x.shape[1] for x in normed], 1)
    gates = [e.modulation[3] for e in rest]
    text, image = merged.gated_residuals(hs, gates, [Branch(x) for x in out], [None, None])
    return image, text


def weights(mask: Tensor, image: Tensor) -> Tensor:
    """As CogView4 makes it of the text's [B, T]: 1 is added where both tokens are no padding."""
    mask = torch.cat([mask.float(), mask.new_ones(image.shape[:2]).float()], 1)
    return (mask[:, :, None] * mask[:, None] > 0).unsqueeze(1).to(image.dtype)


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    attn = block.attn1
    arguments = {
        **draw_streams(draw, attn.query_dim),
        "temb": draw.normal(draw.B, block.norm1.linear.in_features),
    }
    rotary = {"image_rotary_emb": draw.tables(draw.S, attn.to_q.out_features // attn.heads)}
    yield arguments | rotary
    yield arguments
    mask = torch.arange(draw.T) < torch.tensor([[draw.T], [draw.T - 1]])
    for dtype in (torch.float32, torch.int64):
        yield arguments | rotary | {"attention_mask": mask.to(dtype)}


def small(block: Any) -> nn.Module:
    attn = block.attn1
    return narrow(
        block,
        attention_bias=attn.to_q.bias is not None,
        attention_out_bias=attn.to_out[0].bias is not None,
        qk_norm=attn.norm_q is not None,
        norm_elementwise_affine=getattr(block.norm1.norm, "weight", None) is not None,
        ff_bias=block.ff.net[2].bias is not None,
    )


def _form(parts: str, modulated: Any, end: Any, kind: str) -> Form:
    forward = partial(block, modulated=modulated, end=end, kind=kind)
    constants = ("image_rotary_emb", "attention_mask")
    swap = Swap(f"block {modulated.__name__}", forward, examples, small, constants)
    return Form(parts, swap)


FORMS = (
    _form("norm1 attn1 norm2 norm2_context ff", by_turns, apart, "half"),
    _form("norm1 attn1 norm2 ff", by_branch, joined, "interleaved"),
)
