"""Tiny configurations of real model families, one row each, for tests that run them whole.

Shape legend: B batch, H and W rows and columns of image tokens, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Inputs = dict[str, Any]
WIDTH = 64  # of every model
HEAD_DIM = 32


@dataclass(frozen=True)
class Family:
    """A seeded fp32 model and the keyword arguments of its forward.

    `inputs(batch, size, dtype)`: `size` 0, 1, 2, ... selects the resolution or the length.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, torch.dtype], Inputs]


# Whose models the families are; a machine with a GPU may lack one.
LIBRARIES = ("diffusers", "transformers")


def built(family: Family) -> nn.Module:
    """The model; skips the test where its library is not installed."""
    try:
        return family.build()
    except ModuleNotFoundError as missing:
        if missing.name not in LIBRARIES:
            raise
        pytest.skip(f"{family.name}: {missing.name} is not installed")


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run the model and return its output tensors in order."""
    return [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]


def project(tensors: list[Tensor]) -> Tensor:
    """Sum of each tensor times a fixed random weight of multiples of 1/8, exact in every dtype."""
    total = torch.zeros((), dtype=torch.float64)
    for index, tensor in enumerate(tensors):
        generator = torch.Generator().manual_seed(index)
        weight = torch.randint(-8, 9, tensor.shape, generator=generator) / 8
        accumulate = torch.promote_types(tensor.dtype, torch.float32)
        total = total + (tensor * weight.to(tensor)).sum(dtype=accumulate)
    return total


def loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Run the model and project its outputs to a scalar."""
    return project(outputs(model, inputs))


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make `build` deterministic and redraw every parameter.

    Zero-initialised projections and norms whose weight is one would hide errors in the operands
    that they multiply. Matrices get unit gain, vectors a spread of 0.2 around one or zero.
    """

    def build_seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = build()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    is_norm_weight = bool((parameter == 1).all())
                    parameter.normal_(mean=float(is_norm_weight), std=0.2)
        return model.train()

    return build_seeded


def grid(size: int) -> tuple[int, int]:
    """Rows and columns of image tokens: 4x4 at size 0, 7x8 at size 19."""
    return 4 + size % 4, 4 + size // 4


def num_text(size: int) -> int:
    """Text tokens: never as many as image tokens, which dynamic shapes would take for one size."""
    return 9 + size % 4


class Draw:
    """A seeded source of inputs of one dtype."""

    def __init__(self, batch: int, size: int, dtype: torch.dtype) -> None:
        self.batch, self.size, self.dtype = batch, size, dtype
        self.generator = torch.Generator().manual_seed(1000 * batch + size)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def tokens(self, channels: int) -> Tensor:
        """[B, H*W, channels]"""
        rows, columns = grid(self.size)
        return self.normal(self.batch, rows * columns, channels)

    def text(self, channels: int) -> Tensor:
        """[B, T, channels]"""
        return self.normal(self.batch, num_text(self.size), channels)

    def latents(self, channels: int, *frames: int) -> Tensor:
        """[B, channels, *frames, 2*H, 2*W]: two pixels a token in each direction."""
        rows, columns = grid(self.size)
        return self.normal(self.batch, channels, *frames, 2 * rows, 2 * columns)

    def timestep(self) -> Tensor:
        """[B], in (0, 1], exact in bf16 also after a multiplication by 1000."""
        return torch.tensor([0.5 ** (1 + b % 3) for b in range(self.batch)], dtype=self.dtype)

    def text_mask(self) -> Tensor:
        """[B, T] bool; sample b is padded by 2 + b % 3 tokens."""
        length = num_text(self.size)
        valid = torch.tensor([length - 2 - b % 3 for b in range(self.batch)])
        return torch.arange(length) < valid[:, None]

    def image_ids(self, *leading: int) -> Tensor:
        """[H*W, len(leading) + 2]: the leading coordinates, then row and column."""
        rows, columns = grid(self.size)
        axes = [torch.tensor([value]) for value in leading]
        return torch.cartesian_prod(*axes, torch.arange(rows), torch.arange(columns))


def flux() -> nn.Module:
    own = {"pooled_projection_dim": 20, "guidance_embeds": True}
    return flux_like("FluxTransformer2DModel", **own)


def flux_like(name: str, **own: Any) -> nn.Module:
    """FLUX.1, or a model of diffusers that has its blocks under names of its own."""
    import diffusers

    model: nn.Module = getattr(diffusers, name)(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=24,
        axes_dims_rope=(8, 12, 12),
        **own,
    )
    return model


def flux_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return {
        "hidden_states": draw.tokens(16),
        "encoder_hidden_states": draw.text(24),
        "pooled_projections": draw.normal(batch, 20),
        "timestep": draw.timestep(),
        "guidance": torch.full((batch,), 4.0, dtype=dtype),
        "img_ids": draw.image_ids(0).to(dtype),
        "txt_ids": torch.zeros(num_text(size), 3, dtype=dtype),
        "return_dict": False,
    }


def flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
    )


def flux2_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    image_ids = nn.functional.pad(draw.image_ids(0), (0, 1))
    text_ids = torch.arange(num_text(size))[:, None] * torch.tensor([0, 0, 0, 1])
    return {
        "hidden_states": draw.tokens(16),
        "encoder_hidden_states": draw.text(24),
        "timestep": draw.timestep(),
        "guidance": torch.full((batch,), 0.5, dtype=dtype),
        "img_ids": image_ids.to(dtype),
        "txt_ids": text_ids.to(dtype),
        "return_dict": False,
    }


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=24,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=20,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def sd3_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return {
        "hidden_states": draw.latents(4),
        "encoder_hidden_states": draw.text(24),
        "pooled_projections": draw.normal(batch, 20),
        "timestep": 1000 * draw.timestep(),
        "return_dict": False,
    }


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=24,
        axes_dims_rope=(8, 12, 12),
    )


def qwen_image_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return {
        "hidden_states": draw.tokens(16),
        "encoder_hidden_states": draw.text(24),
        "encoder_hidden_states_mask": draw.text_mask(),
        "timestep": draw.timestep(),
        "img_shapes": [(1, *grid(size))] * batch,
        "return_dict": False,
    }


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=WIDTH // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return {
        "hidden_states": draw.latents(4, 3),
        "timestep": (1000 * draw.timestep()).long(),
        "encoder_hidden_states": draw.text(24),
        "return_dict": False,
    }


def ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=WIDTH // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=24,
    )


def ltx_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    num_frames, (rows, columns) = 2, grid(size)
    return {
        "hidden_states": draw.normal(batch, num_frames * rows * columns, 16),
        "encoder_hidden_states": draw.text(24),
        "timestep": (1000 * draw.timestep()).long(),
        "encoder_attention_mask": draw.text_mask().to(dtype),
        "num_frames": num_frames,
        "height": rows,
        "width": columns,
        "return_dict": False,
    }


def z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=WIDTH // HEAD_DIM,
        n_kv_heads=WIDTH // HEAD_DIM,
        cap_feat_dim=24,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 32, 32],
    )


def z_image_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    return {
        "x": list(draw.latents(4, 1)),
        "t": draw.timestep(),
        "cap_feats": list(draw.text(24)),
        "return_dict": False,
    }


def qwen3(attention: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return Qwen3ForCausalLM(Qwen3Config(head_dim=HEAD_DIM, **language_config(attention)))

    return build


def llama(attention: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**language_config(attention)))

    return build


def language_config(attention: str) -> dict[str, Any]:
    return {
        "vocab_size": 96,
        "hidden_size": WIDTH,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attn_implementation": attention,
    }


def language_inputs(batch: int, size: int, dtype: torch.dtype) -> Inputs:
    draw = Draw(batch, size, dtype)
    length = 20 + size
    return {
        "input_ids": torch.randint(0, 96, (batch, length), generator=draw.generator),
        "use_cache": False,
        "return_dict": False,
    }


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("flux", seeded(flux), flux_inputs),
        Family("flux2", seeded(flux2), flux2_inputs),
        Family("sd3.5", seeded(sd3), sd3_inputs),
        Family("qwen-image", seeded(qwen_image), qwen_image_inputs),
        Family("wan", seeded(wan), wan_inputs),
        Family("ltx", seeded(ltx), ltx_inputs),
        Family("z-image", seeded(z_image), z_image_inputs),
        Family("qwen3-eager", seeded(qwen3("eager")), language_inputs),
        Family("qwen3-sdpa", seeded(qwen3("sdpa")), language_inputs),
        Family("llama-eager", seeded(llama("eager")), language_inputs),
        Family("llama-sdpa", seeded(llama("sdpa")), language_inputs),
    )
}
