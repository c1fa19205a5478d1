"""Lines of delayed scaling: whose they are, when they are made and when they go."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.gemms import GEMMS
from fxopt.kernels import counters, delayed
from fxopt.kernels.counters import FIELDS, Slot, Slots
from fxopt.kernels.in_force import decide, high_precision
from fxopt.kernels.origins import cast
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.recipe_errors import HistoryInGraph, NoHistory, Saturated, StepNotTold
from fxopt.recipes import Recipe
from fxopt.schedule import Phase
from tests.kernels.test_delayed import DELAYED, FP8, Case, Emulation, N, Node, draw, no_state, same
from tests.kernels.test_in_force import (
    linears,
    nodes,
)

__all__ = ["no_state"]


def test_the_weight_of_a_cast_is_found() -> None:
    """Autocast's casts: of one parameter while gradients are on, and by themselves without them."""
    case, recipe = Case(linears), DELAYED.key
    weight = case.weight.detach().to(torch.bfloat16)
    emulation = Emulation(N)
    for step in range(3):
        x, grad = (t.detach().to(torch.bfloat16) for t in case.at(step))
        emulation.past, past = defaultdict(list), emulation.past
        (current, *_) = emulation.run(x.float(), weight.float(), grad.float())
        emulation.past, emulation.seen = past, defaultdict(list)
        expected = emulation.run(x.float(), weight.float(), grad.float())
        emulation.advance()
        with fxopt.at_step(step):
            y = linears(x, case.weight.to(torch.bfloat16), recipe)
            y.backward(grad)
            with torch.no_grad():
                alone = linears(x, case.weight.to(torch.bfloat16), recipe)
        assert torch.equal(y, expected[0].view_as(y).bfloat16())
        assert torch.equal(case.weight.grad, expected[2].bfloat16().float())
        assert torch.equal(alone, current.view_as(y).bfloat16())
        case.weight.grad = None


def test_a_weight_that_is_made_anew_is_refused() -> None:
    x, weight = draw(2, 5, 48), nn.Parameter(draw(32, 48))
    with fxopt.at_step(0):
        for made in (weight * weight, weight.detach().clone()):
            with pytest.raises(NoHistory, match=r"a weight \[32, 48\] is neither"):
                linears(x.requires_grad_(), made, DELAYED.key)
            with torch.no_grad():
                linears(x, made, DELAYED.key)


def test_slices_of_a_parameter_have_lines_of_their_own() -> None:
    apart = [nn.Parameter(draw(32, 48)), nn.Parameter(draw(32, 48, seed=1) / 4096)]
    whole = nn.Parameter(torch.cat([weight.detach() for weight in apart]))
    for step in range(3):
        x = draw(2, 5, 48, seed=step)
        with fxopt.at_step(step):
            for part, weight in zip(whole.chunk(2), apart, strict=True):
                found = linears(x, part, DELAYED.key)
                assert torch.equal(found, linears(x, weight, DELAYED.key)), step
                found.sum().backward()


def test_so_do_casts_of_slices() -> None:
    whole = nn.Parameter(torch.cat([draw(32, 48), draw(32, 48, seed=1) / 4096]))
    for step in range(2):
        with fxopt.at_step(step):
            for part in whole.chunk(2):
                linears(draw(2, 5, 48).bfloat16(), cast(part, torch.bfloat16), DELAYED.key)
    assert len(delayed._lines) == 2


def test_weights_of_one_launch_scale_alike() -> None:
    """One of two weights begins at zero, as adapters do: until it is not, both are scaled by what
    they are."""
    weights = [nn.Parameter(draw(32, 48)), nn.Parameter(torch.zeros(16, 48))]
    x = draw(2, 5, 48)

    def run(recipe: Recipe, step: int) -> list[Tensor]:
        with fxopt.at_step(step):
            ys = quantized_linears(x, weights, [None, None], recipe.key, False)
            return [*ys, *torch.autograd.grad(ys, weights, [torch.ones_like(y) for y in ys])]

    for step in range(5):
        with torch.no_grad():
            weights[0].mul_(0.7)
            if step == 2:
                weights[1].copy_(draw(16, 48, seed=1))
        is_equal = torch.equal(run(DELAYED, step)[0], run(FP8, step)[0])
        assert is_equal == (step < 4), step


def test_kept_casts_are_of_the_scale_in_force() -> None:
    case, emulation = Case(linears), Emulation(N)
    with fxopt.cast_weights_once():
        for step in range(4):
            for batch in range(2):
                found = case.run(DELAYED, step, batch)
                assert same(found, case.expected(emulation, step, batch)), (step, batch)
            emulation.advance()
            if step == 0:  # a write that PyTorch counts
                with torch.no_grad():
                    case.weight.mul_(0.5)


