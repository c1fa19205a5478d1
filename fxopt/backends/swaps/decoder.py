"""Decoder layers of language models in transformers: Llama, Qwen2, Qwen3."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.swaps import attending
from fxopt.backends.swaps.branches import Mlp
from fxopt.backends.swaps.fused import Normed, fire, project
from fxopt.backends.swaps.mlps import activation
from fxopt.backends.swaps.operands import Part, Rotation, heads, queries_keys
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap

MODULES = ("llama.modeling_llama.Llama", "qwen2.modeling_qwen2.Qwen2", "qwen3.modeling_qwen3.Qwen3")
# Of what the layer gives to the attention function, these change nothing inside the layer itself.
PASSED_ON = (
    *("position_ids", "use_cache", "cache_position"),
    "num_items_in_batch",  # of a Trainer, for the loss
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)


def fused_layer(
    layer: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **passed_on: Any,
) -> Tensor:
    attn, x = layer.self_attn, hidden_states
    cos, sin = (t.unsqueeze(2) for t in position_embeddings)
    norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    part = Part(norms, Rotation("half", "channels", cos, sin))
    linears, part = part.holding(x, attn.q_proj, attn.k_proj, attn.v_proj)
    qkv, x = Normed(layer.input_layernorm, x).into(*linears)
    operands = (*queries_keys([qkv], [part], attn.head_dim), heads(qkv[2], attn.head_dim))
    q, k, v = (t.transpose(1, 2) for t in operands)
    attended = attend(attn, q, k, v, attention_mask, passed_on)
    (branch,) = project(attended, attn.o_proj, keeps_x=True)

    parts = layer.mlp
    name = activation(parts.act_fn)
    mlp = Mlp((parts.gate_proj, parts.up_proj), name, "none", parts.down_proj)
    norm = layer.post_attention_layernorm
    hidden, h = Normed(norm, branch, residual=x).into(*mlp.inputs)
    return h + mlp(hidden)


def attend(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, passed_on: dict[str, Any]
) -> Tensor:
    """The attention function that the model's configuration names; "eager" becomes SDPA.

    q, k, v: [B, H, S, d]. Returns [B, S, H * d].
    """
    dropout = attn.attention_dropout if attn.training else 0.0
    chosen = attn.config._attn_implementation

    def run() -> Tensor:
        if chosen == "eager":
            is_grouped = attn.num_key_value_groups > 1
            options = {"scale": attn.scaling, "enable_gqa": is_grouped}
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, **options).transpose(1, 2)
        own = {"sliding_window": attn.sliding_window} if hasattr(attn, "sliding_window") else {}
        functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
        options = {"dropout": dropout, "scaling": attn.scaling, **own, **passed_on}
        out, _ = functions[chosen](attn, q, k, v, mask, **options)
        return out

    if chosen == "eager":
        fire("attention", "attention")
    own = None if chosen in ("eager", "sdpa") else f"attn_implementation={chosen!r}"
    return attending.attend(run, q, lambda: own).flatten(2)


def examples(layer: Any, draw: Draw) -> Iterator[Arguments]:
    width, head_dim = layer.hidden_size, layer.self_attn.head_dim
    angle = draw.normal(1, draw.S, head_dim // 2).repeat(1, 1, 2)
    arguments = {
        "hidden_states": draw.normal(draw.B, draw.S, width),
        "position_embeddings": (angle.cos(), angle.sin()),
    }
    causal = torch.full((draw.S, draw.S), -1e4, dtype=draw.dtype).triu(1)[None, None]
    yield arguments
    yield arguments | {"attention_mask": causal}
    yield arguments | {"attention_mask": causal == 0}


def small(layer: Any) -> nn.Module:
    attn = layer.self_attn
    config = copy.copy(attn.config)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 96, 32
    config.num_attention_heads = 4
    config.num_key_value_heads = 2 if attn.num_key_value_groups > 1 else 4
    return type(layer)(config, attn.layer_idx)


FAMILIES = (
    Family(
        tuple(f"transformers.models.{name}DecoderLayer" for name in MODULES),
        Swap(
            "layer",
            fused_layer,
            examples,
            small,
            constants=("position_embeddings", "attention_mask"),
            passed_on=PASSED_ON,
        ),
    ),
)
