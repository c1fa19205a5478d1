"""norm_modulate: values and gradients against fp64; the Triton provider in test_accuracy.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import norm_modulate as op_module
from fxopt.kernels.norm_modulate import norm_modulate, norm_modulate_backward, reference
from tests.pairwise import pairwise

EPS = 1e-6
OPERANDS = ("x", "residual", "gate", "weight", "bias", "scale", "shift", "x_bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# Norm, form of the gate, affine (weight, bias), forms of scale and shift, offset, what is used, and
# whether x has a bias.
MODULATION = (None, "sample", "shared", "token", "scalar per token", "feature")
NORMED = [
    tuple(row.values())
    for row in pairwise(
        norm=("layer", "rms"),
        gate=("no residual", None, "sample", "token", "scalar per token"),
        affine=((False, False), (True, False), (False, True), (True, True)),
        scale=MODULATION,
        shift=MODULATION,
        offset=(0.0, 1.0),
        used=("y", "h", "y and h"),
        biased=(False, True),
    )
]


def operands(
    gate: str | None,
    affine: tuple[bool, bool],
    scale: str | None,
    shift: str | None,
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (2, 20, 24),
    biased: bool = False,
) -> list[Tensor | None]:
    """x, residual, gate, weight, bias, scale, shift and x's bias, of the forms named."""
    generator = torch.Generator().manual_seed(0)
    B, S, D = shape
    shapes = {
        "sample": (B, 1, D),
        "shared": (1, 1, D),
        "token": (B, S, D),
        "scalar per token": (B, S, 1),
        "feature": (D,),
    }

    def make(form: str | None) -> Tensor | None:
        if form not in shapes:
            return None
        return torch.randn(shapes[form], generator=generator).to(dtype)

    residual = None if gate == "no residual" else "token"
    weight, bias = ("feature" if present else None for present in affine)
    x_bias = "feature" if biased and residual else None
    return [make(form) for form in ("token", residual, gate, weight, bias, scale, shift, x_bias)]


def eager(inputs: list[Tensor | None], norm: str, weight_offset: float) -> tuple[Tensor, Tensor]:
    """What a model writes: PyTorch's own ops, one after the other, in the inputs' dtype."""
    x, residual, gate, weight, bias, scale, shift, x_bias = inputs
    x = x if x_bias is None else x + x_bias
    h = x if gate is None else gate * x
    h = h if residual is None else residual + h
    normalize = F.layer_norm if norm == "layer" else F.rms_norm
    y = normalize(h, h.shape[-1:], eps=EPS)
    y = y if weight is None else y * (weight_offset + weight)
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + scale)
    return (y if shift is None else y + shift), h


def outputs_and_grads(function, dtype, inputs, used) -> dict[str, Tensor]:
    """y, h and the gradients of the inputs, for random gradients of the outputs in `used`."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    y, h = function(leaves)[:2]
    outputs = [t for name, t in (("y", y), ("h", h)) if name in used]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in outputs]
    present = [t for t in leaves if t is not None]
    names = [name for name, t in zip(OPERANDS, leaves, strict=True) if t is not None]
    grad_inputs = torch.autograd.grad(outputs, present, grads, allow_unused=True)
    return dict(zip(used, outputs, strict=True)) | dict(zip(names, grad_inputs, strict=True))


def compare(inputs, norm, weight_offset, dtype, used) -> list[dict[str, Tensor]]:
    """Outputs and gradients in fp64, of the op, and of PyTorch's own ops."""
    constants = norm, EPS, weight_offset, 1.0
    functions = (
        (lambda t: reference(*t, *constants, torch.float64, torch.float64), torch.float64),
        (lambda t: norm_modulate(*t, *constants, dtype, dtype), dtype),
        (lambda t: eager(t, norm, weight_offset), dtype),
    )
    return [outputs_and_grads(*function, inputs, used) for function in functions]


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_is_as_accurate_as_eager(dtype):
    for norm, gate, affine, scale, shift, offset, used, biased in NORMED:
        inputs = operands(gate, affine, scale, shift, dtype, biased=biased)
        used = ("y",) if gate == "no residual" else tuple(used.split(" and "))

        expected, ours, theirs = compare(inputs, norm, offset, dtype, used)
        for name, value in expected.items():
            if value is None:
                assert ours[name] is None, (name, gate, affine, scale, shift)
                continue
            assert ours[name].dtype == dtype
            # Twice eager's error, plus one part in a million of an fp32 value (1e-15 of an fp64
            # one): two errors of a few ulp differ by chance.
            chance = 1e-15 if dtype == torch.float64 else 1e-7
            bound = 2 * error(theirs[name], value) + chance * value.square().mean().sqrt().item()
            case = (name, norm, gate, affine, scale, shift, offset, used, biased)
            assert error(ours[name], value) <= bound, case