def test_kept_casts_of_a_validation_record_nothing_and_do_not_stand_in_for_those_that_do() -> None:
    case, emulation = Case(linears), Emulation(N)
    for step in range(4):
        with fxopt.cast_weights_once():
            with torch.no_grad(), fxopt.at_step(step):
                linears(case.at(step)[0], case.weight, DELAYED.key)
            found, expected = case.run(DELAYED, step), case.expected(emulation, step)
            assert same(found, expected), step
        case.change_weight(step)
        emulation.advance()


@pytest.mark.parametrize("told", [0, 2, 10_000])
def test_a_validation_at_any_step_scales_by_the_training_and_leaves_it_as_it_is(told: int) -> None:
    """Before the training, between the micro-batches of a step, and behind it."""
    case, emulation = Case(linears), Emulation(N)

    def validate(step: int) -> Tensor:
        with torch.no_grad(), fxopt.at_step(told):
            return linears(case.at(step)[0], case.weight, DELAYED.key)

    validate(0)
    for step in range(2 * N):
        for batch in range(2):
            found = case.run(DELAYED, step, batch)
            assert same(found, case.expected(emulation, step, batch)), (step, batch)
            if step:  # in the first, own magnitudes scale
                beside = Emulation(N)
                beside.past = emulation.past
                assert torch.equal(validate(3), case.expected(beside, 3)[0]), step
        case.change_weight(step)
        emulation.advance()


def test_both_forwards_of_a_reentrant_checkpoint_scale_alike() -> None:
    case, emulation = Case(linears), Emulation(N)
    for step in range(N):
        x, grad = case.at(step)
        with fxopt.at_step(step):
            y = checkpoint(lambda x: linears(x, case.weight, DELAYED.key), x, use_reentrant=True)
            case.weight.grad = None
            y.backward(grad)
        assert same([y, x.grad, case.weight.grad], case.expected(emulation, step)), step
        emulation.advance()


@pytest.mark.parametrize("num_steps", [2, N, N + 1])
def test_behind_a_gap_a_line_scales_by_its_own_tensor(num_steps: int) -> None:
    """As behind a phase of a schedule in other formats, in which nothing was recorded: who knows
    how magnitudes grew. What is older than the history is then no past at all."""
    case, emulation = Case(linears), Emulation(N)
    back = 1 + num_steps
    phases = tuple(Phase(gemm, 2, back) for gemm in GEMMS)
    recipe = replace(DELAYED, schedule=phases)
    for step in range(back + 3):
        past = emulation.past
        if step == back:
            emulation.past = defaultdict(list)
        with torch.no_grad(), fxopt.at_step(step):  # a validation changes nothing
            linears(case.at(step)[0], case.weight, recipe.key)
        found = case.run(recipe, step)
        if not 1 < step < back:  # else in the model's dtype
            assert same(found, case.expected(emulation, step)), step
            if step != back or num_steps <= N:
                emulation.past = past
            emulation.advance()


def test_no_step_behind_a_gap_clips() -> None:
    """A layer that is dropped for a step, in which all gradients and inputs grew."""
    case = Case(linears)
    x, grad = case.at(0)
    for step, size in ((0, 1.0), (1, 1.0), (3, 100.0), (4, 100.0), (5, 100.0), (6, 100.0)):
        case.at = lambda *_, size=size: ((x.detach() * size).requires_grad_(), grad * size)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Saturated)
            found = case.run(DELAYED, step)
        if step == 3:
            assert same(found, case.run(FP8, step))


def test_telemetry_counts_beside_it() -> None:
    model = nn.Sequential(nn.Linear(48, 32, bias=False))
    case = Case(linears)
    case.weight = model[0].weight
    slots = [Slot(*torch.zeros(2, 8, dtype=torch.int64)) for _ in range(3)]

    class Recorder:
        def slots(self, weights: object) -> Slots:
            return Slots(slots[0], [slots[1]], [slots[2]])

        def demoted(self, weights: object) -> set[str]:
            return set()

    emulation = Emulation(N)
    counters.record_to(Recorder())
    try:
        for step in range(2):
            assert same(case.run(DELAYED, step), case.expected(emulation, step))
            emulation.advance()
    finally:
        counters.record_to(None)
    x, _ = case.at(1)  # four times as large as in the step before, and the gradient a fourth
    limit = case.at(0)[0].abs().max() * (1 + 1e-6)
    saturated = FIELDS.index("saturated")
    assert slots[0].rows[saturated] == (x.abs() > limit).sum() > 0
    assert slots[2].rows[saturated] == 0


