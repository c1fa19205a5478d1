"""Every family through every door on a CUDA device, in bf16, judged as on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fxopt
from fxopt.backends.dynamo import backend
from tests.families import FAMILIES, built
from tests.numerics import Draw, assert_as_accurate, redrawn, run, truth

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Door = Callable[[nn.Module], object]


def compiled(model: nn.Module) -> None:
    """By the function: its name is known where fxopt is installed, not in a tree of its source."""
    model.compile(backend=backend)


def compiled_blocks(model: nn.Module) -> None:
    fxopt.optimize(model, execution="compile")


EAGER: dict[str, Door] = {"optimize": fxopt.optimize, "swap": fxopt.swap}
COMPILED: dict[str, Door] = {"compile": compiled, "blocks": compiled_blocks}
# Inductor takes half a minute for each.
CASES = [
    *((name, door) for name in FAMILIES for door in EAGER),
    *((name, door) for name in ("flux", "wan", "llama-eager") for door in COMPILED),
]


@pytest.mark.parametrize(("name", "door"), CASES)
def test_family(name: str, door: str) -> None:
    torch._dynamo.reset()
    family = FAMILIES[name]
    eager = built(family).to(DEVICE, torch.bfloat16)
    before, model = copy.deepcopy(eager), copy.deepcopy(eager)
    if door in COMPILED:
        before.compile()  # what the door starts from; Inductor rounds otherwise than eager
    (EAGER | COMPILED)[door](model)
    first = tree_map_only(Tensor, lambda t: t.to(DEVICE), family.inputs(2, 0, torch.bfloat16))

    def draw(number: int) -> Draw:
        inputs = redrawn(first, number) if number else first
        return run(model, inputs), run(before, inputs), truth(eager, inputs)

    assert_as_accurate(*draw(0), what=f"{name} through {door}", again=draw)
    report = fxopt.report(model)
    assert report.count("norm_modulate") and report.count("qk_norm_rope")
    if door in EAGER:
        assert "triton" in {a.provider for a in report.applied}
