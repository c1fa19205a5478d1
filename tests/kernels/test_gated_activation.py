"""gated_activation: values and gradients against fp64, for both providers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import gated_activation as op_module
from fxopt.kernels import native_gated_activation
from fxopt.kernels.gated_activation import gated_activation, gated_activation_backward, reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}
FORMS = ("unary", "gated", "gate_up", "up_gate")
PROVIDERS = {
    "native": (op_module.native, op_module.native_backward),
    "triton": (op_module.triton_forward, op_module.triton_backward),
}

# No bf16 for Triton: its interpreter truncates where it should round.
CASES = [
    ("native", torch.float32),
    ("native", torch.float16),
    ("native", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
]


def arguments(form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """(gate, up, packing) of a form whose output has `shape`."""
    generator = torch.Generator().manual_seed(0)
    packed = (*shape[:-1], shape[-1] * (2 if form in ("gate_up", "up_gate") else 1))
    gate = (3 * torch.randn(packed, generator=generator)).to(dtype)
    up = torch.randn(shape, generator=generator).to(dtype) if form == "gated" else None
    return gate, up, form if form in ("gate_up", "up_gate") else "none"


def eager(gate: Tensor, up: Tensor | None, activation: str, packing: str) -> Tensor:
    """What a model writes; rounds after the activation and after the product."""
    if packing != "none":
        first, second = gate.chunk(2, dim=-1)
        gate, up = (first, second) if packing == "gate_up" else (second, first)
    y = ACTIVATIONS[activation](gate)
    return y if up is None else y * up


def run_autograd(function, grad: Tensor, gate: Tensor, up: Tensor | None, *strings: str):
    """(y, dgate, dup) by autograd; dup is left out where there is no up."""
    inputs = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
    y = function(inputs[0], inputs[1] if up is not None else None, *strings)
    return (y, *torch.autograd.grad(y, inputs, grad))


def run_provider(provider: str, grad: Tensor, gate: Tensor, up: Tensor | None, *strings: str):
    forward, backward = PROVIDERS[provider]
    dgate, dup, *_ = backward(grad, gate, up, *strings, False)
    return (forward(gate, up, *strings), dgate, *(() if up is None else (dup,)))


def gradient(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("provider", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_within_twice_that_of_eager(provider, activation, form, dtype):
    # 1100 features: more than one tile, and no multiple of one.
    gate, up, packing = arguments(form, dtype, (2, 3, 1100))
    grad = gradient(torch.Size((2, 3, 1100)), dtype)
    exact = run_autograd(
        reference, grad.double(), gate.double(), None if up is None else up.double(),
        activation, packing,
    )  # fmt: skip
    expected = run_autograd(eager, grad, gate, up, activation, packing)
    actual = run_provider(provider, grad, gate, up, activation, packing)
    for name, a, e, x in zip(("y", "dgate", "dup"), actual, expected, exact, strict=False):
        error, allowed = ((t.double() - x).square().mean().sqrt() for t in (a, e))
        assert a.dtype == dtype and a.is_contiguous()
        # The project's bound. Root mean square: a maximum over few elements is luck.
        assert error <= 2 * allowed, f"{name}: {error:.3g}, eager {allowed:.3g}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_fp64_stays_in_fp64(provider, activation, form):
    gate, up, packing = arguments(form, torch.float64, (3, 40))
    grad = gradient(torch.Size((3, 40)), torch.float64)
    expected = run_autograd(reference, grad, gate, up, activation, packing)
    actual = run_provider(provider, grad, gate, up, activation, packing)
    for a, e in zip(actual, expected, strict=True):
        # A few roundings of fp64; one step in fp32 would leave 1e-8.
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-14)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
@pytest.mark.parametrize(("provider", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("form", ["unary", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values_are_those_of_eager(provider, activation, form, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [1e15, -1e15, 1e4, -1e4, -80.0, 1e-40, -1e-40, 1e-30, 0.0, -0.0, inf, -inf, nan],
        dtype=dtype,
    )
    if activation == "gelu_erf":
        x = x[x != inf]  # ATen's vectorised CPU kernel says NaN, its scalar and CUDA kernels inf
    gate = torch.cat([x, x, torch.ones(2, dtype=dtype), -torch.ones(2, dtype=dtype)])[None]
    grad = torch.ones_like(gate)
    grad[:, len(x) : 2 * len(x)] = -1e4
    grad[:, -4:] = torch.tensor([inf, nan, inf, nan])
    up = torch.full_like(gate, 2.0) if form == "gated" else None
    expected = run_autograd(eager, grad, gate, up, activation, "none")
    actual = run_provider(provider, grad, gate, up, activation, "none")
    for a, e in zip(actual, expected, strict=True):
        # Four ulp relative; absolute, one denormal step of fp32 times the factor -1e4 or 2.
        rtol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, e, rtol=rtol, atol=1e-40, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_strides_do_not_matter(provider, form):
    gate, up, packing = arguments(form, torch.float32, (4, 6, 20))
    grad = torch.ones(()).expand(4, 6, 20)  # the gradient of sum(): strides of zero
    expected = run_provider(provider, grad.contiguous(), gate, up, "silu", packing)
    merged = torch.cat([gate, gate], dim=-1)
    views = {
        "half of a merged projection": merged[..., gate.shape[-1] :],
        "permuted": gate.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "transposed batch": gate.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, view in views.items():
        assert not view.is_contiguous()
        for a, e in zip(
            run_provider(provider, grad, view, up, "silu", packing), expected, strict=True
        ):
            assert a.is_contiguous(), name
            # The same arithmetic; ATen's vectorised and scalar exp differ by an ulp or two.
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (8,)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_empty_and_one_dimensional(provider, form, shape):
    for activation in ACTIVATIONS:
        gate, up, packing = arguments(form, torch.float32, shape)
        grad = gradient(torch.Size(shape), torch.float32)
        expected = run_autograd(eager, grad, gate, up, activation, packing)
        actual = run_provider(provider, grad, gate, up, activation, packing)
        for a, e in zip(actual, expected, strict=True):
            # A few ulp of fp32 at magnitude 10.
            torch.testing.assert_close(a, e, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_recomputed_output_is_the_forward_bit_for_bit(provider, activation, form, dtype):
    gate, up, packing = arguments(form, dtype, (5, 24))
    forward, backward = PROVIDERS[provider]
    grad = gradient(torch.Size((5, 24)), dtype)
    dgate, dup, y, _ = backward(grad, gate, up, activation, packing, True)
    assert torch.equal(y, forward(gate, up, activation, packing))
    without = backward(grad, gate, up, activation, packing, False)
    assert without[2].numel() == 0 and (up is not None or dup.numel() == 0)
    assert torch.equal(without[0], dgate) and torch.equal(without[1], dup)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    gate, up, packing = arguments("gate_up", torch.bfloat16, (7, 24))
    grad = gradient(torch.Size((7, 24)), torch.bfloat16)
    whole = run_provider("native", grad, gate, up, "gelu_tanh", packing)
    # 48 elements: blocks of 2 rows per core, the last one short.
    monkeypatch.setattr(native_gated_activation, "BLOCK", 48)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    blocked = run_provider("native", grad, gate, up, "gelu_tanh", packing)
    for a, e in zip(blocked, whole, strict=True):
        # ATen's scalar tail and vector body differ in the last bit of fp32: one ulp of bf16.
        torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    gate, up, packing = arguments(form, torch.float32, (3, 2, 8))
    grad = gradient(torch.Size((3, 2, 8)), torch.float32)
    torch.library.opcheck(gated_activation_backward, (grad, gate, up, "gelu_tanh", packing, True))
    gate.requires_grad_()
    if up is not None:
        up.requires_grad_()
    torch.library.opcheck(gated_activation, (gate, up, "gelu_tanh", packing))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, form):
    gate, up, packing = arguments(form, torch.float64, (2, 4))
    inputs = [t.requires_grad_() for t in (gate, up) if t is not None]
    assert torch.autograd.gradcheck(
        lambda gate, up=None: gated_activation(gate, up, activation, packing), inputs
    )


def test_saves_the_inputs_and_nothing_else():
    gate, up, packing = arguments("gated", torch.float32, (2, 8))
    gate.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gated_activation(gate, up, "silu", packing)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]
    y.sum().backward()
    assert gate.grad is not None and up.grad is None


def test_one_graph_serves_every_number_of_rows():
    compiles = []

    def backend(gm, inputs):
        compiles.append(gm)
        return gm

    function = torch.compile(
        lambda gate: gated_activation(gate, None, "silu", "gate_up"),
        backend=backend, fullgraph=True, dynamic=True,
    )  # fmt: skip
    for num_rows in (2, 3, 17):
        gate = torch.randn(num_rows, 16, requires_grad=True)
        function(gate).sum().backward()
        torch.testing.assert_close(function(gate), reference(gate, None, "silu", "gate_up"))
    assert len(compiles) == 1
