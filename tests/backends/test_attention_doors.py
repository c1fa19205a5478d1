"""A recipe's `attention` in every door: what is asked for by name runs, or is refused aloud."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import fxopt
from fxopt.backends import dynamo
from fxopt.kernels.attention import TABLE, Row, attention
from fxopt.passes import ir
from fxopt.recipe_errors import AttentionRefused, MathInGraph
from fxopt.recipes import Recipe
from tests.backends.attention_doors import (
    DOORS,
    UNCOMPILED,
    Door,
    asking,
    compiled,
    kernels,
    lines,
    optimized,
    small,
)
from tests.backends.toys import stack, tokens
from tests.families import FAMILIES, loss
from tests.numerics import Judge

NOT_MEASURED = "attention: PyTorch's own choice; nothing has been measured on cpu"
pytestmark = pytest.mark.usefixtures("fresh")


@cache
def judge() -> Judge:
    family = FAMILIES["flux"]
    return Judge(family.build(), family.inputs(2, 0, torch.float32))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_flux_runs_on_the_backend_that_is_named(door: Door, backend: str) -> None:
    model = FAMILIES["flux"].build()
    door(model, asking(backend))
    judge()(model, f"{door.__name__} on {backend}")
    assert kernels(lambda: loss(model, judge().inputs)) == {backend: 4}
    assert set(lines(model)) == {f"attention: {backend}; as the recipe says"}


@pytest.mark.parametrize("door", UNCOMPILED)
def test_a_checkpoint_recomputes_on_the_same_backend(door: Door) -> None:
    model = FAMILIES["flux"].build()
    model.enable_gradient_checkpointing()
    door(model, asking("math"))
    loss(model, judge().inputs).backward()
    assert kernels(lambda: loss(model, judge().inputs).backward()) == {"math": 8}


@pytest.mark.parametrize("door", DOORS)
def test_in_bfloat16(door: Door) -> None:
    family = FAMILIES["flux"]
    inputs = family.inputs(2, 0, torch.bfloat16)
    bfloat16 = Judge(family.build().to(torch.bfloat16), inputs)
    model = family.build().to(torch.bfloat16)
    door(model, asking("math"))
    bfloat16(model, door.__name__)
    assert kernels(lambda: loss(model, inputs)) == {"math": 4}


def test_a_compiler_traces_through_the_choice() -> None:
    model = stack()
    model.compile(backend="fxopt", options={"recipe": asking("math"), "inner": "aot_eager"})
    assert_runs_without(model, "flash", SDPBackend.FLASH_ATTENTION)


def test_blocks_that_are_compiled_in_place() -> None:
    model = fxopt.optimize(stack(), recipe=asking("flash"), execution="compile")
    assert_runs_without(model, "math", SDPBackend.MATH)
    assert set(lines(model)) == {"attention: flash; as the recipe says"}


def assert_runs_without(model: nn.Module, other: str, outside: SDPBackend) -> None:
    """Whatever scope the compiler finds around the call."""
    with sdpa_kernel(outside):
        expected, found = stack()(tokens()), model(tokens())
    # fp32 in another order, through four products in a row.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(tokens())
    flash = any("flash_attention_for_cpu" in e.key for e in seen.key_averages())
    assert flash == (other == "math")


def test_inductor_would_undo_math() -> None:
    with pytest.raises(MathInGraph, match="Inductor recognizes it"):
        fxopt.optimize(stack(), recipe=asking("math"), execution="compile")
    model = stack()
    model.compile(backend="fxopt", options={"recipe": asking("math")})
    with pytest.raises(Exception, match="Inductor recognizes it"):
        model(tokens())


@pytest.mark.parametrize("door", DOORS)
def test_a_refusal_is_an_error_and_not_another_backend(door: Door) -> None:
    _, run = small(door, asking("cudnn"))
    with pytest.raises(AttentionRefused) as caught:
        run()
    text = str(caught.value)
    assert "attention='cudnn' cannot run q [2, 2, " in text and "attention='auto'" in text
    assert "in float32 on cpu, no mask, with gradients: PyTorch has no CUDNN" in text


def test_a_refusal_ends_a_compilation() -> None:
    model = stack()
    model.compile(backend="fxopt", options={"recipe": asking("cudnn"), "inner": "aot_eager"})
    with pytest.raises(BackendCompilerFailed) as caught:
        model(tokens())
    assert isinstance(caught.value.inner_exception, AttentionRefused)


@pytest.mark.parametrize("door", DOORS)
def test_without_a_measurement_it_is_pytorchs_own_choice(door: Door) -> None:
    model, run = small(door, Recipe("bf16"))
    run()
    with sdpa_kernel(SDPBackend.MATH):
        assert set(kernels(run)) == {"math"}
    assert set(lines(model)) == {NOT_MEASURED}


class Mixer(nn.Module):
    """A block whose attention, if it is one, is no call that a backend could run."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x).cumsum(1))


