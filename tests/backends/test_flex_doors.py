"""attention="flex" in every door, on PyTorch's reference of it; a CPU is refused its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends import compiled_graphs
from fxopt.kernels import flex
from fxopt.recipe_errors import AttentionRefused
from fxopt.recipes import Recipe
from tests.families import FAMILIES, loss, seeded
from tests.kernels.uncompiled_flex import on_cpu
from tests.numerics import Judge

FLEX = Recipe("mine", attention="flex")
Door = Callable[[nn.Module], Any]


def optimized(model: nn.Module) -> None:
    fxopt.optimize(model, recipe=FLEX)


def swapped(model: nn.Module) -> None:
    fxopt.swap(model, recipe=FLEX)


def compiled(model: nn.Module) -> None:
    model.compile(backend="fxopt", options={"recipe": FLEX, "inner": "aot_eager"})


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    compiled_graphs.GRAPHS.clear()


@pytest.fixture
def calls() -> Iterator[list[Any]]:
    with on_cpu() as ran:
        yield ran


@pytest.mark.parametrize("door", [optimized, swapped, compiled])
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_models_are_as_accurate(door: Door, name: str, calls: list[Any]) -> None:
    """FLUX has no mask, and Qwen-Image one of padding."""
    family, inputs = FAMILIES[name], FAMILIES[name].inputs(2, 0, torch.float32)
    judge, model = Judge(family.build(), inputs), family.build()
    door(model)
    judge(model, door.__name__)
    assert {a.backend for a in fxopt.report(model).attentions} == {"flex"}
    assert calls or door is compiled


@pytest.mark.parametrize("door", [optimized, swapped])
def test_checkpoints_recompute_on_it(door: Door, calls: list[Any]) -> None:
    family, inputs = FAMILIES["flux"], FAMILIES["flux"].inputs(2, 0, torch.float32)
    model = family.build()
    model.enable_gradient_checkpointing()
    door(model)
    loss(model, inputs)
    calls.clear()
    loss(model, inputs).backward()
    assert calls == [None] * 8


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, attn_implementation="sdpa"))


SEGMENTS = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)


@pytest.mark.parametrize("name, sides", [("window", (7, 0)), ("packed", None)])
def test_what_a_compiled_model_makes_of_positions(name: str, sides: Any, monkeypatch) -> None:
    """A window is told; samples that are packed, by positions that come in, are a mask."""
    told: list[Any] = []
    own = flex._flex
    monkeypatch.setattr(flex, "_flex", lambda *args: told.append(args[3:5]) or own(*args))
    ids = torch.arange(48).view(2, 24)
    inputs = {"input_ids": ids, "use_cache": False, "return_dict": False}
    if name == "packed":
        inputs["position_ids"] = SEGMENTS
    with on_cpu():
        model = seeded(mistral)()
        judge = Judge(model, inputs)
        compiled(model)
        judge(model, name)
    for mask, found in told:
        assert found == sides and (mask is None) == (sides is not None)


@pytest.mark.parametrize("door", [optimized, swapped])
def test_gradients_on_a_cpu_are_an_error(door: Door) -> None:
    family, inputs = FAMILIES["flux"], FAMILIES["flux"].inputs(2, 0, torch.float32)
    model = family.build()
    door(model)
    with pytest.raises(AttentionRefused, match="does not support backward on CPU"):
        loss(model, inputs)
