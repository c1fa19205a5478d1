"""Regions with writes stay as they are, and the rule that would have replaced them says so."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.rewriting import Written, normal, rewrite

D = 16


def silu(m, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return F.silu(x * 1.0, inplace=True) * y


def gate(m, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return F.silu(x).mul_(y)


def modulation(m, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return F.layer_norm(x, (D,)).mul_(1 + s).add(s)


def residual(m, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return F.layer_norm((x * 1.0).add_(y * s), (D,))


def epsilon(m, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).add_(1e-6).rsqrt()


CASES = {
    silu: ("gated_activation", "aten.silu_.default writes in place"),
    gate: ("gated_activation", "aten.mul_.Tensor writes in place"),
    modulation: ("norm_modulate", "aten.mul_.Tensor writes in place"),
    residual: ("norm_modulate", "aten.add_.Tensor writes in place"),
    epsilon: ("rms_norm", "mean is written in place by add_"),
}


def inputs() -> list[Tensor]:
    return [normal(2, 5, D), normal(2, 5, D, seed=1), normal(2, 1, D, seed=2)]


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_a_write_is_the_reason(forward: Callable[..., Tensor]):
    rule, reason = CASES[forward]
    found = rewrite(Written(forward), *inputs())
    assert not found.count(rule), found.code()
    assert reason in found.reasons(rule)
    found.assert_as_accurate(*inputs())


def test_a_write_elsewhere_is_no_reason():
    def forward(m, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x, (D,)) * (1 + s) + s, (y * 2.0).add_(1.0)

    found = rewrite(Written(forward), *inputs())
    assert found.count("norm_modulate") == 1
    assert not found.plan.outcome.declined


def test_what_is_not_the_idiom_without_the_write_is_not_told():
    def forward(m, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return torch.relu(x).mul_(y)

    assert not rewrite(Written(forward), *inputs()).plan.outcome.declined
