"""Every family through `optimize`: how often each rule fires, and how accurate the result is."""

import pytest
import torch

import fxopt
from fxopt.backends.options import rules_for
from fxopt.recipes import RECIPES
from tests.families import FAMILIES
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
# Rules for patterns that none of the families has.
ELSEWHERE = {"drop_mask", "join_slices", "linear_cross_entropy", "norm_modulate_segments"}


def test_the_table_is_complete() -> None:
    assert COUNTS.keys() == FAMILIES.keys()
    assert {*NAMES, *ELSEWHERE} == {rule.name for rule in rules_for(RECIPES["bf16"])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_counts_and_accuracy(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model, inputs = family.build().to(dtype), family.inputs(2, 0, dtype)
    judge = Judge(model, inputs)
    assert fxopt.optimize(model) is model
    ours = run(model, inputs)
    report = fxopt.report(model)
    counts = dict(zip(NAMES, COUNTS[name], strict=True))
    assert report.counts() == {rule: count for rule, count in counts.items() if count}
    assert not [d for d in report.declined if d.rule == "capture"]
    judge(model, name, ours)
