"""Biases: `swap` leaves those to the ops behind the linears that `optimize` does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.backends.eager import swap
from fxopt.backends.swaps.quantized import Formats, quantizes, quantizing
from fxopt.recipes import RECIPES
from tests.backends.swapping import same
from tests.families import FAMILIES, Family, Inputs, seeded


class Biases(TorchDispatchMode):
    """Counts the sections that `qk_norm_rope` is given, and those with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.sections = self.biased = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fxopt.qk_norm_rope.default:
            self.sections += len(args[1])
            self.biased += sum(bias is not None for bias in args[1])
        return func(*args, **(kwargs or {}))


def biases(model: nn.Module, inputs: Inputs) -> tuple[int, int]:
    model(**inputs)  # the proofs of the first call also run the op
    with Biases() as found:
        model(**inputs)
    return found.sections, found.biased


def qwen2() -> nn.Module:
    """A language model whose projections to queries, keys and values have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.families import language_config

    return Qwen2ForCausalLM(Qwen2Config(**language_config("sdpa")))


OTHERS = {"qwen2": Family("qwen2", seeded(qwen2), FAMILIES["llama-sdpa"].inputs)}
# By hand: sections of queries and of keys in all blocks, and how many of their linears have a bias.
COUNTS = {
    "flux": (12, 12),  # 2 double blocks of 4, 2 single blocks of 2
    "flux2": (12, 0),
    "sd3.5": (24, 24),  # 5 joint attentions of 4, 2 more of 2
    "qwen-image": (8, 8),
    "wan": (8, 8),
    "ltx": (8, 8),
    "z-image": (12, 0),
    "llama-sdpa": (4, 0),
    "qwen2": (4, 4),
}


# The families whose projections differ; `test_swap` compares the counts of rules on all.
FEW = ("flux", "wan", "ltx", "qwen2")


@pytest.mark.parametrize(
    "name",
    [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS],
)
def test_biases_are_those_of_optimize(name: str) -> None:
    family = (FAMILIES | OTHERS)[name]
    inputs = family.inputs(2, 0, torch.float32)
    swapped = biases(swap(family.build()), inputs)
    assert swapped == COUNTS[name]
    assert swapped == biases(fxopt.optimize(family.build()), inputs)


def test_whether_a_product_pays_is_a_matter_of_tokens() -> None:
    """The MLP is asked about on what it reads: its second linear has another width."""
    out, tokens = nn.Linear(256, 64), (2, 8)
    theta = 1 / 64 + 1 / 256 + 1 / 15.5  # 16 tokens and more
    with quantizing(Formats(RECIPES["fp8"], frozenset()), theta, out):
        for width in (64, 256, 1024):
            assert quantizes(torch.empty(*tokens, width), out) is RECIPES["fp8"]
            assert quantizes(torch.empty(1, 15, width), out) is None


def wrapped_keys(model: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for block in model.transformer_blocks:
        block.attn.to_k.__class__ = Doubled


def norms_left_out(model: nn.Module) -> None:
    for block in model.transformer_blocks:
        block.attn.norm_q = block.attn.norm_k = nn.Identity()
        block.attn.norm_added_q = block.attn.norm_added_k = nn.Identity()


@pytest.mark.parametrize("change", [wrapped_keys, norms_left_out])
def test_accuracy_after_a_change(change: Callable[[nn.Module], None]) -> None:
    """A linear that is no plain one keeps its bias; a rotation without a norm takes it as well."""
    same(FAMILIES["flux"].build(), FAMILIES["flux"], change)
