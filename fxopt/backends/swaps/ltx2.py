"""LTX-2: a block of video and audio, two streams that see their texts and then each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxopt.backends.swaps.branches import Branch, Out
from fxopt.backends.swaps.fused import Normed, project
from fxopt.backends.swaps.ltx import draw_mask, per_head
from fxopt.backends.swaps.mlps import feed_forward
from fxopt.backends.swaps.one_stream import SPELLINGS
from fxopt.backends.swaps.operands import Part, Rotation
from fxopt.backends.swaps.streams import Ending, finish
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap, Unfit, narrow
from fxopt.backends.swaps.wan import attention

Tables = tuple[Tensor, Tensor]
SPELLING = {"interleaved": "neighbours by head", "split": "halves by head"}
# Names in the block: norms before self-attention, the text, the other stream and the MLP; the three
# attentions; MLP and tables.
VIDEO = (
    ("norm1", "norm2", "audio_to_video_norm", "norm3"),
    ("attn1", "attn2", "audio_to_video_attn"),
    ("ff", "scale_shift_table", "video_a2v_cross_attn_scale_shift_table"),
)
AUDIO = (
    ("audio_norm1", "audio_norm2", "video_to_audio_norm", "audio_norm3"),
    ("audio_attn1", "audio_attn2", "video_to_audio_attn"),
    ("audio_ff", "audio_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table"),
)


class Stream(NamedTuple):
    """One stream on its way through a block.

    tembs: embeddings of `modulation`, of `crossing` and of its gate. tables: of its rotations in
    self-attention and in attention to the other stream. modulation: shift, scale, gate of
    self-attention, then of the MLP. crossing: scale and shift for video to see audio, then the
    reverse, then a gate.
    """

    x: Tensor
    text: Tensor
    mask: Tensor | None
    tables: tuple[Tables, Tables]
    norms: tuple[Any, ...]
    attns: tuple[Any, ...]
    mlp: Any
    modulation: tuple[Tensor, ...]
    crossing: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        block: Any,
        names: Any,
        tembs: tuple[Tensor, Tensor, Tensor],
        texts: tuple[Tensor, Tensor | None],
        x: Tensor,
        tables: tuple[Tables, Tables],
    ) -> Stream:
        """The stream `x` of a block that has its parts by `names`; its text comes with a mask."""
        norms, attns, (mlp, own, crossing) = (
            tuple(getattr(block, n) for n in each) for each in names
        )
        first, second, gate = tembs
        of_crossing = parts(crossing[:4], second) + parts(crossing[4:], gate)
        return cls(x, *texts, tables, norms, attns, mlp, parts(own, first), of_crossing)


def fused_block(
    block: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    temb_ca_scale_shift: Tensor,
    temb_ca_audio_scale_shift: Tensor,
    temb_ca_gate: Tensor,
    temb_ca_audio_gate: Tensor,
    video_rotary_emb: Tables,
    audio_rotary_emb: Tables,
    ca_video_rotary_emb: Tables,
    ca_audio_rotary_emb: Tables,
    use_a2v_cross_attention: bool,
    use_v2a_cross_attention: bool,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    all_perturbed: bool = False,
) -> tuple[Tensor, Tensor]:
    if block.cross_attn_adaln or not (use_a2v_cross_attention and use_v2a_cross_attention):
        raise Unfit("the text is modulated, or one stream does not see the other")
    if any(attn.to_gate_logits is not None for attn in (block.attn1, block.audio_attn1)):
        raise Unfit("heads have gates")
    tembs = temb, temb_ca_scale_shift, temb_ca_gate
    texts = encoder_hidden_states, encoder_attention_mask
    tables = video_rotary_emb, ca_video_rotary_emb
    video = Stream.of(block, VIDEO, tembs, texts, hidden_states, tables)
    tembs = temb_audio, temb_ca_audio_scale_shift, temb_ca_audio_gate
    texts = audio_encoder_hidden_states, audio_encoder_attention_mask
    tables = audio_rotary_emb, ca_audio_rotary_emb
    audio = Stream.of(block, AUDIO, tembs, texts, audio_hidden_states, tables)

    of_text = [(s, *see_text(s, *see_itself(s))) for s in (video, audio)]
    video_out, audio_out = finish(*see_each_other(*of_text))
    return video_out, audio_out


def parts(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """Rows of a table [n, D], each [B, 1, D] with the embedding [B, 1, n * D] added."""
    return (table + temb.unflatten(-1, table.shape)).unbind(2)


def read(attn: Any, tables: Tables) -> Rotation:
    head_dim = attn.to_q.out_features // attn.heads
    return SPELLINGS[SPELLING[attn.rope_type]].read(tables, head_dim)


def see_itself(s: Stream) -> tuple[Branch, Tensor]:
    """The branch of self-attention, and the residual."""
    attn, (shift, scale, *_) = s.attns[0], s.modulation
    linears, part = Part((attn.norm_q, attn.norm_k), read(attn, s.tables[0])).holding(
        s.x, attn.to_q, attn.to_k, attn.to_v
    )
    qkv, x = Normed(s.norms[0], s.x, scale, shift).into(*linears)
    has_weight = getattr(s.norms[1], "weight", None) is not None
    return Out(attn.to_out).branch(attention(attn, qkv, part), all_sums=has_weight), x


def see_text(s: Stream, branch: Branch, x: Tensor) -> tuple[Branch, Tensor]:
    """The branch of attention to the text, and the residual with self-attention."""
    attn, gate = s.attns[1], s.modulation[2]
    (to_q, *to_kv), part = Part((attn.norm_q, attn.norm_k)).holding(
        x, attn.to_q, attn.to_k, attn.to_v, keys_of=s.text
    )
    (q,), x = Normed(s.norms[1], branch.x, None, None, x, gate, x_bias=branch.bias).into(to_q)
    qkv = [q, *project(s.text, *to_kv)]
    attended = attention(attn, qkv, part, per_head(attn, s.mask, s.text))
    return Out(attn.to_out).branch(attended, all_sums=False), x


def see_each_other(
    video: tuple[Stream, Branch, Tensor], audio: tuple[Stream, Branch, Tensor]
) -> list[Ending]:
    """Of both: the rest of the block behind their attention to each other."""
    held, asked, given, residuals = [], [], [], []
    for (s, branch, x), (other, _, keys), rows in ((video, audio, (0, 2)), (audio, video, (2, 0))):
        attn = s.attns[2]
        q_rotation, k_rotation = (read(attn, stream.tables[1]) for stream in (s, other))
        part = Part((attn.norm_q, attn.norm_k), q_rotation, key_rotation=k_rotation)
        held.append(part.holding(x, attn.to_q, attn.to_k, attn.to_v, keys_of=keys))
        (scale, shift), (scale_of_keys, shift_of_keys) = (s.crossing[i : i + 2] for i in rows)
        to_q = held[-1][0][0]
        normed = Normed(s.norms[2], branch.x, scale, shift, x, x_bias=branch.bias)
        q, h = normed.into(to_q)
        asked.append(q)
        given.append(Normed(s.norms[2], h, scale_of_keys, shift_of_keys))
        residuals.append(h)
    endings = []
    for i, (s, _, _) in enumerate((video, audio)):
        linears, part = held[i]
        kv, _ = given[1 - i].into(*linears[1:])
        attended = attention(s.attns[2], [*asked[i], *kv], part)
        branch = Out(s.attns[2].to_out).branch(attended, all_sums=True)
        rest = (s.crossing[4], *s.modulation[3:])
        endings.append(Ending(residuals[i], branch, rest, s.norms[3], feed_forward(s.mlp)))
    return endings


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    video, audio, cross = block.attn1, block.audio_attn1, block.audio_to_video_attn
    lengths, widths = (draw.S, draw.S + 1), (video.query_dim, audio.query_dim)

    def tables(attn: Any, length: int) -> Any:
        sizes = attn.heads, attn.to_q.out_features // attn.heads
        return SPELLINGS[SPELLING[attn.rope_type]].draw(draw, length, *sizes)

    text = block.attn2.to_k.in_features, block.audio_attn2.to_k.in_features
    arguments: Arguments = {
        "hidden_states": draw.normal(draw.B, lengths[0], widths[0]),
        "audio_hidden_states": draw.normal(draw.B, lengths[1], widths[1]),
        "encoder_hidden_states": draw.normal(draw.B, draw.T, text[0]),
        "audio_encoder_hidden_states": draw.normal(draw.B, draw.T, text[1]),
        "temb": draw.normal(draw.B, 1, 6 * widths[0]),
        "temb_audio": draw.normal(draw.B, 1, 6 * widths[1]),
        "temb_ca_scale_shift": draw.normal(draw.B, 1, 4 * widths[0]),
        "temb_ca_audio_scale_shift": draw.normal(draw.B, 1, 4 * widths[1]),
        "temb_ca_gate": draw.normal(draw.B, 1, widths[0]),
        "temb_ca_audio_gate": draw.normal(draw.B, 1, widths[1]),
        "video_rotary_emb": tables(video, lengths[0]),
        "audio_rotary_emb": tables(audio, lengths[1]),
        "ca_video_rotary_emb": tables(cross, lengths[0]),
        "ca_audio_rotary_emb": tables(cross, lengths[1]),
        "use_a2v_cross_attention": True,
        "use_v2a_cross_attention": True,
        "all_perturbed": False,
    }
    yield arguments | {name: draw_mask(draw) for name in MASKS}
    yield arguments


def small(block: Any) -> nn.Module:
    return narrow(
        block,
        cross_attention_dim=64,
        audio_dim=32,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
    )


ROTARY = ("video_rotary_emb", "audio_rotary_emb", "ca_video_rotary_emb", "ca_audio_rotary_emb")
MASKS = ("encoder_attention_mask", "audio_encoder_attention_mask")
FAMILIES = (
    Family(
        ("diffusers.models.transformers.transformer_ltx2.LTX2VideoTransformerBlock",),
        Swap("block", fused_block, examples, small, constants=ROTARY + MASKS),
    ),
)
