"""Blocks and attention of diffusers that swap knows by what they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backends.eager import swap
from fxopt.backends.swaps.fused import counting
from tests.backends.swapping import COUNTS, expected
from tests.backends.test_rotary_models import cogview4, cogview4_inputs
from tests.families import HEAD_DIM, WIDTH, Draw, Inputs, grid, num_text, seeded, wan_inputs
from tests.numerics import Judge, run

HEADS = {"num_attention_heads": WIDTH // HEAD_DIM, "attention_head_dim": HEAD_DIM}
CHANNELS = {"in_channels": 4, "out_channels": 4}


def built(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of diffusers with two layers."""

    def build() -> nn.Module:
        diffusers = pytest.importorskip("diffusers")
        return getattr(diffusers, name)(**{"num_layers": 2, **HEADS, **options})

    return build


def chroma_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    image = draw.tokens(16)
    return {
        "hidden_states": image,
        "encoder_hidden_states": draw.text(24),
        "timestep": draw.timestep(),
        "img_ids": draw.image_ids(0).to(dtype),
        "txt_ids": torch.zeros(num_text(size), 3, dtype=dtype),
        "attention_mask": torch.cat([draw.text_mask(), torch.ones(image.shape[:2]).bool()], 1),
        "return_dict": False,
    }


def forcing_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    """Another time for each frame."""
    inputs = wan_inputs(batch, size, dtype)
    timestep = inputs["timestep"][:, None] + torch.arange(3)
    return inputs | {"timestep": timestep, "enable_diffusion_forcing": True}


