"""Every family through every door on a CUDA device, in bf16, judged as on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fxopt
from fxopt.backends.dynamo import backend
from tests.families import FAMILIES, built
from tests.numerics import Judge

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def compiled(model: nn.Module) -> nn.Module:
    """By the function: its name is found where fxopt is installed, not in a tree of its source."""
    torch._dynamo.reset()
    model.compile(backend=backend)
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    return fxopt.optimize(model, execution="compile")


EAGER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "optimize": fxopt.optimize,
    "swap": fxopt.swap,
}
COMPILED = {"compile": compiled, "blocks": compiled_blocks}
# Inductor takes half a minute for each.
CASES = [
    *((name, door) for name in FAMILIES for door in EAGER),
    *((name, door) for name in ("flux", "wan", "llama-eager") for door in COMPILED),
]


@pytest.mark.parametrize(("name", "door"), CASES)
def test_family(name: str, door: str) -> None:
    family = FAMILIES[name]
    model = built(family).to(DEVICE, torch.bfloat16)
    inputs = tree_map_only(Tensor, lambda t: t.to(DEVICE), family.inputs(2, 0, torch.bfloat16))
    judge = Judge(model, inputs)
    opened = (EAGER | COMPILED)[door](model)
    judge(opened, f"{name} through {door}")
    report = fxopt.report(opened)
    assert report.count("norm_modulate") and report.count("qk_norm_rope")
    providers = {a.provider for a in report.applied}
    assert door in COMPILED or "triton" in providers, providers
