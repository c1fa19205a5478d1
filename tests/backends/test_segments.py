"""Models of diffusers that modulate by segment, through the doors: what fires, and how accurate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.families import HEAD_DIM, WIDTH, Draw, Inputs, grid, qwen_image, z_image


def qwen_image_edit() -> nn.Module:
    """`zero_cond_t`: tokens of the images to edit are modulated as of time 0."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_config(qwen_image().config, zero_cond_t=True)


def qwen_image_edit_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw, (rows, columns) = Draw(batch, size, dtype), grid(size)
    return {
        "hidden_states": draw.normal(batch, rows * (2 * columns + 1), 16),
        "encoder_hidden_states": draw.text(24),
        "encoder_hidden_states_mask": draw.text_mask(),
        "timestep": draw.timestep(),
        "img_shapes": [[(1, rows, columns), (1, rows, columns + 1)]] * batch,
        "return_dict": False,
    }


class QwenImage21(nn.Module):
    """Blocks of Qwen-Image 2.1 with `causal_condition`: all but the target image is of time 0."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_qwenimage21 import (
            QwenImage21TransformerBlock as Block,
        )

        self.blocks = nn.ModuleList([Block(WIDTH, WIDTH // HEAD_DIM, HEAD_DIM) for _ in range(2)])

    def forward(self, hidden_states: torch.Tensor, modulation: torch.Tensor, **masks: Any) -> Any:
        for block in self.blocks:
            hidden_states = block(hidden_states, modulation, **masks)
        return hidden_states


def qwen_image21_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    num_tokens = 12 + size
    return {
        "hidden_states": draw.normal(batch, num_tokens, WIDTH),
        "modulation": draw.normal(batch + 1, 4 * WIDTH),
        "target_token_mask": torch.arange(num_tokens) >= 7,
    }


def z_image_omni_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    """A clean and a noisy image each, with a text before each and behind."""
    draw = Draw(batch, size, dtype)
    return {
        "x": [list(pair) for pair in draw.latents(4, 1)[:, None].repeat(1, 2, 1, 1, 1, 1)],
        "t": draw.timestep(),
        "cap_feats": [[text, text.flip(0), text[:5]] for text in draw.text(24)],
        "siglip_feats": [None] * batch,
        "image_noise_mask": [[0, 1]] * batch,
        "return_dict": False,
    }


def minimax_h3() -> nn.Module:
    """One packed sequence of text, video and audio; a table row for each time and modality."""
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=WIDTH // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=96,
        in_channels=4,
        audio_in_channels=8,
        text_dim=24,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=24,
        rope_freq_dim=4,
    )


def minimax_h3_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    num_text, num_video, num_audio = 5 + size, 11, 6
    tags = torch.tensor([1] * num_text + [0] * num_video + [2] * num_audio)
    positions = torch.arange(len(tags))
    text, video, audio = (positions[tags == tag] for tag in (1, 0, 2))
    return {
        "hidden_states": draw.normal(batch, num_video, 16),
        "audio_hidden_states": draw.normal(batch, num_audio, 8),
        "encoder_hidden_states": draw.normal(batch, num_text, 24),
        "timestep": torch.tensor([0.25, 0.75], dtype=dtype),
        "timestep_indices": (positions % 3 == 0).long(),
        "token_tags": tags,
        "position_ids": positions[:, None].expand(-1, 3),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
        "return_dict": False,
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Inputs]]] = {
    "qwen-image-edit": (qwen_image_edit, qwen_image_edit_inputs),
    "qwen-image-2.1": (QwenImage21, qwen_image21_inputs),
    "z-image-omni": (z_image, z_image_omni_inputs),
    "minimax-h3": (minimax_h3, minimax_h3_inputs),
}