class OfImage(nn.Module):
    """A block of Wan whose keys are an image's and, behind them, 512 of a text."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        self.blocks = nn.ModuleList(
            [WanTransformerBlock(WIDTH, 96, WIDTH // HEAD_DIM, added_kv_proj_dim=WIDTH)]
        )

    def forward(self, x: Tensor, keys: Tensor, temb: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * 0.7 ** torch.arange(HEAD_DIM // 2)
        angle = angle.repeat_interleave(2, -1)[None, :, None]
        out: Tensor = self.blocks[0](x, keys, temb, (angle.cos(), angle.sin()))
        return out


def of_image_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    keys, temb = draw.normal(batch, 7 + 512, WIDTH), draw.normal(batch, 6, WIDTH)
    return {"x": draw.tokens(WIDTH), "keys": keys, "temb": temb}


def cogvideox_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw, (rows, columns) = Draw(batch, size, dtype), grid(size)
    angle = torch.arange(2 * rows * columns)[:, None] * 0.7 ** torch.arange(HEAD_DIM // 2)
    angle = angle.repeat_interleave(2, -1)
    return {
        "hidden_states": draw.latents(4, 2).transpose(1, 2),
        "encoder_hidden_states": draw.text(24),
        "timestep": (1000 * draw.timestep()).long(),
        "image_rotary_emb": (angle.cos(), angle.sin()),
        "return_dict": False,
    }


def cosmos_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return wan_inputs(batch, size, dtype) | {"timestep": draw.timestep(), "fps": 24}


def ltx2_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw, (rows, columns) = Draw(batch, size, dtype), grid(size)
    mask = draw.text_mask().to(dtype)
    return {
        "hidden_states": draw.normal(batch, 2 * rows * columns, 16),
        "audio_hidden_states": draw.normal(batch, 7, 16),
        "encoder_hidden_states": draw.text(24),
        "audio_encoder_hidden_states": draw.text(24),
        "timestep": (1000 * draw.timestep()).long(),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": rows,
        "width": columns,
        "audio_num_frames": 7,
        "return_dict": False,
    }


VIDEO = {**CHANNELS, "text_dim": 24, "freq_dim": 32, "ffn_dim": 96, "rope_max_seq_len": 32}
OF_TEXT = {"text_embed_dim": 24, "time_embed_dim": 32}
LTX2 = {
    "in_channels": 16,
    "out_channels": 16,
    "cross_attention_dim": WIDTH,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "caption_channels": 24,
}
skyreels = built("SkyReelsV2Transformer3DModel", **VIDEO)
cogvideox = built(
    "CogVideoXTransformer3DModel",
    **CHANNELS,
    **OF_TEXT,
    sample_frames=5,
    use_rotary_positional_embeddings=True,
)
# Those of `optimize`, but for LTX-2, of which it counts 20 `norm_modulate`, 16 `fuse_bias` and 4
# `merge_streams`: where a norm feeds two modulations, swap adds attention's result in the first.
WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[..., Inputs], dict[str, int]]] = {
    "chroma": (
        built(
            "ChromaTransformer2DModel",
            in_channels=16,
            num_single_layers=2,
            joint_attention_dim=24,
            axes_dims_rope=(8, 12, 12),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        chroma_inputs,
        expected(16, 8, 7, 17, fuse_bias=17, merge_streams=8),  # one MLP in the approximator
    ),
    "skyreels": (skyreels, wan_inputs, COUNTS["wan"]),
    "skyreels, times of frames": (skyreels, forcing_inputs, COUNTS["wan"]),
    "wan of images": (
        OfImage,
        of_image_inputs,
        expected(4, 5, 1, 5, fuse_bias=4) | {"merge_qk": 3},  # the image's keys, by themselves
    ),
    "cogview4": (
        cogview4,
        cogview4_inputs,
        expected(12, 4, 4, 10, fuse_bias=8, merge_streams=6),
    ),
    "cogvideox": (
        cogvideox,
        cogvideox_inputs,
        expected(12, 4, 2, 4, silu_linears=2, fuse_bias=2, merge_streams=2),
    ),
    "ltx2": (
        built("LTX2VideoTransformer3DModel", **LTX2),
        ltx2_inputs,
        expected(24, 24, 4, 28, fuse_bias=20),
    ),
    "ltx2, by halves": (
        built("LTX2VideoTransformer3DModel", **LTX2, rope_type="split"),
        ltx2_inputs,
        expected(24, 24, 4, 28, fuse_bias=20),
    ),
}
# What lies between the modules is left.
ATTENTION = {
    "cosmos": (
        built(
            "CosmosTransformer3DModel",
            **CHANNELS,
            mlp_ratio=2.0,
            text_embed_dim=24,
            adaln_lora_dim=8,
            max_size=(4, 32, 32),
            concat_padding_mask=False,
            extra_pos_embed_type=None,
        ),
        cosmos_inputs,
        expected(0, 8, 2, 6),
    ),
}
ROUNDED = ("skyreels", "cogview4")


def check(name: str, dtype: torch.dtype) -> fxopt.Report:
    """Counts, accuracy and keys of the swapped model."""
    build, inputs, counts = (WHOLE | ATTENTION)[name]
    model, given = seeded(build)().to(dtype), inputs(2, 0, dtype)
    keys = list(model.state_dict())
    judge = Judge(model, given)
    swap(model)
    with counting() as fired:
        found = run(model, given)
    report = fxopt.report(model)
    judge(model, name, found)
    wanted = {rule: count for rule, count in counts.items() if count}
    assert report.counts() == wanted
    assert Counter(rule for rule, _ in fired) == wanted
    assert not [d for d in report.declined if d.rule == "swap"]
    assert list(model.state_dict()) == keys
    return report


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float32) for n in WHOLE), *((n, torch.bfloat16) for n in ROUNDED)],
    ids=str,
)
def test_whole_blocks(name: str, dtype: torch.dtype) -> None:
    assert check(name, dtype).declined == ()


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    declined = {d.rule for d in check(name, torch.float32).declined}
    assert "norm_modulate" in declined and "qk_norm_rope" not in declined


def reasons(change: Callable[[nn.Module], None], build: Callable[[], nn.Module]) -> dict[str, str]:
    """Why a changed first block is not replaced whole, by the class of what was tried."""
    model = build()
    change(model.get_submodule("blocks.0"))
    swap(model)
    assert "forward" not in vars(model.get_submodule("blocks.0"))
    assert "forward" in vars(model.get_submodule("blocks.1"))
    report = fxopt.report(model)
    declined = [d for d in report.declined if d.fqn.startswith("blocks.0")]
    return {d.node: d.reasons[0] for d in declined if d.rule == "swap"}


def test_a_processor_of_the_user_is_called() -> None:
    """Whatever it computes: it may look at the attention."""
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor

    class Watching(SkyReelsV2AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().__call__(*args, **kwargs)

    def change(block: Any) -> None:
        block.attn1.set_processor(Watching())

    found = reasons(change, skyreels)
    for name in ("SkyReelsV2TransformerBlock", "SkyReelsV2Attention"):
        assert "the attention processor Watching is not diffusers'" in found[name]


def test_a_forward_of_the_user_is_called() -> None:
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2TransformerBlock

    class Watched(SkyReelsV2TransformerBlock):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    def change(block: Any) -> None:
        block.__class__ = Watched

    model = skyreels()
    assert reasons(change, lambda: model) == {}
    declined = {d.rule: d.reasons[0] for d in fxopt.report(model).declined}
    assert "in the forward of Watched" in declined["norm_modulate"]


def test_a_dropout_behind_the_mlp_is_not_left_out() -> None:
    model = built(
        "CogVideoXTransformer3DModel", **CHANNELS, **OF_TEXT, sample_frames=5, dropout=0.1
    )()
    declined = {
        d.node: d.reasons[0] for d in fxopt.report(swap(model)).declined if d.rule == "swap"
    }
    assert "a dropout with p > 0 stands behind the MLP" in declined["CogVideoXBlock"]


def test_a_dropout_of_attention_is_not_left_out() -> None:
    """Proofs run as in evaluation, where a processor that drops in training does not."""
    model = ATTENTION["cosmos"][0]()
    block: Any = model.get_submodule("transformer_blocks.0")
    block.attn1.dropout = 0.1
    declined = {d.fqn: d.reasons[0] for d in fxopt.report(swap(model)).declined if d.rule == "swap"}
    assert "a dropout with p > 0" in declined["transformer_blocks.0.attn1"]
    assert "forward" not in vars(block.attn1) and "forward" in vars(block.attn2)


def test_another_norm_of_queries_fails_the_proof() -> None:
    class Halved(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    def change(block: Any) -> None:
        block.attn1.norm_q.__class__ = Halved

    found = reasons(change, skyreels)
    assert "differs by" in found["SkyReelsV2TransformerBlock"]
