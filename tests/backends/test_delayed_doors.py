"""Delayed scaling through the doors: who meets the same batch again scales as by itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import recipe_errors
from fxopt.kernels import delayed
from fxopt.recipe_errors import Saturated
from fxopt.recipes import RECIPES, Recipe
from tests.backends import toys
from tests.backends.doors import doors
from tests.families import FAMILIES, Inputs
from tests.numerics import run

# Weights and batches change at once here.
pytestmark = pytest.mark.filterwarnings("ignore::fxopt.recipe_errors.Saturated")
FP8 = RECIPES["fp8"]
DELAYED = replace(FP8, name="delayed", history=2)


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    """How rare warnings have become is no matter of another test."""
    with delayed.apart():
        yield


@pytest.fixture(scope="module")
def flux() -> tuple[nn.Module, Inputs]:
    family = FAMILIES["flux"]
    return family.build().to(torch.bfloat16), family.inputs(2, 0, torch.bfloat16)


def step_of(model: nn.Module, inputs: Inputs, step: int) -> dict[str, Tensor | None]:
    with fxopt.at_step(step):
        return run(model, inputs)


def differences(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> list[str]:
    return [n for n, x in a.items() if (x is None) != (b[n] is None) or not _same(x, b[n])]


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y or (x is not None and y is not None and torch.equal(x, y))


@doors
def test_scales_are_those_of_the_steps_before(
    door: Callable[..., nn.Module], flux: tuple[nn.Module, Inputs]
) -> None:
    plain, inputs = flux
    model = copy.deepcopy(plain)
    keys = list(model.state_dict())
    model = door(model, recipe=DELAYED)
    by_itself = door(copy.deepcopy(plain), recipe=FP8)
    current = run(by_itself, inputs)
    for step in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error", Saturated)
            assert not differences(step_of(model, inputs, step), current), step
    assert list(model.state_dict()) == keys
    # Every weight doubled, the scales are still those of before.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "blocks" in name and parameter.dim() == 2 and "norm" not in name:
                parameter.mul_(2)
    by_itself.load_state_dict(model.state_dict())
    current = run(by_itself, inputs)
    assert len(differences(step_of(model, inputs, 3), current)) > len(current) / 2
    step_of(model, inputs, 4)
    with pytest.warns(Saturated, match="operands had values larger than the largest of the 2"):
        step_of(model, inputs, 5)
    # A model that is loaded again begins with what its tensors are.
    again = copy.deepcopy(plain)
    again.load_state_dict(model.state_dict())
    assert not differences(step_of(door(again, recipe=DELAYED), inputs, 6), current)


@doors
def test_validation_between_steps_changes_nothing(
    door: Callable[..., nn.Module], flux: tuple[nn.Module, Inputs]
) -> None:
    plain, inputs = flux
    other = FAMILIES["flux"].inputs(2, 1, torch.bfloat16)
    found = []
    for validates in (False, True):
        model = door(copy.deepcopy(plain), recipe=DELAYED)
        for step, batch in enumerate((inputs, other, inputs)):
            if validates:
                with torch.no_grad(), fxopt.at_step(step):
                    model(**other)
            last = step_of(model, batch, step)
        found.append(last)
    assert not differences(*found)


def test_compilers_refuse_a_history(flux: tuple[nn.Module, Inputs]) -> None:
    plain, inputs = flux
    with pytest.raises(recipe_errors.HistoryInGraph, match="'delayed'"):
        fxopt.optimize(copy.deepcopy(plain), recipe=DELAYED, execution="compile")
    torch._dynamo.reset()
    compiled = torch.compile(toys.stack(), backend="fxopt", options={"recipe": DELAYED})
    with pytest.raises(Exception, match="in a compiled graph a step knows nothing"):
        compiled(toys.tokens())
    with pytest.raises(recipe_errors.StepNotTold, match="'delayed' has a history"):
        fxopt.swap(copy.deepcopy(plain), recipe=DELAYED)(**inputs)


def test_casts_of_frozen_weights_have_the_history_of_their_parameter() -> None:
    """As under adapters: the bits of a model that stores them in autocast's dtype."""
    x, found = toys.tokens(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = toys.stack(num_blocks=1)
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
            linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
        fxopt.optimize(model, recipe=DELAYED)
        trained = [p for p in model.parameters() if p.requires_grad]
        tensors = []
        with fxopt.telemetry(model, every=1) as telemetry:
            for step in range(4):
                telemetry.batch()
                with fxopt.at_step(step), torch.autocast("cpu", torch.bfloat16):
                    y = model(x * 1.5**step)
                    with torch.no_grad():
                        tensors.append(model(x))
                tensors += torch.autograd.grad(y.float().square().mean(), trained)
            assert telemetry.num_unnamed == 0
        found.append(tensors)
    assert all(map(torch.equal, *found))


def test_example_inputs_are_of_no_step() -> None:
    model = toys.stack()
    fxopt.optimize(model, recipe=DELAYED, example_inputs={"x": toys.tokens()})
    assert fxopt.report(model).count("quantized_linear") > 0


def test_explain_counts_a_step_that_knows_its_scales() -> None:
    inputs = {"x": toys.tokens(num_tokens=64)}
    current, later = (
        fxopt.explain(
            toys.stack(num_blocks=1), example_inputs=inputs, recipe=replace(r, profit="always")
        )
        for r in (FP8, DELAYED)
    )
    assert current.count("quantized_linear") == later.count("quantized_linear") > 0
    # Four bytes instead of six for an element of a gradient, six instead of eight of a weight: 0.84
    # of all.
    glue = [report.totals["glue_bytes_after"] for report in (later, current)]
    assert glue[0] < 0.9 * glue[1]


@doors
def test_explain_leaves_a_training_alone(door: Callable[..., nn.Module]) -> None:
    """Histories, the step, what telemetry counts, the doors' reports and every gradient."""
    x, recipe = toys.tokens(num_tokens=64), replace(DELAYED, profit="always")
    plain = toys.stack(num_blocks=1)
    expected = fxopt.explain(copy.deepcopy(plain), example_inputs={"x": x}, recipe=recipe)
    found = []
    for explains in (False, True):
        model = door(copy.deepcopy(plain), recipe=recipe)
        with delayed.apart(), fxopt.telemetry(model, every=2) as telemetry:
            tensors = []
            for step in range(4):
                telemetry.batch()
                with fxopt.at_step(step):
                    loss = model(x * 1.01**step).square().mean()
                    if explains and step == 2:
                        random = torch.get_rng_state()
                        report = fxopt.explain(model, example_inputs={"x": x}, recipe=recipe)
                        assert torch.equal(random, torch.get_rng_state())
                        assert report == expected
                    tensors += torch.autograd.grad(loss, list(model.parameters()))
            tensors += [h.past for h in delayed._histories]
            found.append((tensors, telemetry.report(), fxopt.report(model), delayed._step))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert found[0][1:] == found[1][1:]


def test_an_override_has_a_history_of_its_own(flux: tuple[nn.Module, Inputs]) -> None:
    plain, inputs = flux
    recipe = replace(FP8, name="mlp alone", overrides=(("role:mlp_in", DELAYED),))
    # Linears on one input that run under two recipes are two nodes here as well.
    apart = replace(FP8, overrides=(("role:mlp_in", replace(FP8, name="the same")),))
    model = fxopt.swap(copy.deepcopy(plain), recipe=recipe)
    current = run(fxopt.swap(copy.deepcopy(plain), recipe=apart), inputs)
    for step in range(2):
        assert not differences(step_of(model, inputs, step), current)
    weights = {id(line.weight()) for line in delayed._lines.values()}
    names = {name for name, p in model.named_parameters() if id(p) in weights}
    assert names and all("ff" in n or "proj_mlp" in n for n in names), names


def test_a_model_trains_as_under_current_scaling() -> None:
    # After 60 steps 0.06% apart, and 0.1% from fp32; the first loss is 2.4 times as large.
    assert trained(DELAYED) == pytest.approx(trained(FP8), rel=0.005)


def trained(recipe: Recipe) -> float:
    """Loss of a sequence model after some steps, from the same start on the same batches."""
    model = fxopt.optimize(toys.stack(num_blocks=1), recipe=recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(60):
        x = torch.randn(8, 16, toys.CHANNELS, generator=generator)
        with fxopt.at_step(step):
            loss = (model(x) - x.roll(1, -1).cumsum(1) / 4).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10
