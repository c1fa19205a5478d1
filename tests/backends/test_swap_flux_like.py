"""Models whose blocks are FLUX's under names of their own, under swap."""

from __future__ import annotations

import inspect

import pytest
import torch

import fxopt
from tests.backends.swapping import COUNTS
from tests.families import flux_inputs, flux_like, seeded
from tests.numerics import Judge, run

READ = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "return_dict")
MODELS = {
    "LongCatImageTransformer2DModel": {"pooled_projection_dim": 24},
    "BriaTransformer2DModel": {},
    "OvisImageTransformer2DModel": {"out_channels": 16},
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_flux(name: str) -> None:
    pytest.importorskip("diffusers")
    model = seeded(lambda: flux_like(name, **MODELS[name]))()
    given = flux_inputs(2, 0, torch.float32)
    own = inspect.signature(model.forward).parameters
    inputs = {n: given[n] for n in READ if n in own}
    judge = Judge(model, inputs)
    fxopt.swap(model)
    ours = run(model, inputs)
    assert fxopt.report(model).counts() == COUNTS["flux"]
    judge(model, name, ours)
