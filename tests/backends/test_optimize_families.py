"""Every family through `optimize`: how often each rule fires, how accurate the result is, and that
other sizes need no other captures."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends.options import rules_for
from fxopt.recipes import RECIPES
from tests.backends.toys import reasons
from tests.families import FAMILIES, outputs
from tests.numerics import Judge, run

# Exact: a rule that fires once less is a pattern lost, once more a pattern found.
NAMES = (
    "attention",
    "rms_norm",
    "qk_norm_rope",
    "merge_qk",
    "norm_modulate",
    "gated_activation",
    "fuse_bias",
    "silu_linears",
    "merge_linears",
    "merge_streams",
)
COUNTS = {
    "flux": (0, 0, 8, 4, 16, 6, 16, 4, 16, 8),
    "flux2": (0, 0, 8, 4, 16, 6, 0, 0, 16, 8),
    "sd3.5": (0, 0, 14, 7, 30, 9, 29, 5, 30, 17),
    "qwen-image": (0, 0, 4, 2, 12, 4, 12, 2, 12, 8),
    "wan": (0, 0, 8, 4, 8, 2, 8, 0, 10, 0),
    "ltx": (0, 0, 8, 4, 8, 2, 8, 0, 8, 0),
    "z-image": (0, 4, 12, 6, 20, 6, 0, 0, 18, 0),
    "qwen3-eager": (2, 2, 4, 2, 2, 2, 0, 0, 6, 0),
    "qwen3-sdpa": (0, 2, 4, 2, 2, 2, 0, 0, 6, 0),
    "llama-eager": (2, 2, 4, 2, 2, 2, 0, 0, 6, 0),
    "llama-sdpa": (0, 2, 4, 2, 2, 2, 0, 0, 6, 0),
}
# Rules for patterns that none of the families has in its blocks.
ELSEWHERE = {"drop_mask", "join_slices", "linear_cross_entropy", "norm_modulate_segments"}


def test_the_table_is_complete() -> None:
    assert COUNTS.keys() == FAMILIES.keys()
    assert {*NAMES, *ELSEWHERE} == {rule.name for rule in rules_for(RECIPES["bf16"])}


def assert_counts(name: str, model: nn.Module) -> None:
    report = fxopt.report(model)
    counts = dict(zip(NAMES, COUNTS[name], strict=True))
    assert report.counts() == {rule: count for rule, count in counts.items() if count}
    assert not [d for d in report.declined if d.rule == "capture"]


class Captured:
    """A family in fp32 behind `optimize`, after a step."""

    def __init__(self, name: str) -> None:
        self.family = FAMILIES[name]
        self.model, inputs = self.family.build(), self.family.inputs(2, 0, torch.float32)
        self.judge = Judge(self.model, inputs)
        assert fxopt.optimize(self.model) is self.model
        self.found = run(self.model, inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def captured(request: pytest.FixtureRequest) -> Captured:
    return Captured(request.param)


def test_counts_and_accuracy(captured: Captured) -> None:
    name = captured.family.name
    assert_counts(name, captured.model)
    captured.judge(captured.model, name, captured.found)


def test_twenty_resolutions(captured: Captured) -> None:
    family, model, eager = captured.family, captured.model, captured.judge.own
    for size in range(20):
        inputs = family.inputs(1 + size % 3, size, torch.float32)
        for found, expected in zip(outputs(model, inputs), outputs(eager, inputs), strict=True):
            # 1e-4: fp32 rounding through a few blocks.
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # SD3.5 has three kinds of blocks of one class: each counts for itself.
    shared = {id(b.captures): b.captures for b in model._fxopt_doors[0].blocks}.values()
    kinds = Counter((id(s), *p.state.items()) for s in shared for p in s.plans)
    assert max(kinds.values()) <= 2, list(kinds.values())
    assert not reasons(model)


# In bf16 one of each kind of block is in the quick run.
SLOW = {"sd3.5", "qwen3-eager", "llama-eager", "llama-sdpa"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES]
)
def test_in_bfloat16(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.build().bfloat16(), family.inputs(2, 0, torch.bfloat16)
    judge = Judge(model, inputs)
    found = run(fxopt.optimize(model), inputs)
    assert_counts(name, model)
    judge(model, name, found)
