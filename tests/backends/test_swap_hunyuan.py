"""HunyuanVideo's and HunyuanImage's blocks under swap, and FramePack, which has the former.

With `token_replace` in `test_segments`.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.backends.swapping import expected
from tests.families import HEAD_DIM, WIDTH, Draw, Inputs, seeded
from tests.numerics import Judge, run

DOUBLE = expected(6, 2, 2, 6, silu_linears=1, fuse_bias=6, merge_streams=4)
SINGLE = expected(2, 2, 1, 2, silu_linears=1, fuse_bias=2)
BLOCKS = {
    "_video.HunyuanVideoTransformerBlock": DOUBLE,
    "_video.HunyuanVideoSingleTransformerBlock": SINGLE,
    "_video15.HunyuanVideo15TransformerBlock": DOUBLE,
    "image.HunyuanImageSingleTransformerBlock": SINGLE,
}


class Called(nn.Module):
    """A block that is called as the model does: by position, with what it does not read."""

    def __init__(self, name: str) -> None:
        super().__init__()
        library, class_name = name.split(".")
        path = f"diffusers.models.transformers.transformer_hunyuan{library}"
        block = getattr(importlib.import_module(path), class_name)
        self.blocks = nn.ModuleList([block(WIDTH // HEAD_DIM, HEAD_DIM, mlp_ratio=2.0)])
        self.further = () if library == "_video15" else (None, 4)

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, mask: Tensor, tables: Any) -> Any:
        return self.blocks[0](x, text, temb, mask, tables, *self.further)


def inputs(name: str, dtype: torch.dtype) -> Inputs:
    draw = Draw(2, 0, dtype)
    x, text, mask = draw.tokens(WIDTH), draw.text(WIDTH), draw.text_mask()
    if "15" not in name:
        mask = torch.cat([mask.new_ones(x.shape[:2]), mask], 1)[:, None, None]
    angle = torch.arange(x.shape[1])[:, None] * 0.7 ** torch.arange(HEAD_DIM // 2)
    angle = angle.repeat_interleave(2, -1)
    tables = angle.cos(), angle.sin()
    return {"x": x, "text": text, "temb": draw.normal(2, WIDTH), "mask": mask, "tables": tables}


@pytest.mark.parametrize("name", BLOCKS)
def test_counts_and_accuracy(name: str) -> None:
    pytest.importorskip("diffusers")
    model = seeded(lambda: Called(name))()
    given = inputs(name, torch.float32)
    judge = Judge(model, given)
    fxopt.swap(model)
    ours = run(model, given)
    report = fxopt.report(model)
    assert report.counts() == BLOCKS[name] and not report.declined
    judge(model, name, ours)


def framepack() -> nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=WIDTH // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )


def framepack_inputs(batch: int, dtype: torch.dtype) -> Inputs:
    """Three frames behind the past: one clean, then pairs of frames at halves of the resolution."""
    draw = Draw(batch, 0, dtype)
    past = ("clean", 1), ("history_2x", 2), ("history_4x", 4)
    first, inputs = 0, {}
    for name, num_frames in past[::-1]:
        inputs[f"latents_{name}"] = draw.latents(4, num_frames)
        inputs[f"indices_latents_{name}"] = torch.arange(first, first + num_frames)
        first += num_frames
    return inputs | {
        "hidden_states": draw.latents(4, 3),
        "indices_latents": torch.arange(first, first + 3),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.text(24),
        "encoder_attention_mask": draw.text_mask(),
        "pooled_projections": draw.normal(batch, 8),
        "image_embeds": draw.normal(batch, 5, 12),
        "guidance": draw.timestep(),
        "return_dict": False,
    }


@pytest.mark.parametrize("batch", [1, 2], ids=["no mask", "mask"])
def test_framepack(batch: int) -> None:
    pytest.importorskip("diffusers")
    model, given = seeded(framepack)(), framepack_inputs(batch, torch.float32)
    judge = Judge(model, given)
    fxopt.swap(model)
    ours = run(model, given)
    # Of the text's refiner: its MLP, and the projections of its attention.
    refiner = Counter(merge_linears=2, gated_activation=1, fuse_bias=1)
    assert Counter(fxopt.report(model).counts()) == Counter(DOUBLE) + Counter(SINGLE) + refiner
    judge(model, "framepack", ours)