@pytest.mark.parametrize("door", [optimized, compiled])
def test_a_backend_that_has_nothing_to_run_is_reported(door: Door) -> None:
    model = stack(Mixer)
    door(model, asking("math"))
    model(tokens())
    (line,) = set(lines(model))
    assert "it calls no scaled_dot_product_attention that 'math' could run" in line


def test_without_a_measurement_graphs_are_what_they_were() -> None:
    models = [fxopt.optimize(stack(), recipe=asking(a)) for a in ("auto", "pytorch", "flash")]
    codes = []
    for model in models:
        model(tokens())
        codes.append(model.blocks[0].forward.bounds[0].plan.gm.code)
    assert codes[0] == codes[1] and "fxopt.attention" not in codes[0]
    assert codes[2].count("fxopt.attention") == 1


@pytest.mark.parametrize("door", DOORS)
def test_a_measured_row_is_taken_and_reported(door: Door, monkeypatch) -> None:
    rows = [Row("math", 1.31, d, "none", False, False, 1, 64, torch.float32) for d in (16, 32)]
    monkeypatch.setitem(TABLE, "cpu", tuple(rows))
    model, run = small(door, Recipe("bf16"))
    run()
    assert set(kernels(run)) == {"math"}
    assert set(lines(model)) == {"attention: math; 1.31x PyTorch's own choice as measured on cpu"}


def test_a_graph_chooses_for_each_number_of_tokens(monkeypatch) -> None:
    row = Row("math", 1.31, 16, "none", False, False, 8, 15, torch.float32)
    monkeypatch.setitem(TABLE, "cpu", (row,))
    model = fxopt.optimize(stack())
    for num_tokens, backend in ((9, "math"), (16, "flash"), (8, "math")):
        x = torch.randn(2, num_tokens, 32)
        model(x)
        assert set(kernels(partial(model, x))) == {backend}
    (block,) = model.blocks[0].forward.captures.plans
    assert len(block.gm.graph.find_nodes(op="call_function", target=attention)) == 1


def test_a_row_that_is_refused_is_reported(monkeypatch) -> None:
    row = Row("efficient", 1.2, 16, "none", False, False, 1, 64, torch.float32)
    monkeypatch.setitem(TABLE, "cpu", (row,))
    model = fxopt.optimize(stack())
    model(tokens())
    (line,) = lines(model)
    assert line.startswith("attention: PyTorch's own choice; efficient is 1.2x")
    assert "but refuses: PyTorch has no EFFICIENT_ATTENTION for this call on cpu" in line


@pytest.mark.usefixtures("attention_backends")
def test_what_a_model_sets_itself_is_not_overridden() -> None:
    family = FAMILIES["flux"]
    inputs = family.inputs(2, 0, torch.float32)
    model = fxopt.swap(family.build(), recipe=asking("flash"))
    model.set_attention_backend("_native_math")
    with pytest.raises(AttentionRefused, match="the attention backend '_native_math'"):
        loss(model, inputs)
    model = fxopt.swap(family.build())
    model.set_attention_backend("_native_math")
    loss(model, inputs)
    assert kernels(lambda: loss(model, inputs)) == {"math": 4}
    assert set(lines(model)) == {
        "attention: PyTorch's own choice; with the attention backend '_native_math'"
    }


def test_swap_says_where_a_backend_is_not_reached() -> None:
    model = fxopt.swap(stack(), recipe=asking("flash"))
    model(tokens())
    why = "swap does not replace the forward of Block that calls it: 'flash' is not what runs"
    assert lines(model) == [f"attention: PyTorch's own choice; {why}"]
    plain = fxopt.swap(stack())
    plain(tokens())
    assert lines(plain) == []


def test_all_bodies_of_a_graph_are_rewritten() -> None:
    """With checkpoints, Dynamo's graph has its attentions in bodies."""
    targets: Counter[Any] = Counter()

    def backend(gm: Any, inputs: Any) -> Any:
        rewritten, _ = dynamo.rewritten_graph(gm, inputs, asking("math"))
        bodies = list(ir.graphs(rewritten))[1:]
        targets.update(node.target for body in bodies for node in body.graph.nodes)
        return rewritten.forward

    model = FAMILIES["flux"].build()
    model.enable_gradient_checkpointing()
    model.compile(backend=backend)
    loss(model, judge().inputs)
    assert targets[attention] == 4 and ir.SDPA not in targets
