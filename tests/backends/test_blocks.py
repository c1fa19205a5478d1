"""Which modules of a model are taken for its blocks."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fxopt
from fxopt.backends.blocks import find_blocks
from fxopt.errors import TargetMatchesNothing
from tests.backends.toys import Block, Stack, assert_like_eager, reasons, stack, tokens
from tests.families import FAMILIES

# By family: prefix -> number of blocks.
BLOCKS = {
    "flux": {"transformer_blocks": 2, "single_transformer_blocks": 2},
    "flux2": {"transformer_blocks": 2, "single_transformer_blocks": 2},
    "sd3.5": {"transformer_blocks": 5},
    "qwen-image": {"transformer_blocks": 2},
    "wan": {"blocks": 2},
    "ltx": {"transformer_blocks": 2},
    "z-image": {"noise_refiner": 2, "context_refiner": 2, "layers": 2},
    "qwen3-eager": {"model.layers": 2},
    "qwen3-sdpa": {"model.layers": 2},
    "llama-eager": {"model.layers": 2},
    "llama-sdpa": {"model.layers": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    blocks = find_blocks(FAMILIES[name].build(), None)
    expected = [f"{prefix}.{i}" for prefix, n in BLOCKS[name].items() for i in range(n)]
    assert list(blocks) == expected


class Lists(nn.Module):
    """Lists that are no lists of blocks, a list of lists, and a block within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.embedder = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
        self.layers = nn.ModuleList([nn.ModuleList([Block(), nn.Identity()]), Stack()])
        self.sequence = nn.Sequential(Block(), Block())


def test_lists() -> None:
    assert list(find_blocks(Lists(), None)) == [
        "layers.0.0",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
        "sequence.0",
        "sequence.1",
    ]


def test_no_lists() -> None:
    model = nn.Linear(2, 2)
    assert find_blocks(model, None) == {"": model}


def test_targets_inside_a_target_are_dropped() -> None:
    model = stack()
    assert list(find_blocks(model, ["blocks.0.attn", "blocks.0", "blocks.1.attn.to_*"])) == [
        "blocks.0",
        "blocks.1.attn.to_q",
        "blocks.1.attn.to_k",
        "blocks.1.attn.to_v",
        "blocks.1.attn.to_out",
    ]


def test_globs_are_case_sensitive_and_whole() -> None:
    model = stack()
    for pattern in ("BLOCKS.*", "blocks", "locks.0"):
        if pattern == "blocks":
            assert list(find_blocks(model, pattern)) == ["blocks"]
            continue
        with pytest.raises(TargetMatchesNothing, match="blocks"):
            find_blocks(model, pattern)


def test_a_subclass_is_found_by_its_base() -> None:
    class Special(Block):
        pass

    model = Stack(lambda i: Special() if i else Block())
    assert list(find_blocks(model, Block)) == ["blocks.0", "blocks.1"]
    assert list(find_blocks(model, Special)) == ["blocks.1"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpoint_wrapper(when: str) -> None:
    """A wrapper around each block: its forward checkpoints, the block inside is rewritten."""
    model, eager = stack(), stack()
    if when == "after":
        fxopt.optimize(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    if when == "before":
        wrapped = [f"blocks.{i}._checkpoint_wrapped_module" for i in range(2)]
        assert list(find_blocks(model, None)) == wrapped
        fxopt.optimize(model)
    reference = copy.deepcopy(eager)
    for i, block in enumerate(reference.blocks):
        reference.blocks[i] = checkpoint_wrapper(block)
    assert_like_eager(model, reference)
    assert fxopt.report(model).count("gated_activation") == 2
    assert not reasons(model)


def test_compiled_wrapper() -> None:
    model = Stack()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert list(find_blocks(model, None)) == ["blocks.0._orig_mod", "blocks.1"]


def test_shared_block_is_rewritten_once() -> None:
    class Repeating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()] * 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Repeating()
    eager = copy.deepcopy(model)
    assert list(find_blocks(model, None)) == ["blocks.0"]
    fxopt.optimize(model)
    # 1e-4: fp32 rounding through three blocks.
    torch.testing.assert_close(model(tokens()), eager(tokens()), rtol=1e-4, atol=1e-4)


def test_import_brings_no_model_packages() -> None:
    code = (
        "import sys, fxopt; fxopt.optimize, fxopt.swap; "
        "print(sorted({'diffusers', 'transformers', 'torchao', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
