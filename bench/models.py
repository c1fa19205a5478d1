"""Models whose training step takes about 0.1 s on a CPU, with random inputs, all in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Any]]

TEXT = 64  # features of text embeddings
NUM_TEXT = 32  # text tokens


def flux(num_layers: int = 6, num_heads: int = 4, head_dim: int = 32, side: int = 16) -> Example:
    """A third of the layers are double blocks, at least one; `side` squared image tokens."""
    from diffusers import FluxTransformer2DModel

    num_double = max(1, num_layers // 3)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=num_double,
        num_single_layers=num_layers - num_double,
        attention_head_dim=head_dim,
        num_attention_heads=num_heads,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8),
    )
    rows = torch.arange(side)
    return model, {
        "hidden_states": torch.randn(2, side * side, 16),
        "encoder_hidden_states": torch.randn(2, NUM_TEXT, TEXT),
        "pooled_projections": torch.randn(2, TEXT),
        "timestep": torch.rand(2),
        "img_ids": torch.cartesian_prod(torch.zeros(1).long(), rows, rows).float(),
        "txt_ids": torch.zeros(NUM_TEXT, 3),
        "return_dict": False,
    }


def sd3() -> Example:
    """SD3.5-medium's structure: dual attention in the first of three blocks."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=32,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=TEXT,
        caption_projection_dim=192,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": torch.randn(2, 16, 32, 32),
        "encoder_hidden_states": torch.randn(2, NUM_TEXT, TEXT),
        "pooled_projections": torch.randn(2, TEXT),
        "timestep": 1000 * torch.rand(2),
        "return_dict": False,
    }


def wan() -> Example:
    """Three frames of 12x12 tokens."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT,
        freq_dim=64,
        ffn_dim=512,
        num_layers=3,
        rope_max_seq_len=64,
    )
    return model, {
        "hidden_states": torch.randn(1, 16, 3, 24, 24),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT, TEXT),
        "return_dict": False,
    }


def llama() -> Example:
    """Decomposed attention: 768 tokens, 8 query and 4 key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation="eager",
    )
    tokens = torch.randint(0, config.vocab_size, (1, 768))
    return LlamaForCausalLM(config), {"input_ids": tokens, "use_cache": False, "return_dict": False}


def step(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """Forward and backward of the mean square of the output; that loss."""
    loss: Tensor = model(**inputs)[0].square().mean()
    loss.backward()
    return loss.detach()
