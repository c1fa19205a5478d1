"""What counts as computing the same, and which cheats and mistakes do not."""

import math

import pytest
import torch
from torch import Tensor, nn

from fxopt.diagnose import numerics
from fxopt.diagnose.errors import NotAStep, StepsDiffer
from fxopt.diagnose.subjects import Subject, kept_state, refresh

WIDTH = 16


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def subject(change=lambda model, y: y, backward=True, dtype=torch.float32) -> Subject:
    """A training step; `change` may falsify the model or the output."""
    model = network().to(dtype)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        y = change(model, model(x))
        if backward:
            y.square().mean().backward()
        return y.detach()

    return Subject("step", step, model, {"x": x})


def failures(candidate: Subject, when: str = "before", baseline: Subject | None = None) -> str:
    found = numerics.check(when, baseline or subject(), candidate, None, seed=0)
    return "; ".join(found.failures)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("truth", [None, subject])
def test_a_step_passes_against_itself(when, truth):
    found = numerics.check(when, subject(), subject(), truth, seed=0)
    assert not found.failures
    assert (found.num_outputs, found.num_gradients) == (1, 4)
    assert found.against == ("float64" if truth else "baseline")


def test_zeros_fail():
    assert "output 0" in failures(subject(lambda model, y: y * 0))


def test_a_skipped_backward_fails():
    assert "gradient of 0.weight: the candidate leaves none" in failures(subject(backward=False))


def test_a_stored_result_fails_once_the_values_are_fresh():
    cache: list[Tensor] = []

    def stored(model: nn.Module, y: Tensor) -> Tensor:
        cache.append(y)
        return y + (cache[0] - y).detach()

    candidate = subject(stored)
    assert not failures(candidate)
    assert "output 0" in failures(candidate, "after")


def test_a_returned_buffer_is_spoiled_between_calls():
    model, cache = network(), []

    def step() -> Tensor:
        if not cache:
            cache.append(model(torch.ones(2, WIDTH)).detach())
        return cache[0]

    cheat = Subject("cheat", step)
    assert numerics.observe(cheat, 0)["output 0"].isfinite().all()
    assert numerics.observe(cheat, 0)["output 0"].isnan().all()


def test_the_parameters_that_a_step_returns_are_not_spoiled():
    model = network()
    numerics.observe(Subject("step", lambda: model[0].weight, model), 0)
    assert model[0].weight.isfinite().all()


def test_memory_that_was_not_written_fails():
    def unwritten(model: nn.Module, y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        out[:-1] = y[:-1].detach()
        return y + (out - y).detach()

    assert "output 0: relative error not finite" in failures(subject(unwritten))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "fault",
    [
        lambda gradient: -gradient,
        lambda gradient: 8 * gradient,
        lambda gradient: gradient.t(),
        lambda gradient: gradient * (1 + 1e-2),
        lambda gradient: gradient.roll(1, 0),
    ],
    ids=["sign", "scale of 8", "transposed", "1% more", "rolled"],
)
def test_a_wrong_gradient_fails_alone(fault):
    candidate = subject()
    candidate.model[2].weight.register_hook(fault)
    found = failures(candidate)
    assert found.startswith("gradient of 2.weight")
    assert ";" not in found


def test_a_gradient_that_is_only_rounding_does_not_fail():
    # The gradient of a key's bias is zero but for rounding, which depends on the order of sums.
    def with_noise(noise: float) -> Subject:
        model = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            model.weight.copy_(torch.eye(WIDTH))

        def step() -> Tensor:
            model.zero_grad()
            loss = model(torch.ones(2, WIDTH)).square().mean()
            loss.backward()
            model.bias.grad = torch.full_like(model.bias, noise) * model.weight.grad.abs().max()
            return loss.detach()

        torch.nn.init.zeros_(model.bias)
        return Subject("step", step, model)

    roundoff = torch.finfo(torch.float32).eps / 2
    assert not failures(with_noise(roundoff / 2), baseline=with_noise(-roundoff / 2))
    assert "bias" in failures(with_noise(1e-3), baseline=with_noise(-1e-3))


