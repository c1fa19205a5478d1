"""Real models whose rotary tables are for a part of a head or sequence, or hold 2x2 matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from tests.families import HEAD_DIM, WIDTH, Draw, Inputs, language_config, language_inputs, seeded
from tests.numerics import Judge, run


def language(name: str, attention: str = "sdpa", **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**language_config(attention), **options)
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


def cogview4() -> nn.Module:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=WIDTH // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=16,
        rope_axes_dim=(16, 16),
    )


def cogview4_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    pixels = torch.full((batch, 2), 64.0, dtype=dtype)
    return {
        "hidden_states": draw.latents(4),
        "encoder_hidden_states": draw.text(24),
        "timestep": (1000 * draw.timestep()).long(),
        "original_size": pixels,
        "target_size": pixels,
        "crop_coords": torch.zeros_like(pixels),
        "return_dict": False,
    }


class HeadNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
        return (wide * rstd).to(x.dtype) * self.scale


class Stream(nn.Module):
    """What a published FLUX block has for each of text and image."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm_q, self.norm_k = HeadNorm(), HeadNorm()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
        """q, k, v: [B, H, S, d]."""
        projected = self.qkv((1 + scale) * self.norm1(x) + shift)
        q, k, v = projected.unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return [self.norm_q(q), self.norm_k(k), v]

    def rest(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, gate_mlp = parts
        x = x + gate * self.out(attended)
        hidden = self.up((1 + scale) * self.norm2(x) + shift)
        return x + gate_mlp * self.down(F.gelu(hidden, approximate="tanh"))


class Published(nn.Module):
    """A double block as FLUX was first published: a 2x2 matrix for each pair of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Stream(), Stream()

    def forward(
        self, image: Tensor, text: Tensor, embedding: Tensor, matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        streams, inputs = (self.text, self.image), (text, image)
        mods = [s.modulation(F.silu(embedding))[:, None].chunk(6, dim=-1) for s in streams]
        operands = [s.heads(x, m[1], m[0]) for s, x, m in zip(streams, inputs, mods, strict=True)]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*operands, strict=True))
        q, k = (self.rotate(t, matrices) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        parts = attended.split([text.shape[1], image.shape[1]], dim=1)
        text, image = (
            s.rest(x, a, m[2:]) for s, x, a, m in zip(streams, inputs, parts, mods, strict=True)
        )
        return image, text

    @staticmethod
    def rotate(x: Tensor, matrices: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
        turned = matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]
        return turned.reshape(x.shape).type_as(x)


class PublishedModel(nn.Module):
    """Makes the matrices once for all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Published(), Published()])

    def forward(self, image: Tensor, text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(text.shape[1] + image.shape[1], dtype=torch.float64)
        angle = positions[:, None] * 100 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        cos, sin = angle.cos(), angle.sin()
        matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        matrices = matrices.expand(len(image), 1, *matrices.shape).float()
        for block in self.blocks:
            image, text = block(image, text, embedding, matrices)
        return image, text


def published_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return {
        "image": draw.tokens(WIDTH),
        "text": draw.text(WIDTH),
        "embedding": draw.normal(batch, WIDTH),
    }


MODELS = {
    # Halves of a quarter of the head, q, k and v from one projection, no norm.
    "gpt-neox": (language("GPTNeoX", rotary_pct=0.25), language_inputs),
    # Halves of half of the head, behind a LayerNorm.
    "phi": (language("Phi", qk_layernorm=True, partial_rotary_factor=0.5), language_inputs),
    # Neighbours in half of the head; attention is written out and its weights are returned.
    "gpt-j": (language("GPTJ", "eager", rotary_dim=8), language_inputs),
    "codegen": (language("CodeGen", "eager", rotary_dim=8), language_inputs),
    # Neighbours in half of the head.
    "glm": (
        language("Glm", head_dim=16, partial_rotary_factor=0.5, pad_token_id=0),
        language_inputs,
    ),
    # Matrices for neighbours, text keys that are not rotated before those of the image.
    "prx": (prx, prx_inputs),
    "published flux": (PublishedModel, published_inputs),
    # Halves of the image's tokens, behind the text's and in place, behind a LayerNorm.
    "cogview4": (cogview4, cogview4_inputs),
}
NAMES = ("qk_norm_rope", "merge_qk")
IN_FP32 = [(name, torch.float32) for name in MODELS]
IN_BF16 = [(name, torch.bfloat16) for name in MODELS]


def built(name: str, dtype: torch.dtype) -> tuple[nn.Module, Inputs, Judge]:
    build, inputs = MODELS[name]
    model, drawn = seeded(build)().to(dtype), inputs(2, 0, dtype)
    return model, drawn, Judge(model, drawn)


# In bf16 the ops, which are tested by themselves, are the same; one with a form of tables of its
# own is in the quick run.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *IN_FP32,
        *(c if c[0] == "prx" else pytest.param(*c, marks=pytest.mark.slow) for c in IN_BF16),
    ],
    ids=str,
)
def test_optimize(name: str, dtype: torch.dtype) -> None:
    model, inputs, judge = built(name, dtype)
    fxopt.optimize(model)
    ours = run(model, inputs)
    counts = fxopt.report(model).counts()
    # Two blocks: queries and keys of each, in one call.
    assert {n: counts.get(n, 0) for n in NAMES} == {"qk_norm_rope": 4, "merge_qk": 2}
    judge(model, name, ours)


# In bf16 the compiled door differs from `optimize` by what the compiler does.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*IN_FP32, *(pytest.param(*case, marks=pytest.mark.slow) for case in IN_BF16)],
    ids=str,
)
@pytest.mark.usefixtures("fresh")
def test_compiled(name: str, dtype: torch.dtype) -> None:
    model, _, judge = built(name, dtype)
    model.compile(backend="fxopt", options={"inner": "aot_eager"})
    judge(model, name)
    assert fxopt.report(model).counts()["qk_norm_rope"] == 4