@pytest.mark.parametrize("num_features", (4104, 5120))
@pytest.mark.parametrize("norm", ("layer", "rms", "none"))
def test_rows_in_two_pieces(norm: str, num_features: int, monkeypatch: pytest.MonkeyPatch):
    """The Triton backward of rows above 4,096 features; their second piece may be short."""
    # The interpreter takes its time by the program, of which 5,120 features would have 160.
    monkeypatch.setattr("fxopt.kernels.triton_norm_modulate.REDUCE_D", 512)
    is_normed = norm != "none"
    form = "sample" if is_normed else None
    shape = (2, 3, num_features)
    inputs = operands("sample", (is_normed, is_normed), form, form, torch.float32, shape, True)
    native = run("native", inputs, norm, EPS, 1.0, 1.0, torch.float32, torch.float32)
    _, h, mean, rstd = native
    saved = (h, inputs[0], *inputs[2:], mean, rstd, norm, 1.0, 1.0, torch.float32)
    backward = (h.neg() if is_normed else None, h.flip(1), *saved, [True] * 8, is_normed)
    # fp32 sums of thousands of terms in another order; values reach some tens.
    torch.testing.assert_close(
        run_backward("triton", *backward), run_backward("native", *backward), atol=2e-4, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_long_reductions_are_as_accurate_as_eager(dtype):
    # 1,000 rows of nonzero mean: many blocks, the last one ragged, and cancellation in the norm.
    inputs = operands("sample", (True, True), "sample", "sample", dtype, (2, 500, 512))
    inputs[1] = inputs[1] + 3
    expected, ours, theirs = compare(inputs, "layer", 0.0, dtype, ("y", "h"))
    for name, value in expected.items():
        assert error(ours[name], value) <= 2 * error(theirs[name], value), name


def provider_module(provider: str):
    if provider == "native":
        return op_module.native
    return pytest.importorskip("fxopt.kernels.triton_norm_modulate", reason="needs Triton")


PROVIDERS = ("native", "triton")


def run(provider: str, inputs: list[Tensor | None], *constants):
    return provider_module(provider).forward(*inputs, *constants)


def run_backward(provider: str, *arguments):
    return provider_module(provider).backward(*arguments)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_any_strides(provider):
    B, S, D = 2, 5, 24
    constants = ("layer", EPS, 1.0, 1.0, torch.float32, torch.float32)
    make = torch.Generator().manual_seed(0)
    x = torch.randn(S, B, 2 * D, generator=make)[..., ::2].transpose(0, 1)
    residual = torch.randn(D, S, B, generator=make).permute(2, 1, 0)
    gate, scale, shift = torch.randn(B, 1, 3 * D, generator=make).chunk(3, dim=-1)
    weight = torch.randn(1, generator=make).expand(D)
    x_bias = torch.randn(2 * D, generator=make)[::2]
    inputs = [x, residual, gate, weight, None, scale, shift.expand(B, S, D), x_bias]
    grad_y = torch.ones(()).expand(B, S, D)
    grad_h = torch.randn(B, S, 1, generator=make).expand(B, S, D)

    def both(inputs, grad_y, grad_h):
        y, h, mean, rstd = run(provider, inputs, *constants)
        saved = (h, inputs[0], *inputs[2:], mean, rstd, "layer", 1.0, 1.0, torch.float32)
        return y, h, *run_backward(provider, grad_y, grad_h, *saved, [True] * 8, True)

    contiguous = [None if t is None else t.contiguous() for t in inputs]
    expected = both(contiguous, grad_y.contiguous(), grad_h.contiguous())
    # The same arithmetic in the same order: bit for bit.
    torch.testing.assert_close(both(inputs, grad_y, grad_h), expected, atol=0, rtol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_rows(provider):
    inputs = operands("sample", (True, True), "sample", "sample", torch.float32, (2, 0, 24), True)
    constants = ("layer", EPS, 1.0, 1.0, torch.float32, torch.float32)
    y, h, mean, rstd = run(provider, inputs, *constants)
    assert y.shape == h.shape == (2, 0, 24) and mean.shape == rstd.shape == (2, 0)
    saved = (h, inputs[0], *inputs[2:], mean, rstd, "layer", 1.0, 1.0, torch.float32)
    _, dx, *grads, _ = run_backward(provider, y, h, *saved, [True] * 8, False)
    assert dx.shape == (2, 0, 24)
    for grad, operand in zip(grads, inputs[2:], strict=True):
        assert torch.equal(grad, torch.zeros_like(operand))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_special_values_propagate_as_in_pytorch(provider, norm):
    inputs = operands(None, (False, False), "sample", "sample", torch.float32, (1, 8, 24))
    inputs[0][0, 1, 3], inputs[0][0, 2, 5], inputs[0][0, 3, 7] = torch.nan, torch.inf, -torch.inf
    inputs[5][0, 0, 1], inputs[6][0, 0, 2] = torch.inf, torch.nan
    inputs[0][0, 4], inputs[1][0, 4] = 2.0, 1.0
    y, h, _, _ = run(provider, inputs, norm, EPS, 0.0, 1.0, torch.float32, torch.float32)
    expected_y, expected_h = eager(inputs, norm, 0.0)
    torch.testing.assert_close(h, expected_h, atol=0, rtol=0, equal_nan=True)
    # A few ulp of fp32. Row 4 is constant: its variance is exactly zero on both sides.
    torch.testing.assert_close(y, expected_y, atol=2e-6, rtol=2e-6, equal_nan=True)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_recomputed_output_is_the_forwards(provider):
    inputs = operands("sample", (True, True), "sample", "token", torch.float32)
    y, h, mean, rstd = run(provider, inputs, "rms", EPS, 1.0, 1.0, torch.float32, torch.float32)
    saved = (h, None, *inputs[2:], mean, rstd, "rms", 1.0, 1.0, torch.float32)
    *grads, again = run_backward(provider, y, None, *saved, [False] * 8, True)
    # The same formula from the saved statistics, at most fused differently.
    torch.testing.assert_close(again, y, atol=2e-6, rtol=2e-6)
    assert all(grad.numel() == 0 for grad in grads[1:])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_mixed_dtypes_round_once(provider):
    """A bf16 branch on an fp32 residual with fp32 modulation, as under autocast."""
    inputs = operands("sample", (False, False), "sample", "sample", torch.float32)
    inputs[0] = inputs[0].bfloat16()
    y, h, _, rstd = run(provider, inputs, "layer", EPS, 0.0, 1.0, torch.float32, torch.bfloat16)
    assert (y.dtype, h.dtype, rstd.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact_y, exact_h = reference(*inputs, "layer", EPS, 0.0, 1.0, torch.float64, torch.float64)
    # fp32 arithmetic; then half an ulp of bf16 (the interpreter truncates: one ulp).
    torch.testing.assert_close(h.double(), exact_h, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(y.double(), exact_y, atol=1e-5, rtol=2.0**-7)


@pytest.mark.parametrize("norm", ("layer", "rms", "none"))
def test_opcheck(norm):
    normed = norm != "none"
    form = "sample" if normed else None
    inputs = operands("sample", (normed, normed), form, form, torch.float32, (2, 3, 8), True)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    constants = (norm, EPS, 1.0, 1.0, torch.float32, torch.float32)
    torch.library.opcheck(norm_modulate, (*leaves, *constants))
    with torch.no_grad():
        _, h, mean, rstd = norm_modulate(*leaves, *constants)
    grad_y = torch.randn_like(h) if normed else None
    saved = [None if t is None else t.detach() for t in (h, inputs[0], *inputs[2:], mean, rstd)]
    backward = (grad_y, torch.randn_like(h), *saved, norm, 1.0, 1.0, torch.float32)
    torch.library.opcheck(norm_modulate_backward, (*backward, [True] * 8, normed))


@pytest.mark.parametrize(("norm", "shift"), (("layer", "sample"), ("rms", "token")))
def test_gradcheck(norm, shift):
    inputs = operands("sample", (True, True), "sample", shift, torch.float64, (2, 3, 8), True)
    constants = (norm, EPS, 1.0, 1.0, torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: norm_modulate(*t, *constants)[:2], leaves)


def test_saves_neither_the_output_nor_the_normalized_value():
    inputs = operands(None, (False, False), "sample", "sample", torch.float32)
    saved = []
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, h, _, _ = norm_modulate(*leaves, "layer", EPS, 0.0, 1.0, torch.float32, torch.float32)
    large = {t.data_ptr() for t in saved if t.numel() == h.numel()}
    assert large == {h.data_ptr()} and y.data_ptr() not in large
