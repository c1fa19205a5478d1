"""Real models whose rotary tables are for a part of a head, or hold 2x2 matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends import dynamo
from tests.families import WIDTH, Draw, Inputs, language_config, language_inputs, seeded
from tests.numerics import Judge, run


def language(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**language_config("sdpa"), **options)
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0  # both runs would draw
        return model

    return build


def prx() -> nn.Module:
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=48,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[16, 16],
    )


def prx_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return {
        "hidden_states": draw.latents(4),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.text(48),
        "return_dict": False,
    }


MODELS = {
    # Halves of a quarter of the head, q, k and v from one projection, no norm.
    "gpt-neox": (language("GPTNeoX", rotary_pct=0.25), language_inputs),
    # Halves of half of the head, behind a LayerNorm.
    "phi": (language("Phi", qk_layernorm=True, partial_rotary_factor=0.5), language_inputs),
    # Neighbours in half of the head.
    "glm": (
        language("Glm", head_dim=16, partial_rotary_factor=0.5, pad_token_id=0),
        language_inputs,
    ),
    # Matrices for neighbours, text keys that are not rotated before those of the image.
    "prx": (prx, prx_inputs),
}
NAMES = ("qk_norm_rope", "merge_qk")
ALL = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in MODELS for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)


def built(name: str, dtype: torch.dtype) -> tuple[nn.Module, Inputs, Judge]:
    build, inputs = MODELS[name]
    model, drawn = seeded(build)().to(dtype), inputs(2, 0, dtype)
    return model, drawn, Judge(model, drawn)


@ALL
def test_optimize(name: str, dtype: torch.dtype) -> None:
    model, inputs, judge = built(name, dtype)
    fxopt.optimize(model)
    ours = run(model, inputs)
    counts = fxopt.report(model).counts()
    # Two blocks: queries and keys of each, in one call.
    assert {n: counts.get(n, 0) for n in NAMES} == {"qk_norm_rope": 4, "merge_qk": 2}
    judge(model, name, ours)


@ALL
def test_compiled(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    dynamo.compile_reports.clear()
    model, _, judge = built(name, dtype)
    model.compile(backend="fxopt", options={"inner": "aot_eager"})
    judge(model, name)
    assert fxopt.report(model).counts()["qk_norm_rope"] == 4
