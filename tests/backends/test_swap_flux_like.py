"""Models whose blocks are FLUX's under names of their own, under swap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from tests.backends.swapping import COUNTS
from tests.families import HEAD_DIM, WIDTH, flux_inputs, seeded
from tests.numerics import Judge, run

READ = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "return_dict")
MODELS = {
    "LongCatImageTransformer2DModel": {"pooled_projection_dim": 24},
    "BriaTransformer2DModel": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_flux(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")

    def build() -> nn.Module:
        model: nn.Module = getattr(diffusers, name)(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=WIDTH // HEAD_DIM,
            joint_attention_dim=24,
            axes_dims_rope=[8, 12, 12],
            **MODELS[name],
        )
        return model

    model, given = seeded(build)(), flux_inputs(2, 0, torch.float32)
    inputs = {n: given[n] for n in READ}
    judge = Judge(model, inputs)
    fxopt.swap(model)
    ours = run(model, inputs)
    assert fxopt.report(model).counts() == COUNTS["flux"]
    judge(model, name, ours)
