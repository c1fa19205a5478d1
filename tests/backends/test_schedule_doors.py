"""A schedule through the doors: a step's formats are those of its phases, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import recipe_errors
from fxopt.backends import eager, rewritten
from fxopt.kernels.in_force import high_precision
from fxopt.recipes import RECIPES, Phase, Recipe
from tests.backends import toys
from tests.backends.doors import DOORS, doors
from tests.families import FAMILIES, Inputs
from tests.numerics import run

CHANGE = 3
BASE = RECIPES["fp8_rowwise"]


def scheduled(*phases: Phase) -> Recipe:
    return replace(BASE, name="scheduled", schedule=phases)


def late(gemm: str) -> Recipe:
    """The model's dtype for one GEMM from a step on."""
    return scheduled(Phase(gemm, CHANGE))


@pytest.fixture(scope="module")
def flux() -> tuple[nn.Module, Inputs]:
    family = FAMILIES["flux"]
    return family.build().to(torch.bfloat16), family.inputs(2, 0, torch.bfloat16)


def results(model: nn.Module, inputs: Inputs, step: int) -> dict[str, Tensor | None]:
    with fxopt.at_step(step):
        return run(model, inputs)


def assert_same_bits(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> None:
    for what, x in a.items():
        y = b[what]
        assert x is y is None or torch.equal(x, y), what


@pytest.fixture(scope="module")
def unscheduled(flux: tuple[nn.Module, Inputs]) -> dict[Any, dict[str, Tensor | None]]:
    """By door what the recipe gives without a schedule."""
    model, inputs = flux
    return {d: run(d(copy.deepcopy(model), recipe=BASE), inputs) for d in DOORS.values()}


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every capture, first-call check and proof."""
    found: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return function(*args, **kwargs)

        return call

    places = [(rewritten, "captures"), (rewritten.trial, "compare"), (eager, "prove")]
    for module, name in places:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return found


# swap prepares fast; both share the ops, whose every GEMM tests/kernels/test_in_force.py changes.
@pytest.mark.parametrize(
    "door, gemm",
    [(fxopt.optimize, "fprop"), *((fxopt.swap, gemm) for gemm in ("fprop", "dgrad", "wgrad"))],
)
def test_a_phase_changes_one_gemm_and_captures_nothing(
    door: Any,
    gemm: str,
    flux: tuple[nn.Module, Inputs],
    unscheduled: dict[Any, dict[str, Tensor | None]],
    preparations: list[str],
) -> None:
    model, inputs = flux
    before = unscheduled[door]
    after = run(door(copy.deepcopy(model), recipe=replace(BASE, **{gemm: None})), inputs)
    other = "output 0" if gemm == "fprop" else "gradient of transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(before[other], after[other])
    model = door(copy.deepcopy(model), recipe=late(gemm))
    preparations.clear()
    assert_same_bits(results(model, inputs, 0), before)
    num_preparations = len(preparations)
    assert num_preparations > 0 or door is fxopt.swap
    for step, expected in ((CHANGE - 1, before), (CHANGE, after), (CHANGE + 9, after), (0, before)):
        assert_same_bits(results(model, inputs, step), expected)
    assert len(preparations) == num_preparations


@doors
def test_the_backward_does_as_its_forward_did(door: Any, flux: tuple[nn.Module, Inputs]) -> None:
    """Without checkpoints nothing asks for the step again."""
    model, inputs = flux
    model = door(copy.deepcopy(model), recipe=late("dgrad"))
    expected = results(model, inputs, 0)
    parameters = dict(model.named_parameters())
    with fxopt.at_step(0):
        loss = model(**inputs)[0].square().sum()
    with fxopt.at_step(CHANGE):
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    with fxopt.at_step(0):
        loss = model(**inputs)[0].square().sum()
        again = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert expected.keys() >= {"output 0"}
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, again, strict=True))


@doors
def test_checkpoints(door: Any, flux: tuple[nn.Module, Inputs]) -> None:
    model, inputs = flux
    model = door(copy.deepcopy(model), recipe=late("fprop"))
    plain = {step: results(model, inputs, step) for step in (0, CHANGE)}
    model.enable_gradient_checkpointing()
    for step, expected in plain.items():
        assert_same_bits(results(model, inputs, step), expected)
    with fxopt.at_step(0):
        first, second = (model(**inputs)[0].square().sum() for _ in range(2))
    # Step 1 has the same formats: the mistake is found at once, not at the change.
    with (
        fxopt.at_step(1),
        pytest.raises(recipe_errors.StepChanged, match=r"of step 0 .* in step 1"),
    ):
        first.backward()
    with pytest.raises(recipe_errors.StepNotTold):
        second.backward()


@doors
def test_a_step_that_was_not_told(door: Any) -> None:
    model, inputs = toys.stack(), {"x": toys.tokens()}
    door(model, recipe=late("fprop"))
    for _ in range(2):
        with pytest.raises(recipe_errors.StepNotTold, match="'scheduled' has a schedule"):
            model(**inputs)
    results(model, inputs, 0)
    assert not [d for d in fxopt.report(model).declined if d.rule in ("capture", "swap")]
    run(fxopt.restore(model), inputs)


def test_example_inputs_are_of_no_step() -> None:
    model = toys.stack()
    fxopt.optimize(model, recipe=late("fprop"), example_inputs={"x": toys.tokens()})
    assert fxopt.report(model).count("quantized_linear") > 0


def test_formats_that_come_late(
    flux: tuple[nn.Module, Inputs], unscheduled: dict[Any, dict[str, Tensor | None]]
) -> None:
    """A recipe that starts in the model's dtype prepares what its phases will want."""
    model, inputs = flux
    phases = tuple(Phase(name, CHANGE, None, gemm) for name, gemm in BASE.gemms)
    model = fxopt.optimize(copy.deepcopy(model), recipe=Recipe("late", schedule=phases))
    with high_precision():
        plain = run(model, inputs)
    assert_same_bits(results(model, inputs, 0), plain)
    assert_same_bits(results(model, inputs, CHANGE), unscheduled[fxopt.optimize])


@pytest.mark.parametrize("execution", ["compile", "backend"])
def test_compilers_refuse(execution: str) -> None:
    model, inputs = toys.stack(), {"x": toys.tokens()}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a compiled graph keeps the formats") as caught:
        if execution == "compile":
            fxopt.optimize(model, recipe=late("fprop"), execution="compile")
        else:
            options = {"recipe": late("fprop"), "inner": "eager"}
            torch.compile(model, backend="fxopt", options=options)(**inputs)
    errors = (caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None))
    assert any(isinstance(e, recipe_errors.ScheduleInGraph) for e in errors)
    assert all(m._compiled_call_impl is None for m in model.modules())


def test_explain_plans_what_holds_outside_of_phases() -> None:
    inputs = {"x": toys.tokens(num_tokens=64)}
    late_fprop, plain = (
        fxopt.explain(toys.stack(), example_inputs=inputs, recipe=recipe).to_dict()
        for recipe in (late("fprop"), BASE)
    )
    assert late_fprop | {"recipe": BASE.name} == plain
