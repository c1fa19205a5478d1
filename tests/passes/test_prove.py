"""What execution accepts and what it does not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.passes import prove as prove_module
from fxopt.passes.prove import Runnable, Spec, prove
from tests.passes.rewriting import Written, rewrite

FP32, BF16 = torch.float32, torch.bfloat16
D = 8


def runnable(function: Callable, specs: list[Spec]) -> Runnable:
    inputs = [torch.ones(s.shape, dtype=s.dtype) for s in specs]
    gm = make_fx(lambda *x: (function(*x),), pre_dispatch=True)(*inputs)
    return Runnable(gm, gm.graph)


def verdict(region: Callable, replacement: Callable, *dtypes: torch.dtype) -> str | None:
    """The verdict over [2, 3, D] inputs of these dtypes that need gradients."""
    specs = [Spec((2, 3, D), dtype, needs_grad=True) for dtype in dtypes or (FP32,)]
    return prove(runnable(region, specs), runnable(replacement, specs), specs)


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def test_another_spelling_is_accepted():
    assert verdict(rms, lambda x: x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt()) is None


NEAR_MISSES = {
    "another eps": (rms, lambda x: rms(x, 2e-6)),
    "eps outside": (rms, lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)),
    "another dim": (lambda x: x.softmax(-1), lambda x: x.softmax(-2)),
    "a mean that is nearly zero": (lambda x: F.layer_norm(x, (D,), eps=1e-6), rms),
    "another sign where it is small": (lambda x: x.abs() + x, lambda x: 2 * x.relu() - 1e-5),
    "no gradient": (lambda x: x.sin(), lambda x: x.detach().sin()),
    "half of the gradient": (lambda x: x * x, lambda x: x * x.detach()),
    "overflow": (lambda x: x, lambda x: x * 1e200 / 1e200 * (x.exp() / x.exp())),
    "another shape": (lambda x: x, lambda x: x.transpose(0, 1)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_rejected(name: str):
    region, replacement = NEAR_MISSES[name]
    assert verdict(region, replacement)


def test_a_replacement_that_does_not_run_is_rejected_with_its_error():
    specs = [Spec((2, 3, D), FP32, needs_grad=True)]
    wrong = runnable(lambda x: x.view(7, 7), [Spec((7, 7), FP32, needs_grad=True)])
    found = prove(runnable(lambda x: x, specs), wrong, specs)
    assert found is not None and found.startswith("it does not run on a probe: RuntimeError")


def test_a_condition_per_token_takes_both_values():
    rows = Spec((2, 1, D), FP32, needs_grad=True)
    specs = [Spec((2, 5, 1), torch.bool, needs_grad=False), rows, rows]
    region = runnable(torch.where, specs)
    for wrong in (lambda c, a, b: torch.where(c, b, a), lambda c, a, b: b + 0 * c * a):
        assert "differs" in prove(region, runnable(wrong, specs), specs)


def test_fewer_digits_than_eager_are_rejected():
    def rounded(x):
        return rms(x.to(BF16).to(FP32))

    # In float64 both are one function: the dtypes inside are raised.
    assert "twice eager's" in (verdict(rms, rounded) or "")


def test_more_digits_than_eager_are_accepted():
    assert verdict(rms, lambda x: rms(x.float()).to(BF16), BF16) is None


def test_another_dtype_is_rejected():
    assert verdict(rms, lambda x: rms(x.float()), BF16) == (
        "output 0 is torch.float32, not torch.bfloat16"
    )


def test_constants_of_eight_digits_are_accepted():
    """0.79788456 for sqrt(2 / pi)."""

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))

    assert verdict(gelu, lambda x: F.gelu(x, approximate="tanh")) is None


def test_gradients_that_cancel_are_judged_by_what_cancelled():
    """A saturated softmax has no gradient, but for rounding."""

    def attention(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    assert verdict(attention, sdpa, FP32, FP32, FP32) is None
    # The more is summed up, the more rounding is left.
    wide = [Spec((2, 16, 64, 64), FP32, needs_grad=True)] * 3
    assert prove(runnable(attention, wide), runnable(sdpa, wide), wide) is None


def test_verdicts_are_kept(monkeypatch: pytest.MonkeyPatch):
    specs = [Spec((2, 3, D), FP32, needs_grad=True)]
    region = runnable(lambda x: x.cos() + 1, specs)
    assert prove(region, region, specs) is None
    monkeypatch.setattr(prove_module, "_prove", lambda *_: "asked again")
    assert prove(region, runnable(lambda x: x.cos() + 1, specs), specs) is None
    assert prove(region, runnable(lambda x: x.cos() + 2, specs), specs) == "asked again"


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    verdict(lambda x: x.tan(), lambda x: x.sin() / x.cos())
    assert torch.equal(torch.rand(3), expected)


def test_generators_of_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    """Only the CPU's is put back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    assert verdict(lambda x: x.neg(), lambda x: 0 - x) is None


def test_values_of_constants_count():
    """Two regions that read a constant are written alike, whatever its value."""
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert verdict(lambda x: x * one, lambda x: x) is None
    assert "differs by" in (verdict(lambda x: x * two, lambda x: x) or "")


def test_probes_stay_on_the_cpu_under_another_default_device():
    module = Written(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    with torch.device("meta"):  # on the meta device nothing can be compared
        found = rewrite(module, torch.ones(2, 3, D, device="cpu"), rules=["rms_norm"])
    assert found.count("rms_norm") == 1, found.reasons("rms_norm")
