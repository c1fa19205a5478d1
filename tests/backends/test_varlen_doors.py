"""attention="varlen" in every door: padded models run on packed keys.

PyTorch's kernel is emulated; without it, and under a mask of another kind, the call is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.recipe_errors import AttentionRefused
from fxopt.recipes import Recipe
from tests.backends.attention_doors import (
    UNCOMPILED,
    Door,
    asking,
    compiled,
    optimized,
    swapped,
)
from tests.backends.toys import captures
from tests.families import FAMILIES, Inputs, loss
from tests.kernels.emulated_varlen import Kernels, on_cpu
from tests.numerics import Judge, run

VARLEN = asking("varlen")
pytestmark = pytest.mark.usefixtures("fresh")


def traced(model: nn.Module, recipe: Recipe) -> None:
    compiled(model, recipe, "aot_eager")


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with on_cpu() as emulated:
        yield emulated


def padded(name: str, size: int = 0, dtype: torch.dtype = torch.float32, batch: int = 2) -> Inputs:
    """Inputs whose samples differ in length: by their mask, or, of Z-Image, by themselves."""
    inputs = FAMILIES[name].inputs(batch, size, dtype)
    if name == "z-image":
        longer: Tensor = inputs["cap_feats"][0].repeat(5, 1)
        inputs["cap_feats"] = [longer, *inputs["cap_feats"][1:]]
    return inputs


# Attentions of a forward; those of Z-Image's image refiners have no mask.
CALLS = {"qwen-image": 2, "z-image": 6}


@pytest.mark.parametrize(
    "door, name", [*itertools.product(UNCOMPILED, CALLS), (traced, "qwen-image")]
)
def test_padded_models_are_as_accurate(door: Door, name: str, kernels: Kernels) -> None:
    family, inputs = FAMILIES[name], padded(name)
    judge, model = Judge(family.build(), inputs), family.build()
    door(model, VARLEN)
    judge(model, door.__name__)
    kernels.calls.clear()
    loss(model, inputs).backward()
    assert kernels.calls == ["forward"] * CALLS[name] + ["backward"] * CALLS[name]
    found = {(a.backend, a.why) for a in fxopt.report(model).attentions}
    assert ("varlen", "as the recipe says") in found


@pytest.mark.parametrize("door, name", [(optimized, "qwen-image"), (swapped, "z-image")])
def test_in_bfloat16(door: Door, name: str, kernels: Kernels) -> None:
    inputs = padded(name, dtype=torch.bfloat16)
    judge = Judge(FAMILIES[name].build().to(torch.bfloat16), inputs)
    model = FAMILIES[name].build().to(torch.bfloat16)
    door(model, VARLEN)
    judge(model, door.__name__)
    assert "forward" in kernels.calls


def test_under_autocast(kernels: Kernels) -> None:
    inputs, model = padded("qwen-image"), FAMILIES["qwen-image"].build()
    optimized(model, VARLEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(model, inputs)
    total.backward()
    assert kernels.dtypes == {torch.bfloat16}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("door", UNCOMPILED)
def test_a_checkpoint_recomputes_on_packed_keys(door: Door, kernels: Kernels) -> None:
    inputs = padded("qwen-image")
    plain, model = FAMILIES["qwen-image"].build(), FAMILIES["qwen-image"].build()
    for each in (plain, model):
        door(each, VARLEN)
    model.enable_gradient_checkpointing()
    expected, found = run(plain, inputs), run(model, inputs)
    assert all(
        torch.equal(found[name], expected[name]) for name in found if found[name] is not None
    )
    kernels.calls.clear()
    loss(model, inputs).backward()
    assert kernels.calls == ["forward"] * 2 + ["forward", "backward"] * 2


@pytest.mark.parametrize("door", UNCOMPILED)
def test_other_lengths_need_no_other_graph(door: Door, kernels: Kernels) -> None:
    model = FAMILIES["qwen-image"].build()
    door(model, VARLEN)
    loss(model, padded("qwen-image"))
    kernels.calls.clear()
    for size, batch in ((3, 2), (5, 3)):
        loss(model, padded("qwen-image", size, batch=batch)).backward()
    assert kernels.calls == ["forward", "forward", "backward", "backward"] * 2
    if door is optimized:
        assert captures(model) == 1


@pytest.mark.parametrize("door", UNCOMPILED)
def test_without_the_kernel_it_is_an_error(door: Door) -> None:
    model = FAMILIES["qwen-image"].build()
    door(model, VARLEN)
    with pytest.raises(AttentionRefused) as caught:
        loss(model, padded("qwen-image"))
    text = str(caught.value)
    assert "padding mask [2, 1, 1, 25]" in text
    assert "PyTorch has no torch.nn.attention.varlen on cpu" in text


@pytest.mark.parametrize("door", UNCOMPILED)
def test_an_additive_mask_is_an_error(door: Door, kernels: Kernels) -> None:
    """LTX adds its padding to the scores."""
    model = FAMILIES["ltx"].build()
    door(model, VARLEN)
    with pytest.raises(AttentionRefused, match="the mask is added to the scores"):
        loss(model, FAMILIES["ltx"].inputs(2, 0, torch.float32))


@pytest.mark.parametrize("door", UNCOMPILED)
def test_language_models(door: Door, kernels: Kernels) -> None:
    """With a mask of padding alone, as of encoders; a causal one differs by query."""
    family = FAMILIES["qwen3-sdpa"]
    inputs = family.inputs(2, 0, torch.float32)
    length = inputs["input_ids"].shape[1]
    is_token = torch.arange(length) >= torch.tensor([[0], [7]])
    shared = is_token[:, None, None].expand(2, 1, length, length)
    judge = Judge(family.build(), inputs | {"attention_mask": shared})
    model = family.build()
    door(model, VARLEN)
    judge(model, door.__name__)
    assert "backward" in kernels.calls
    causal = family.build()
    door(causal, VARLEN)
    with pytest.raises(AttentionRefused, match="the mask may differ between queries or heads"):
        loss(causal, inputs | {"attention_mask": is_token.long()})
