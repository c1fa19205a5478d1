"""The cases that fxopt brings: which ones a command line means, and that they compute the same."""

from pathlib import Path

import pytest
import torch

from fxopt.cli import main
from fxopt.diagnose import numerics, record
from fxopt.diagnose.case import Case, Run, Settings
from fxopt.diagnose.devices import this_device
from fxopt.diagnose.kernel_suite import KERNELS, kernel_cases
from fxopt.diagnose.protocol import Plan
from fxopt.diagnose.record import Claim
from fxopt.diagnose.suites import Sweep, envelope
from fxopt.errors import UnknownOption, UnknownPreset, UnknownRecipe
from fxopt.recipes import RECIPES
from tests.diagnose.launch import fxopt
from tests.diagnose.small_block import cases

CPU = torch.device("cpu")


def passes(case: Case, when: str = "before") -> numerics.Check:
    found = numerics.check(when, case.baseline(), case.candidate(), case.truth, seed=0)
    assert not found.failures
    return found


@pytest.mark.parametrize("door", ["swap", "optimize"])
@pytest.mark.parametrize("ac", ["none", "selective", "full"])
def test_a_block_through_a_door_is_as_accurate(small, door, ac):
    (case,) = cases("small-block", door=[door], ac=[ac], batch=[2])
    for when in ("before", "after"):
        found = passes(case, when)
    assert found.against == "float64"
    assert found.num_outputs == 2
    # Ten parameters with bias or scale, three inputs.
    assert found.num_gradients > 10


def test_the_manifest_is_what_the_door_did(small):
    (case,) = cases("small", door=["swap"], in_float64=False)
    plan = Plan(max_rounds=6, min_warmup=0, min_seconds=0)
    claim = Run(case, this_device("cpu"), Settings(plan))()
    assert claim.status == "complete", claim.stop
    rules = {applied["rule"] for applied in claim.manifest["applied"]}
    assert {"norm_modulate", "qk_norm_rope", "gated_activation"} <= rules
    # The products of the rewritten block are those of the block.
    assert claim.speed.flops["candidate"] == claim.speed.flops["baseline"]
    assert claim.speed.flops["baseline"]["float32"] > 0
    assert claim.memory["candidate"].saved < claim.memory["baseline"].saved


def test_a_sweep_is_a_product(small):
    found = cases("small", door=["swap", "optimize"], batch=[1, 2, 3])
    assert len(found) == len({case.name for case in found}) == 6
    assert found[0].configuration == {
        **{"recipe": "bf16", "ac": "none", "door": "swap", "dtype": "float32"},
        **{"batch": 1, "tokens": 8},
    }


def test_the_compiled_door_is_compared_with_plain_compile(small):
    (case,) = cases("small", door=["compile"])
    assert case.baseline().name == "small-single through torch.compile"
    assert case.truth().name == "small-single as it is"


@pytest.mark.parametrize(
    ("name", "sweep", "error", "known"),
    [
        ("flux-def", {}, UnknownPreset, "flux-dev"),
        ("flux-dev-triple", {}, UnknownPreset, "flux-dev-double"),
        ("flux-dev", {"door": ["window"]}, UnknownOption, "optimize"),
        ("flux-dev", {"ac": ["half"]}, UnknownOption, "selective"),
        ("flux-dev", {"recipe": ["bf61"]}, UnknownRecipe, "bf16"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(name, sweep, error, known):
    with pytest.raises(error, match=known):
        cases(name, **sweep)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_is_as_accurate_as_the_eager_ops(name, dtype):
    (case,) = kernel_cases(name, Sweep(tokens=[16], batch=[2], dtype=dtype), CPU, 0, True)
    assert case.flush
    assert passes(case).num_gradients >= 2


def test_a_kernel_that_is_none_is_refused():
    with pytest.raises(UnknownOption, match="norm_modulate"):
        list(kernel_cases("softmax", Sweep(), CPU, 0, True))


def bench(*options: str) -> tuple[int, list[Claim]]:
    """Exit code and claims of `fxopt bench preset small-block`."""
    out = Path("claim.json")
    short = "--seconds", "0.5", "--device", "cpu", "--out", str(out)
    code = main(["bench", "preset", "small-block", *short, *options])
    return code, list(record.read(out).claims)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            ["--door", "swap", "optimize", "--tokens", "8", "--dtype", "float32"],
            ["tokens=8 door=swap", "tokens=8 door=optimize"],
        ),
        (
            ["--height", "64", "--width", "32", "--batch", "2", "--ac", "selective", "full"],
            [f"batch=2 height=64 width=32 ac={ac}" for ac in ("selective", "full")],
        ),
        (
            ["--recipe", "fp8", "mxfp8", "nvfp4", "--tokens", "64"],
            [f"tokens=64 recipe={recipe}" for recipe in ("fp8", "mxfp8", "nvfp4")],
        ),
    ],
)
def test_a_swept_preset_from_the_command_line(small, tmp_path, monkeypatch, options, names):
    monkeypatch.chdir(tmp_path)
    code, claims = bench(*options)
    assert code in (0, 1, 3)  # small blocks may be slower; what is wrong is INVALID
    for claim, name in zip(claims, names, strict=True):
        assert set(name.split()) <= set(claim.name.split())
        assert claim.status == "complete", claim.stop
        assert claim.verdict.label != "INVALID", claim.verdict.reasons
        assert claim.manifest["applied"]
        assert claim.speed.utilization["candidate"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_compiled_door_from_the_command_line(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, claims = bench("--door", "compile", "--tokens", "64", "--recipe", "bf16", "fp8")
    for claim in claims:
        assert claim.status == "complete", claim.stop
        assert claim.verdict.label != "INVALID", claim.verdict.reasons
        assert claim.samples.num_recompiles == 0
    quantized = [
        any(applied["rule"] == "quantized_linear" for applied in claim.manifest["applied"])
        for claim in claims
    ]
    assert quantized == [False, True]


@pytest.mark.slow
def test_two_processes_share_a_kernel_case(tmp_path):
    options = "--only", "gated_activation", "--tokens", "16", "--seconds", "1"
    done = fxopt(tmp_path, "bench", "kernels", *options, "--world-size", "2")
    made = record.read(tmp_path / "claim.json")
    assert made.environment["world_size"] == 2
    assert made.claims[0].status == "complete", done.stderr
    assert done.returncode in (0, 1, 3)


def test_envelopes_of_recipes():
    assert envelope(RECIPES["bf16"]) is None
    assert envelope(RECIPES["fp8"]) == envelope(RECIPES["mxfp8"]) == 0.06
    # A gradient of zeros is off by 1.
    assert numerics.OF_GRADIENTS * envelope(RECIPES["nvfp4"]) < 1
