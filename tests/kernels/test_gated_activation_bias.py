"""gated_activation with the bias of the linear before it: values, and the gradient of the bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import gated_activation as op
from fxopt.kernels.gated_activation import gated_activation, gated_activation_backward, reference
from fxopt.kernels.registration import LAUNCHES
from tests.kernels.test_gated_activation import eager

PROVIDERS = {
    "native": (op.native, op.native_backward),
    "triton": (op.triton_forward, op.triton_backward),
}
# No bf16 for Triton: its interpreter truncates where it should round.
CASES = [
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
]
PACKINGS = ("none", "gate_up", "up_gate")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(packing: str, rows: tuple[int, ...], num_features: int) -> tuple[Tensor, ...]:
    """grad, gate and bias in float64."""
    width = num_features * (1 if packing == "none" else 2)
    return draw(*rows, num_features, seed=1), 2 * draw(*rows, width), draw(width, seed=2)


def run(provider: str, grad: Tensor, gate: Tensor, bias: Tensor, *settings: str) -> list[Tensor]:
    """y, dgate, dbias and y again."""
    forward, backward = PROVIDERS[provider]
    dgate, dup, y, dbias = backward(grad, gate, None, *settings, True, bias, True)
    assert dup.numel() == 0
    return [forward(gate, None, *settings, bias), dgate, dbias, y]


def by_autograd(function: Any, grad: Tensor, gate: Tensor, bias: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (gate, bias)]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, grad), y]


@pytest.mark.parametrize(("provider", "dtype"), CASES, ids=str)
@pytest.mark.parametrize(
    ("activation", "packing"),
    [*(("gelu_tanh", p) for p in PACKINGS), ("gelu_erf", "none"), ("silu", "gate_up")],
)
def test_error_is_within_twice_that_of_eager(provider, activation, packing, dtype):
    # 150 rows of 600 features: more than one program along both, and no multiple of one.
    exact_inputs = [t.to(dtype).double() for t in tensors(packing, (3, 50), 600)]
    inputs = [t.to(dtype) for t in exact_inputs]
    settings = activation, packing
    exact = by_autograd(lambda x, b: reference(x, None, *settings, b), *exact_inputs)
    expected = by_autograd(lambda x, b: eager(x + b, None, *settings), *inputs)
    found = run(provider, *inputs, *settings)
    for name, a, e, x in zip(("y", "dgate", "dbias", "again"), found, expected, exact, strict=True):
        error, allowed = ((t.double() - x).square().mean().sqrt() for t in (a, e))
        assert a.dtype == dtype and a.is_contiguous() and a.shape == x.shape
        # The project's bound. Root mean square: a maximum over few elements is luck.
        assert error <= 2 * allowed, f"{name}: {error:.3g}, eager {allowed:.3g}"


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_fp64_stays_in_fp64(provider, packing):
    inputs = tensors(packing, (3,), 40)
    expected = by_autograd(lambda x, b: reference(x, None, "silu", packing, b), *inputs)
    for a, e in zip(run(provider, *inputs, "silu", packing), expected, strict=True):
        # A few roundings of fp64; one step in fp32 would leave 1e-8.
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [(0, 4), (1,), (129, 1)], ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_few_and_odd_numbers_of_rows(provider, rows):
    inputs = [t.float() for t in tensors("gate_up", rows, 24)]
    expected = by_autograd(lambda x, b: reference(x, None, "silu", "gate_up", b), *inputs)
    for a, e in zip(run(provider, *inputs, "silu", "gate_up"), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)  # fp32 sums of up to 129 rows


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strides_do_not_matter(provider):
    _, gate, bias = (t.float() for t in tensors("none", (4, 6), 20))
    one = torch.ones(()).expand(4, 6, 20)  # the gradient of sum(): strides of zero
    expected = run(provider, one.contiguous(), gate, bias, "silu", "none")
    wide, spread = torch.cat([gate, gate], -1), torch.stack([bias, bias], -1)
    found = run(provider, one, wide[..., 20:], spread[:, 0], "silu", "none")
    for a, e in zip(found, expected, strict=True):
        # The same arithmetic; ATen's vectorised and scalar exp differ by an ulp or two.
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def test_what_lies_beyond_the_rows_is_not_summed():
    """Lanes beyond the last row hold the bias alone, here one whose activation is no number."""
    grad, gate, bias = (t.float() for t in tensors("none", (3,), 20))
    bias[4] = float("nan")
    *_, dbias, _ = run("triton", grad, gate, bias, "silu", "none")
    assert dbias.isnan().nonzero().flatten().tolist() == [4]
    *_, dbias, _ = run("triton", grad[:0], gate[:0], bias, "silu", "none")
    assert not dbias.any()


def test_dtype_of_the_bias_is_its_own():
    grad, gate, bias = tensors("none", (3,), 20)
    for provider in PROVIDERS:
        *_, dbias, _ = run(provider, grad.half(), gate.half(), bias.float(), "silu", "none")
        assert dbias.dtype == torch.float32


def test_a_bias_beside_an_up_of_its_own_is_refused():
    gate, bias = draw(2, 8), draw(8)
    for call in (
        lambda: gated_activation(gate, gate, "silu", "none", bias),
        lambda: gated_activation_backward(gate, gate, gate, "silu", "none", False, bias, True),
        lambda: reference(gate, gate, "silu", "none", bias),
    ):
        with pytest.raises(ValueError, match=r"up is \[2, 8\]: add the biases"):
            call()


@pytest.mark.parametrize("packing", PACKINGS)
def test_opcheck(packing):
    grad, gate, bias = (t.float() for t in tensors(packing, (2, 3), 8))
    gate.requires_grad_()
    bias.requires_grad_()
    torch.library.opcheck(gated_activation, (gate, None, "silu", packing, bias))
    arguments = grad, gate.detach(), None, "silu", packing, True, bias.detach(), True
    torch.library.opcheck(gated_activation_backward, arguments)


def test_the_gradient_of_the_bias_alone():
    """A frozen linear before a trained bias, and the reverse."""
    grad, gate, bias = (t.float() for t in tensors("none", (2, 3), 8))
    expected = by_autograd(lambda x, b: F.silu(x + b), grad, gate, bias)
    for i, leaf in ((1, gate), (2, bias)):
        leaf.requires_grad_()
        y = gated_activation(gate, None, "silu", "none", bias)
        (found,) = torch.autograd.grad(y, leaf, grad)
        torch.testing.assert_close(found, expected[i], rtol=1e-5, atol=1e-5)  # fp32 sums of 6 rows
        leaf.requires_grad_(False)


def test_launches_count_the_sum():
    launches = LAUNCHES["fxopt::gated_activation_backward"]
    grad, gate, bias = tensors("none", (2,), 8)
    assert launches(grad, gate, None, "silu", "none", False, bias, True) == 2
    assert launches(grad, gate, None, "silu", "none", False, bias, False) == 1
    assert launches(grad, gate, None, "silu", "none", False) == 1
