"""Models of diffusers that modulate by segment, through the doors: what fires, and how accurate."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.recipes import RECIPES
from tests.families import HEAD_DIM, WIDTH, Draw, Inputs, grid, qwen_image, seeded, z_image
from tests.numerics import Judge, run


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

    def forward(self, hidden_states: Tensor, modulation: Tensor, **masks: Any) -> Any:
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


def hunyuan_video() -> nn.Module:
    """`token_replace`: the tokens of the first frame, an image, are modulated as of time 0."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=WIDTH // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=24,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
        image_condition_type="token_replace",
    )


def hunyuan_video_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw, (rows, columns) = Draw(batch, size, dtype), grid(size)
    return {
        "hidden_states": draw.normal(batch, 4, 2, rows, columns),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.text(24),
        "encoder_attention_mask": draw.text_mask(),
        "pooled_projections": draw.normal(batch, 8),
        "guidance": draw.timestep(),
        "return_dict": False,
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Inputs]]] = {
    "qwen-image-edit": (qwen_image_edit, qwen_image_edit_inputs),
    "qwen-image-2.1": (QwenImage21, qwen_image21_inputs),
    "z-image-omni": (z_image, z_image_omni_inputs),
    "minimax-h3": (minimax_h3, minimax_h3_inputs),
    "hunyuan-video": (hunyuan_video, hunyuan_video_inputs),
}
# Exact, through `optimize`: each gate, scale and shift of a block that is looked up is in an op of
# segments. Of an edit's block these are 3 of 6, as its text is of one time.
COUNTS = {
    "qwen-image-edit": {
        "qk_norm_rope": 4,
        "merge_qk": 2,
        "norm_modulate": 12,
        "norm_modulate_segments": 6,
        "gated_activation": 4,
        "fuse_bias": 12,
        "silu_linears": 4,
        "merge_linears": 12,
        "merge_streams": 8,
    },
    "qwen-image-2.1": {
        "qk_norm_rope": 4,
        "merge_qk": 2,
        "norm_modulate": 6,
        "norm_modulate_segments": 6,
        "gated_activation": 2,
        "merge_linears": 6,
    },
    "z-image-omni": {
        "rms_norm": 4,
        "qk_norm_rope": 12,
        "merge_qk": 6,
        "norm_modulate": 20,
        "norm_modulate_segments": 16,
        "gated_activation": 6,
        "merge_linears": 18,
    },
    "minimax-h3": {
        "rms_norm": 1,
        "qk_norm_rope": 6,
        "merge_qk": 3,
        "norm_modulate": 7,
        "norm_modulate_segments": 6,
        "gated_activation": 3,
        "silu_linears": 2,
        "merge_linears": 9,
    },
    # Of a two-stream block's 6 the 3 of the video, and both of a single-stream one's. This cuts two
    # tensors in video and text and joins them again; one of them goes on inside the norm.
    "hunyuan-video": {
        "join_slices": 2,
        "qk_norm_rope": 8,
        "merge_qk": 4,
        "norm_modulate": 18,
        "norm_modulate_segments": 10,
        "gated_activation": 7,
        "fuse_bias": 18,
        "silu_linears": 9,
        "merge_linears": 19,
        "merge_streams": 8,
    },
}


@pytest.mark.parametrize(
    ("name", "dtype", "batch"),
    [*((name, torch.float32, 2) for name in MODELS), ("qwen-image-edit", torch.bfloat16, 1)],
    ids=str,
)
def test_optimize(name: str, dtype: torch.dtype, batch: int) -> None:
    build, make_inputs = MODELS[name]
    model, inputs = seeded(build)().to(dtype), make_inputs(batch, 0, dtype)
    judge = Judge(model, inputs)
    fxopt.optimize(model, strict=["norm_modulate_segments"])
    ours = run(model, inputs)
    report = fxopt.report(model)
    assert report.counts() == COUNTS[name]
    assert not [d for d in report.declined if d.rule in ("capture", "norm_modulate_segments")]
    judge(model, name, ours)


def test_another_length_takes_the_same_graph() -> None:
    build, make_inputs = MODELS["qwen-image-edit"]
    model = seeded(build)()
    own = copy.deepcopy(model)
    fxopt.optimize(model)
    for size in (0, 3):
        inputs = make_inputs(2, size, torch.float32)
        judge = Judge(own, inputs)
        judge(model, f"size {size}", run(model, inputs))
    assert fxopt.report(model).counts() == COUNTS["qwen-image-edit"]


# A compiler computes what is looked up where it is read: it gets the same ops, by a row per token.
@pytest.mark.usefixtures("fresh")
def test_the_compiled_door() -> None:
    build, make_inputs = MODELS["qwen-image-edit"]
    model = seeded(build)()
    judge = Judge(model, make_inputs(2, 0, torch.float32))
    model.compile(backend="fxopt", options={"inner": "aot_eager"})
    judge(model, "compiled")
    counts = {"qk_norm_rope": 4, "norm_modulate": 8, "gated_activation": 3, "rms_norm": 1}
    assert fxopt.report(model).counts() == counts


# What swap lacks of HunyuanVideo: a block of the text's refiner, of which it replaces attention and
# MLP, and joining slices, as it cuts none.
REFINER = {
    "norm_modulate": 2,
    "fuse_bias": 1,
    "silu_linears": 1,
    "merge_linears": 1,
    "join_slices": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen-image-edit", "z-image-omni", "hunyuan-video"])
def test_swap(name: str, dtype: torch.dtype) -> None:
    build, make_inputs = MODELS[name]
    model, inputs = seeded(build)().to(dtype), make_inputs(2, 0, dtype)
    judge = Judge(model, inputs)
    fxopt.swap(model)
    ours = run(model, inputs)
    report = fxopt.report(model)
    lacking = REFINER if name == "hunyuan-video" else {}
    assert report.counts() == Counter(COUNTS[name]) - Counter(lacking)
    assert all("Refiner" in d.block_class for d in report.declined)
    judge(model, name, ours)


# Of an edit's block all 6 norms and activations that a linear reads write codes, those of image and
# text in one launch.
UNDER_A_RECIPE = {
    "qk_norm_rope": 4,
    "merge_qk": 2,
    "norm_modulate": 12,
    "norm_modulate_segments": 6,
    "gated_activation": 4,
    "silu_linears": 4,
    "quantized_linear": 24,
    "merge_quantized": 12,
    "merge_streams": 10,
}


@pytest.mark.parametrize("door", [fxopt.optimize, fxopt.swap])
def test_codes_are_written_where_the_norm_is(door: Callable[..., nn.Module]) -> None:
    recipe = replace(RECIPES["fp8_rowwise"], name="always", profit="always")
    build, make_inputs = MODELS["qwen-image-edit"]
    model = door(seeded(build)(), recipe=recipe)
    run(model, make_inputs(2, 0, torch.float32))
    assert fxopt.report(model).counts() == UNDER_A_RECIPE
