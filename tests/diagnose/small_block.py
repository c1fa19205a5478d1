"""FLUX.1's single block, narrow, as a preset, and its cases."""

import torch

from fxopt.diagnose.case import Case
from fxopt.diagnose.suites import Sweep, preset_cases
from fxopt.presets import PresetBlock, activation, block, cos_sin, image_tokens

HEADS, HEAD_DIM = 2, 32


def blocks(batch: int, height: int, width: int) -> list[PresetBlock]:
    """What the preset "small" builds."""
    from diffusers.models.transformers import transformer_flux as flux

    dim, num_image, num_text = HEADS * HEAD_DIM, image_tokens(height, width), 4

    def inputs():
        return {
            "hidden_states": activation(batch, num_image, dim),
            "encoder_hidden_states": activation(batch, num_text, dim),
            "temb": activation(batch, dim),
            "image_rotary_emb": cos_sin(num_text + num_image, HEAD_DIM),
        }

    build = block(lambda: flux.FluxSingleTransformerBlock(dim, HEADS, HEAD_DIM))
    return [PresetBlock("single", 2, build, inputs, 2)]


def cases(name: str, in_float64: bool = True, **sweep) -> list[Case]:
    """The cases of a preset on a CPU; of 8 tokens in fp32, unless `sweep` says otherwise."""
    made = Sweep(**({"dtype": "float32", "tokens": [8]} | sweep))
    return list(preset_cases(name, made, torch.device("cpu"), 0, in_float64))
