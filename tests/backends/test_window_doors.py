"""Windows that models' own code makes masks of, in the compiled door, which sees them made.

Mistral and Gemma see a window of the keys before each query, ModernBERT one on both sides, and
ACE-Step, a diffusion transformer for audio, adds such a mask to its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import fxopt
from fxopt.backends import compiled_graphs
from fxopt.recipe_errors import AttentionRefused
from fxopt.recipes import Recipe
from tests.families import Inputs, loss, seeded
from tests.kernels.emulated_varlen import Kernels, on_cpu
from tests.numerics import Judge

ALL, NUM_TOKENS = (-1, -1), 24
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attn_implementation": "sdpa",
}


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=8, **SIZES))


def gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        num_key_value_heads=2, head_dim=8, sliding_window=5, layer_types=layers, **SIZES
    )
    return Gemma3ForCausalLM(config)


def modernbert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    special = dict.fromkeys(("pad", "bos", "eos", "cls", "sep"), 0)
    tokens = {f"{name}_token_id": number for name, number in special.items()}
    return ModernBertForMaskedLM(ModernBertConfig(local_attention=12, **tokens, **SIZES))


def ace_step() -> nn.Module:
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        encoder_hidden_size=16,
        sliding_window=4,
    )


def tokens(batch: int) -> Inputs:
    ids = torch.randint(1, 64, (batch, NUM_TOKENS))
    return {"input_ids": ids, "return_dict": False}


def latents(batch: int) -> Inputs:
    return {
        "hidden_states": torch.randn(batch, NUM_TOKENS, 4),
        "timestep": torch.rand(batch),
        "timestep_r": torch.rand(batch),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "context_latents": torch.randn(batch, NUM_TOKENS, 8),
    }


# What the kernel is told of the attentions of each.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs], set[tuple[int, int]]]] = {
    "mistral": (mistral, tokens, {(7, 0)}),
    "gemma": (gemma, tokens, {(4, 0), (-1, 0)}),
    "modernbert": (modernbert, tokens, {(6, 6), ALL}),
    "ace-step": (ace_step, latents, {(4, 4), ALL}),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    compiled_graphs.GRAPHS.clear()
    torch.manual_seed(0)


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with on_cpu() as emulated:
        yield emulated


def compiled(model: nn.Module) -> nn.Module:
    recipe = Recipe("mine", attention="varlen")
    model.compile(backend="fxopt", options={"recipe": recipe, "inner": "aot_eager"})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_is_told_the_window(name: str, kernels: Kernels) -> None:
    build, draw, windows = MODELS[name]
    model, inputs = seeded(build)(), draw(2)
    if name == "ace-step" and torch._dynamo.explain(model)(**inputs).graph_break_count:
        pytest.skip("this Dynamo breaks ACE-Step's graph, and its mask is no window's")  # 2.11's
    judge = Judge(model, inputs)
    judge(compiled(model), name)
    assert kernels.windows == windows
    assert {a.backend for a in fxopt.report(model).attentions} == {"varlen"}


def test_under_another_number_of_tokens(kernels: Kernels) -> None:
    """The second graph has symbolic sizes, and a window that is wider than the first ones."""
    model = compiled(mistral())
    for num_tokens in (6, 24, 17):
        kernels.windows.clear()
        loss(model, {"input_ids": torch.randint(1, 64, (2, num_tokens))}).backward()
        assert kernels.windows == ({(-1, 0)} if num_tokens == 6 else {(7, 0)})


def test_in_checkpoints_whose_mask_is_made_outside(kernels: Kernels) -> None:
    """Of the full layers the mask is dropped, and of the others the window is told."""
    model, inputs = seeded(gemma)(), tokens(2)
    judge = Judge(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    judge(compiled(model), "checkpointed")
    assert kernels.windows == {(4, 0), (-1, 0)}
    assert fxopt.report(model).counts()["drop_mask"] == 1


def test_padding_beside_a_window_is_no_window(kernels: Kernels) -> None:
    is_token = torch.arange(NUM_TOKENS) < torch.tensor([[NUM_TOKENS], [15]])
    inputs = tokens(2) | {"attention_mask": is_token.long()}
    with pytest.raises(
        BackendCompilerFailed, match="the mask may differ between queries"
    ) as caught:
        loss(compiled(mistral()), inputs)
    assert isinstance(caught.value.inner_exception, AttentionRefused)
