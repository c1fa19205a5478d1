"""Published models at their real sizes, as the blocks that they repeat, for planning without one.

Nothing here holds weights: `build` and `inputs` create uninitialised tensors wherever the caller's
device context or fake-tensor mode puts them. diffusers and transformers are imported on use.

Shape legend: B batch, S image tokens, T text tokens, N = S + T, D model width, H head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

DTYPE = torch.bfloat16
NUM_TEXT = 512
HEAD_DIM = 128


@dataclass(frozen=True)
class PresetBlock:
    """One block class of a model.

    Args:
        name: unique within the preset.
        count: blocks of this kind in the model.
        build: gives the block, in bfloat16 and training mode.
        inputs: gives the keyword arguments of its forward; activations require grad.
        num_outputs: tensors that its forward returns.
    """

    name: str
    count: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    num_outputs: int


@dataclass(frozen=True)
class Preset:
    """A published model and the size it is planned at unless told otherwise.

    Args:
        name: as users type it.
        height, width: default resolution in pixels; 0 where the model has none.
        make: gives the blocks for a batch size, height and width.
    """

    name: str
    height: int
    width: int
    make: Callable[[int, int, int], list[PresetBlock]]

    def blocks(
        self, batch: int = 1, height: int | None = None, width: int | None = None
    ) -> list[PresetBlock]:
        """The model's blocks, with inputs for `batch` samples of `height` x `width` pixels."""
        return self.make(batch, height or self.height, width or self.width)


def flux_dev(batch: int, height: int, width: int) -> list[PresetBlock]:
    """FLUX.1-dev. Source: https://huggingface.co/black-forest-labs/FLUX.1-dev"""
    from diffusers.models.transformers import transformer_flux as flux

    heads, num_image = 24, image_tokens(height, width)
    dim = heads * HEAD_DIM

    def inputs() -> Inputs:
        return {
            "hidden_states": activation(batch, num_image, dim),
            "encoder_hidden_states": activation(batch, NUM_TEXT, dim),
            "temb": activation(batch, dim),
            "image_rotary_emb": cos_sin(NUM_TEXT + num_image, HEAD_DIM),
        }

    double = block(lambda: flux.FluxTransformerBlock(dim, heads, HEAD_DIM))
    single = block(lambda: flux.FluxSingleTransformerBlock(dim, heads, HEAD_DIM))
    return [
        PresetBlock("double", 19, double, inputs, 2),
        PresetBlock("single", 38, single, inputs, 2),
    ]


def flux2_dev(batch: int, height: int, width: int) -> list[PresetBlock]:
    """FLUX.2-dev. Source: https://huggingface.co/black-forest-labs/FLUX.2-dev"""
    from diffusers.models.transformers import transformer_flux2 as flux2

    heads, num_image = 48, image_tokens(height, width)
    dim = heads * HEAD_DIM

    def double_inputs() -> Inputs:
        return {
            "hidden_states": activation(batch, num_image, dim),
            "encoder_hidden_states": activation(batch, NUM_TEXT, dim),
            "temb_mod_img": activation(batch, 1, 6 * dim),
            "temb_mod_txt": activation(batch, 1, 6 * dim),
            "image_rotary_emb": cos_sin(NUM_TEXT + num_image, HEAD_DIM),
        }

    def single_inputs() -> Inputs:
        return {
            "hidden_states": activation(batch, NUM_TEXT + num_image, dim),
            "encoder_hidden_states": None,
            "temb_mod": activation(batch, 1, 3 * dim),
            "image_rotary_emb": cos_sin(NUM_TEXT + num_image, HEAD_DIM),
        }

    double = block(lambda: flux2.Flux2TransformerBlock(dim, heads, HEAD_DIM))
    single = block(lambda: flux2.Flux2SingleTransformerBlock(dim, heads, HEAD_DIM))
    return [
        PresetBlock("double", 8, double, double_inputs, 2),
        PresetBlock("single", 48, single, single_inputs, 1),
    ]


def sd35_large(batch: int, height: int, width: int) -> list[PresetBlock]:
    """Stable Diffusion 3.5 Large; its text is 77 CLIP and 256 T5 tokens.

    Source: https://huggingface.co/stabilityai/stable-diffusion-3.5-large
    """
    from diffusers.models.attention import JointTransformerBlock

    heads, head_dim, num_text = 38, 64, 77 + 256
    dim = heads * head_dim

    def inputs() -> Inputs:
        return {
            "hidden_states": activation(batch, image_tokens(height, width), dim),
            "encoder_hidden_states": activation(batch, num_text, dim),
            "temb": activation(batch, dim),
        }

    def joint(is_last: bool) -> Callable[[], nn.Module]:
        return block(
            lambda: JointTransformerBlock(
                dim, heads, head_dim, context_pre_only=is_last, qk_norm="rms_norm"
            )
        )

    return [
        PresetBlock("joint", 37, joint(False), inputs, 2),
        PresetBlock("last", 1, joint(True), inputs, 1),
    ]


