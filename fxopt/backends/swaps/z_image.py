"""Z-Image: diffusers' single-stream block with norms on both sides of attention and MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends.swaps.branches import Mlp, Out
from fxopt.backends.swaps.fused import Normed, Segments
from fxopt.backends.swaps.operands import Part, of_complex
from fxopt.backends.swaps.streams import dispatch, joint_attention
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap


def fused_block(
    block: Any,
    x: Tensor,
    freqs_cis: Tensor,
    attn_mask: Tensor | None = None,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    attn, ff = block.attention, block.feed_forward
    scale = gate = scale_mlp = gate_mlp = of_norm = of_residual = None
    if noise_mask is not None and block.modulation:
        assert adaln_noisy is not None and adaln_clean is not None
        adaln_input, is_noisy = torch.stack([adaln_clean, adaln_noisy], 1), noise_mask == 1
        of_norm, of_residual = Segments(is_noisy), Segments(is_noisy, shift_per_token=True)
    elif adaln_input is not None:
        adaln_input = adaln_input.unsqueeze(1)
    if adaln_input is not None:
        scale, gate, scale_mlp, gate_mlp = block.adaLN_modulation(adaln_input).chunk(4, 2)
        gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
    mask = attn_mask[:, None, None] if attn_mask is not None and attn_mask.dim() == 2 else attn_mask

    part = Part((attn.norm_q, attn.norm_k), of_complex(freqs_cis))
    linears, part = part.holding(x, attn.to_q, attn.to_k, attn.to_v)
    qkv, x = Normed(block.attention_norm1, x, scale, segments=of_norm).into(*linears)
    head_dim = qkv[0].shape[-1] // attn.heads
    (attended,) = joint_attention([qkv], [part], head_dim, dispatch(attn, mask))
    branch = Out(attn.to_out)(attended)
    # x + gate * norm(branch) is a modulation of the norm by gate and x.
    added: dict[str, Any] = {"scale_offset": 0.0, "segments": of_residual}
    x, _ = Normed(block.attention_norm2, branch, gate, x, **added).value()

    mlp = Mlp((ff.w1, ff.w3), "silu", "none", ff.w2)
    hidden, x = Normed(block.ffn_norm1, x, scale_mlp, segments=of_norm).into(*mlp.inputs)
    x, _ = Normed(block.ffn_norm2, mlp(hidden), gate_mlp, x, **added).value()
    return x


def examples(block: Any, draw: Draw) -> Iterator[Arguments]:
    width, head_dim = block.dim, block.head_dim
    cos, sin = draw.tables(draw.B, draw.S, head_dim // 2)
    tokens = {"x": draw.normal(draw.B, draw.S, width), "freqs_cis": torch.complex(cos, sin)}
    modulations: list[Arguments] = [{}]
    if block.modulation:
        embedding = block.adaLN_modulation[0].in_features
        one, noisy, clean = (draw.normal(draw.B, embedding) for _ in range(3))
        noise_mask = (torch.arange(draw.S) % 2).expand(draw.B, -1)
        modulations = [
            {"adaln_input": one},
            {"noise_mask": noise_mask, "adaln_noisy": noisy, "adaln_clean": clean},
        ]
    mask = {"attn_mask": torch.arange(draw.S) < torch.tensor([[draw.S], [2]])}
    for modulation in modulations:
        yield tokens | modulation
        yield tokens | modulation | mask


def small(block: Any) -> nn.Module:
    qk_norm = block.attention.norm_q is not None
    return type(block)(0, 64, 2, 2, 1e-5, qk_norm, modulation=block.modulation)


FAMILIES = (
    Family(
        ("diffusers.models.transformers.transformer_z_image.ZImageTransformerBlock",),
        Swap("block", fused_block, examples, small, constants=("freqs_cis", "attn_mask")),
    ),
)
