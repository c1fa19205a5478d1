"""Every family through `optimize`: how often each rule fires, and how accurate the result is."""

import pytest
import torch

import fxopt
from tests.families import FAMILIES
from tests.numerics import assert_as_accurate, run, truth

# Exact: a rule that fires once less is a pattern lost, once more a pattern found.
COUNTS = {
    "flux": dict(qk_norm_rope=8, norm_modulate=16, gated_activation=6, merge_linears=18),
    "flux2": dict(qk_norm_rope=8, norm_modulate=16, gated_activation=6, merge_linears=16),
    "sd3.5": dict(qk_norm_rope=14, norm_modulate=30, gated_activation=9, merge_linears=35),
    "qwen-image": dict(qk_norm_rope=4, norm_modulate=12, gated_activation=4, merge_linears=14),
    "wan": dict(qk_norm_rope=8, norm_modulate=8, gated_activation=2, merge_linears=10),
    "ltx": dict(qk_norm_rope=8, norm_modulate=8, gated_activation=2, merge_linears=8),
    "z-image": dict(
        rms_norm=4, qk_norm_rope=12, norm_modulate=20, gated_activation=6, merge_linears=18
    ),
    "qwen3-eager": dict(
        attention=2, rms_norm=2, qk_norm_rope=4, norm_modulate=2, gated_activation=2, merge_linears=6
    ),
    "qwen3-sdpa": dict(rms_norm=2, qk_norm_rope=4, norm_modulate=2, gated_activation=2, merge_linears=6),
    "llama-eager": dict(
        attention=2,
        rms_norm=2,
        qk_norm_rope=4,
        norm_modulate=2,
        gated_activation=2,
        merge_linears=6,
    ),
    "llama-sdpa": dict(
        rms_norm=2, qk_norm_rope=4, norm_modulate=2, gated_activation=2, merge_linears=6
    ),
}


def test_every_family_has_its_counts() -> None:
    assert COUNTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_counts_and_accuracy(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model, inputs = family.build().to(dtype), family.inputs(2, 0, dtype)
    exact, eager = truth(model, inputs), run(model, inputs)
    assert fxopt.optimize(model) is model
    ours = run(model, inputs)
    report = fxopt.report(model)
    assert report.counts() == COUNTS[name]
    assert not [d for d in report.declined if d.rule == "capture"]
    assert_as_accurate(ours, eager, exact, what=name)