def qwen_image(batch: int, height: int, width: int) -> list[PresetBlock]:
    """Qwen-Image, unpadded text. Source: https://huggingface.co/Qwen/Qwen-Image"""
    from diffusers.models.transformers import transformer_qwenimage as qwen

    heads, num_image = 24, image_tokens(height, width)
    dim = heads * HEAD_DIM

    def inputs() -> Inputs:
        return {
            "hidden_states": activation(batch, num_image, dim),
            "encoder_hidden_states": activation(batch, NUM_TEXT, dim),
            "encoder_hidden_states_mask": None,
            "temb": activation(batch, dim),
            "image_rotary_emb": (
                rotations(num_image, HEAD_DIM // 2),
                rotations(NUM_TEXT, HEAD_DIM // 2),
            ),
        }

    build = block(lambda: qwen.QwenImageTransformerBlock(dim, heads, HEAD_DIM))
    return [PresetBlock("block", 60, build, inputs, 2)]


def wan21_14b(batch: int, height: int, width: int) -> list[PresetBlock]:
    """Wan2.1-14B, 81 frames: 21 in the latent, so 32,760 tokens at 480 x 832.

    Source: https://huggingface.co/Wan-AI/Wan2.1-T2V-14B
    """
    from diffusers.models.transformers import transformer_wan as wan

    heads, ffn_dim, num_frames = 40, 13824, 21
    dim, num_video = heads * HEAD_DIM, num_frames * image_tokens(height, width)

    def inputs() -> Inputs:
        return {
            "hidden_states": activation(batch, num_video, dim),
            "encoder_hidden_states": activation(batch, NUM_TEXT, dim),
            "temb": activation(batch, 6, dim),
            "rotary_emb": cos_sin(1, num_video, 1, HEAD_DIM),
        }

    build = block(lambda: wan.WanTransformerBlock(dim, ffn_dim, heads, cross_attn_norm=True))
    return [PresetBlock("block", 40, build, inputs, 1)]


def z_image(batch: int, height: int, width: int) -> list[PresetBlock]:
    """Z-Image; the refiners see image or text alone.

    Source: https://huggingface.co/Tongyi-MAI/Z-Image-Turbo
    """
    from diffusers.models.transformers import transformer_z_image as z

    heads, num_image = 30, image_tokens(height, width)
    dim = heads * HEAD_DIM

    def inputs(num_tokens: int, modulation: bool) -> Callable[[], Inputs]:
        return lambda: {
            "x": activation(batch, num_tokens, dim),
            "attn_mask": None,
            "freqs_cis": rotations(batch, num_tokens, HEAD_DIM // 2),
            "adaln_input": activation(batch, z.ADALN_EMBED_DIM) if modulation else None,
        }

    def build(modulation: bool) -> Callable[[], nn.Module]:
        return block(lambda: z.ZImageTransformerBlock(0, dim, heads, heads, 1e-5, True, modulation))

    return [
        PresetBlock("block", 30, build(True), inputs(num_image + NUM_TEXT, True), 1),
        PresetBlock("noise_refiner", 2, build(True), inputs(num_image, True), 1),
        PresetBlock("context_refiner", 2, build(False), inputs(NUM_TEXT, False), 1),
    ]


def llama_3_8b(batch: int, height: int, width: int) -> list[PresetBlock]:
    """Llama-3-8B at 8192 tokens. Source: https://huggingface.co/meta-llama/Meta-Llama-3-8B"""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    dim, num_tokens = 4096, 8192

    config: dict[str, Any] = {
        "hidden_size": dim,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "sdpa",
    }

    def inputs() -> Inputs:
        return {
            "hidden_states": activation(batch, num_tokens, dim),
            "attention_mask": None,
            "position_embeddings": cos_sin(batch, num_tokens, HEAD_DIM, dtype=DTYPE),
        }

    build = block(lambda: LlamaDecoderLayer(LlamaConfig(**config), layer_idx=0))
    return [PresetBlock("block", 32, build, inputs, 1)]


def image_tokens(height: int, width: int) -> int:
    """Tokens of one image or latent frame: 8x by the VAE, 2x2 by the patches."""
    return (height // 16) * (width // 16)


def block(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Create the parameters in DTYPE; casting them later fails under fake tensors."""

    def build_in_dtype() -> nn.Module:
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            return build().train()
        finally:
            torch.set_default_dtype(default)

    return build_in_dtype


def activation(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, requires_grad=True)


def cos_sin(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """RoPE tables, real."""
    return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)


def rotations(*shape: int) -> Tensor:
    """RoPE table, complex."""
    return torch.empty(shape, dtype=torch.complex64)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("flux-dev", 1024, 1024, flux_dev),
        Preset("flux2-dev", 1024, 1024, flux2_dev),
        Preset("sd3.5-large", 1024, 1024, sd35_large),
        Preset("qwen-image", 1024, 1024, qwen_image),
        Preset("wan2.1-14b", 480, 832, wan21_14b),
        Preset("z-image", 1024, 1024, z_image),
        Preset("llama-3-8b", 0, 0, llama_3_8b),
    )
}
