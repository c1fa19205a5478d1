"""Models of diffusers that modulate each token on its own, through `optimize`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt
from tests.families import FAMILIES, HEAD_DIM, WIDTH, Draw, Inputs, seeded, wan
from tests.numerics import Judge, run


def flux3() -> nn.Module:
    """Text, image and clean images, each with a time per token."""
    from diffusers.models.transformers.transformer_flux3 import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=24,
        timestep_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
    )


def flux3_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)

    def ids(num_tokens: int) -> torch.Tensor:
        return torch.arange(num_tokens).float()[:, None].expand(-1, 4)

    return {
        "hidden_states": draw.normal(batch, 12 + size, 8),
        "encoder_hidden_states": draw.normal(batch, 7, 24),
        "image_cond_hidden_states": draw.normal(batch, 5, 8),
        "timestep": draw.timestep(),
        "img_ids": ids(12 + size),
        "txt_ids": ids(7),
        "image_cond_ids": ids(5),
        "return_dict": False,
    }


def wan_ti2v_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    """Wan 2.2 TI2V: the first frame, which is given, is of time 0."""
    inputs = FAMILIES["wan"].inputs(batch, size, dtype)
    _, _, frames, height, width = inputs["hidden_states"].shape
    times = torch.full((batch, frames, height // 2 * (width // 2)), 700.0)
    times[:, 0] = 0
    return inputs | {"timestep": times.flatten(1)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Inputs], dict[str, int]]] = {
    "flux3": (
        flux3,
        flux3_inputs,
        {
            "qk_norm_rope": 10,
            "norm_modulate": 14,
            "gated_activation": 5,
            "merge_qk": 5,
            "merge_linears": 10,
            "merge_streams": 2,
        },
    ),
    "wan-ti2v": (
        wan,
        wan_ti2v_inputs,
        {
            "qk_norm_rope": 8,
            "norm_modulate": 8,
            "gated_activation": 2,
            "merge_qk": 4,
            "fuse_bias": 8,
            "merge_linears": 10,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_optimize(name: str) -> None:
    build, make_inputs, counts = MODELS[name]
    model, inputs = seeded(build)(), make_inputs(2, 0, torch.float32)
    judge = Judge(model, inputs)
    fxopt.optimize(model)
    ours = run(model, inputs)
    assert fxopt.report(model).counts() == counts
    judge(model, name, ours)
