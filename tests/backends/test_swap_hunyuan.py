"""HunyuanVideo's and HunyuanImage's blocks under swap; with `token_replace` in `test_segments`."""

from __future__ import annotations

import importlib
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