def test_another_number_of_steps_has_lines_of_its_own() -> None:
    case = Case(linears)
    recipes = [replace(DELAYED, history=n) for n in (1, 2)]
    emulations = [Emulation(1), Emulation(2)]
    for step in range(4):
        for recipe, emulation in zip(recipes, emulations, strict=True):
            assert same(case.run(recipe, step), case.expected(emulation, step))
            emulation.advance()


def test_lines_die_with_their_weights() -> None:
    gc.collect()
    case = Case(linears)
    case.run(DELAYED, 0)
    weak = [weakref.ref(h) for h in delayed._histories]
    assert any(case.weight is w() for h in delayed._histories for w in h.weights)
    del case
    gc.collect()
    other = Case(linears)
    with fxopt.at_step(1):
        linears(*other.at(1)[:1], other.weight, DELAYED.key)
    gc.collect()
    assert all(history() is None for history in weak)
    # A new parameter has nothing of an old one's.
    assert same(other.run(DELAYED, 1), other.run(FP8, 1))


def test_more_linears_than_one_history_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delayed, "NUM_LINEARS", 2)
    cases, emulations = [Case(linears) for _ in range(5)], [Emulation(N) for _ in range(5)]
    for step in range(3):
        for case, emulation in zip(cases, emulations, strict=True):
            assert same(case.run(DELAYED, step), case.expected(emulation, step))
            emulation.advance()


def test_fake_tensors_have_lines_of_their_own() -> None:
    case, emulation = Case(linears), Emulation(N)
    for step in range(3):
        assert same(case.run(DELAYED, step), case.expected(emulation, step))
        emulation.advance()
        with FakeTensorMode(), fxopt.at_step(step):
            weight = nn.Parameter(torch.empty(32, 48))
            y = linears(torch.empty(2, 5, 48), weight, DELAYED.key)
            y.backward(torch.empty_like(y))
            assert weight.grad.shape == weight.shape


def test_a_run_repeats_its_bits() -> None:
    runs = []
    for _ in range(2):
        case = Case(linears)
        runs.append([t for step in range(4) for t in case.run(DELAYED, step)])
    assert same(*runs)


@nodes
def test_no_step_is_an_error(node: Node) -> None:
    case = Case(node)
    x, _ = case.at(0)
    with pytest.raises(StepNotTold, match="'delayed' has a history"):
        node(x, case.weight, DELAYED.key)
    with high_precision():
        node(x, case.weight, DELAYED.key)


def test_no_graph_has_a_history() -> None:
    case = Case(linears)
    with pytest.raises(HistoryInGraph, match="'delayed'"), fxopt.at_step(0):
        make_fx(lambda x: linears(x, case.weight.detach(), DELAYED.key))(case.at(0)[0].detach())


def test_lines_are_aligned_alike() -> None:
    """Triton compiles anew for pointers that are not."""
    cases = [Case(linears) for _ in range(3)]
    for step in range(2):
        for case in cases:
            case.run(DELAYED, step)
    with fxopt.at_step(1):
        found = [delayed.slots_for(decide(DELAYED.key, []), [case.weight]) for case in cases]
    slots = [slot for s in found for slot in (s.x, *s.weights, *s.gradients)]
    tensors = [t for slot in slots for t in (slot.known, slot.seen)]
    assert len({t.data_ptr() for t in tensors}) == 18
    assert all(t.shape == (1,) and t.storage_offset() % 4 == 0 for t in tensors)


def test_frozen_linears_have_lines() -> None:
    """Blocks before the first adapter: nothing of them needs a gradient."""
    case, emulation = Case(linears), Emulation(N)
    case.weight.requires_grad_(False)
    for step in range(3):
        x, _ = case.at(step)
        expected = case.expected(emulation, step)[0]
        emulation.advance()
        with fxopt.at_step(step):
            assert torch.equal(linears(x.detach(), case.weight, DELAYED.key), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    case, emulation = Case(linears), Emulation(N)
    weight = nn.Parameter(case.weight.detach().cuda())
    for step in range(5):
        x, grad = case.at(step)
        with fxopt.at_step(step):
            y = linears(x.detach().cuda(), weight, DELAYED.key)
            y.backward(grad.cuda())
        expected = case.expected(emulation, step)
        # Sums of 48 products in another order, and by Hopper's units in fewer bits.
        torch.testing.assert_close(y.cpu(), expected[0], rtol=1e-2, atol=1e-2)
        emulation.advance()