def test_against_float64_the_factor_is_two_of_the_baselines_error():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    baseline = exact.float()
    # fp64 noise of a tenth of fp32's roundoff makes an error that is not zero by luck.
    step = torch.finfo(torch.float32).eps * exact
    close, far = (exact + factor * step for factor in (0.3, 3.0))

    def severity(found: Tensor) -> float:
        return numerics.compare("output 0", baseline, found, exact, 1.0).severity

    assert severity(close) < 1 < severity(far)


def test_one_unlucky_draw_does_not_convict_but_a_mistake_does():
    def over(*errors: float) -> float:
        own, roundoff = 1e-7, 6e-8
        bound = numerics.FACTOR * own + roundoff
        draws = [numerics.Difference("output 0", e, bound, 1.0, 0.0, own) for e in errors]
        return numerics._pooled(draws).severity

    assert over(3e-7) > 1
    # The root mean square of the four is 1.7e-7.
    assert over(3e-7, 1e-7, 1e-7, 1e-7) < 1
    assert over(3e-7, 3e-7, 3e-7, 3e-7) > 1


def test_a_mistake_of_a_few_roundings_is_found_over_all_draws():
    off = subject(lambda model, y: y * (1 + 1e-6))
    found = numerics.check("before", subject(), off, subject, seed=0)
    assert "output 0" in found.failures[0]


def test_the_truth_has_the_rounded_values_of_the_baseline():
    # Refreshed bfloat16 parameters are rounded; a truth with unrounded ones would be another model,
    # and excuse any error of that size.
    def make() -> Subject:
        return subject(dtype=torch.bfloat16)

    off = subject(lambda model, y: y * (1 + 2**-5), dtype=torch.bfloat16)
    assert numerics.check("after", make(), off, make, seed=0).failures


def test_bias_is_signed_and_cosine_sees_direction():
    wanted = torch.ones(100)
    found = numerics.compare("output 0", wanted, wanted - 0.5, None, 1.0)
    assert (found.bias, found.cosine) == pytest.approx((-0.5, 1.0))
    assert numerics.compare("output 0", wanted, -wanted, None, 1.0).cosine == pytest.approx(-1)


def test_a_result_that_is_not_finite_is_recorded_as_none():
    found = numerics.compare("output 0", torch.ones(2), torch.tensor([1.0, math.nan]), None, 1.0)
    assert found.error is None
    assert found.severity == math.inf


def test_another_shape_is_named():
    with pytest.raises(StepsDiffer, match=r"output 0 is \[8, 16\] in the baseline, but \[8, 15\]"):
        failures(subject(lambda model, y: y[:, :-1]))


def test_another_parameter_is_named():
    other = subject()
    other.model.register_parameter("extra", nn.Parameter(torch.ones(1)))
    with pytest.raises(
        StepsDiffer, match="gradient of extra is absent in the baseline, but present"
    ):
        failures(other)


def test_a_step_that_returns_nothing_is_named():
    with pytest.raises(NotAStep, match="its step returned NoneType and left no gradient"):
        numerics.observe(Subject("nothing", lambda: None), 0)


def test_state_comes_back():
    candidate = subject()
    before = [t.detach().clone() for t in candidate.state()]
    with kept_state(candidate):
        refresh(candidate, 0)
        assert not any(torch.equal(a, b) for a, b in zip(before, candidate.state(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, candidate.state(), strict=True))


def test_two_refreshes_with_one_seed_agree():
    one, other = subject(), subject()
    refresh(one, 3)
    refresh(other, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.state(), other.state(), strict=True))


def test_bfloat16_is_judged_by_its_own_roundoff():
    assert not failures(subject(dtype=torch.bfloat16), baseline=subject(dtype=torch.bfloat16))
    off = subject(lambda model, y: y * 1.2, dtype=torch.bfloat16)
    assert "output 0" in failures(off, baseline=subject(dtype=torch.bfloat16))
