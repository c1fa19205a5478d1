"""GEMMs that lose too much run in the model's dtype until they lose less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backends.demotion import Demotions, Hysteresis, shares
from fxopt.errors import NoTelemetry
from fxopt.kernels.counters import FIELDS
from fxopt.recipes import RECIPES
from tests.backends.test_telemetry import WGRAD, Loss, inputs, loss, opened, spiked
from tests.backends.toys import stack
from tests.numerics import relative_l2

PROJ_OUT = "single_transformer_blocks.1.proj_out"


def test_it_takes_several_samples_in_a_row_either_way() -> None:
    demotions, seen = Demotions(Hysteresis(0.5, 0.1, 2), 1), []
    # Above once, then twice; below once, then twice with one between that was not measured.
    for lost in (0.6, 0.4, 0.6, 0.6, 0.3, 0.05, 0.3, 0.05, torch.nan, 0.05, 0.05):
        demotions.decide(torch.tensor([[0.0, lost, torch.nan]]))
        seen.append(demotions.of([0]))
    assert seen == [*[set()] * 3, *[{"dgrad"}] * 6, set(), set()]


def test_the_worse_operand_of_each_gemm_counts() -> None:
    sums = torch.zeros(2, 3, 2, 5, dtype=torch.int64)
    sums[..., FIELDS.index("nonzero")] = 100
    sums[0, 1, 0, FIELDS.index("underflowed")] = 30  # weight, for fprop
    sums[0, 0, 1, FIELDS.index("saturated")] = 20  # x, for wgrad
    sums[0, 2, 0, FIELDS.index("underflowed")] = 10  # gradient, for dgrad
    sums[1, :, :, FIELDS.index("nonzero")] = 0
    expected = torch.tensor([[0.3, 0.1, 0.2], [torch.nan] * 3], dtype=torch.float64)
    assert torch.equal(shares(sums).nan_to_num(-1), expected.nan_to_num(-1))


def weight_gradient(model: nn.Module, of: Loss) -> Tensor:
    model.zero_grad()
    of(model, inputs()).backward()
    weight = dict(model.named_parameters())[f"{PROJ_OUT}.weight"]
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_a_demoted_gemm_is_that_of_the_models_dtype(door: str) -> None:
    plain, model = opened(door, "bf16"), opened(door, WGRAD)
    expected = {of: weight_gradient(plain, of).double() for of in (spiked, loss)}
    settings = {"every": 2, "demote_above": 0.5, "promote_below": 0.1, "patience": 1}
    exact, demoted = [], []
    with fxopt.telemetry(model, **settings) as telemetry:
        for of in (*[spiked] * 6, *[loss] * 6):
            telemetry.batch()
            error = relative_l2(weight_gradient(model, of), expected[of])
            assert error < 1e-6 or error > 1e-3  # fp32 sums in another order, or e4m3's four bits
            exact.append(error < 1e-6)
            demoted.append((PROJ_OUT, "wgrad") in telemetry.report().demoted)
    # Every other batch is a sample, and what it shows is known when the next but one begins.
    assert demoted == [*[False] * 4, *[True] * 6, *[False] * 2]
    # A sample runs as the recipe says, or nothing could be measured.
    assert exact == [d and i % 2 == 1 for i, d in enumerate(demoted)]


def test_bounds_that_make_no_sense() -> None:
    model = opened("swap")
    for settings, words in (
        ({"demote_above": 0.1, "promote_below": 0.2}, "promote_below"),
        ({"demote_above": 1.5}, "demote_above is 1.5"),
        ({"demote_above": 0.5, "patience": 0}, "patience is 0"),
        ({"demote_above": 0.5, "every": 1}, "every is 1"),
    ):
        with pytest.raises(NoTelemetry, match=words), fxopt.telemetry(model, **settings):
            pass


def test_what_is_gathered_as_codes_is_not_demoted() -> None:
    model = fxopt.optimize(stack(), recipe=replace(RECIPES["fp8"], all_gather="fp8"))
    with pytest.raises(NoTelemetry, match="all_gather"), fxopt.telemetry(model, demote_above=0.5):
        pass
    with fxopt.telemetry(model):
        pass
