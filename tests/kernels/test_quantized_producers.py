"""Fused ops that write codes: bit for bit what quantize makes of their result, per provider."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import gated_activation, native_norm_modulate, quantize
from fxopt.kernels import quantized_producers as op
from fxopt.kernels.registration import LAUNCHES, REREADS
from tests.kernels.codes import FORMATS, draw, same

PROVIDERS = ["native", "triton"]


def norm_arguments(case: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of norm_modulate: per sample, per token, with a residual; widths that pad."""
    B, S, K = 2, 21, 40
    x, absent = draw(B, S, K).to(dtype), None
    if case == "modulated":
        operands = [absent, absent, absent, absent, draw(B, 1, K, seed=1), draw(B, 1, K, seed=2)]
    elif case == "residual":
        residual, gate = draw(B, S, K, seed=1), draw(B, 1, K, seed=2)
        operands = [residual, gate, draw(K, seed=3), draw(K, seed=4), absent, absent]
    else:  # per token, strided
        x = draw(S, B, K).to(dtype).transpose(0, 1)
        operands = [absent] * 4 + [draw(B, S, K, seed=1), draw(1, 1, K, seed=2)]
    x_bias = draw(K, seed=5) if case == "residual" else absent
    norm = "rms" if case == "tokens" else "layer"
    return [x, *operands, x_bias, norm, 1e-5, 1.0, 1.0, dtype, dtype]


def quantized(y: Tensor, rows: str, columns: str | None) -> tuple[Tensor, ...]:
    """Codes and scales of y and of its transpose."""
    found = quantize.triton(y, rows, columns, None, False)
    return found[0], found[1], found[3], found[4]


@pytest.mark.parametrize("rows, columns", FORMATS)
@pytest.mark.parametrize("case", ["modulated", "residual", "tokens"])
def test_codes_of_a_norm(case: str, rows: str, columns: str | None) -> None:
    """Against the Triton kernels on the Triton norm's result: one cast, one rounding, the same."""
    from fxopt.kernels import triton_norm_modulate

    args = norm_arguments(case)
    y, *kept = triton_norm_modulate.forward(*args)
    codes, scales, codes_t, scales_t = quantized(y, rows, columns)
    found = op.triton_norm(*args, rows, columns)
    assert same(found[0], codes) and same(found[1], scales)
    for f, k in zip(found[3:], kept, strict=True):
        assert torch.equal(f, k)
    if columns is None:
        assert not found[2].numel()
        return
    assert torch.equal(found[2], op.amax_for(y, columns))
    h = found[3] if found[3].numel() else args[0]
    backward = (h, *args[3:7], *found[4:], *args[8:12], args[13], columns, found[2])
    transposed = op.triton_norm_columns(*backward)
    assert same(transposed[0], codes_t) and same(transposed[1], scales_t)


ACTIVATIONS = [("silu", "none", True, False), ("gelu_tanh", "none", False, True)]
ACTIVATIONS += [("gelu_erf", "gate_up", False, True), ("relu", "up_gate", False, False)]


def activation_arguments(name: str, packing: str, has_up: bool, has_beside: bool) -> list[Any]:
    width = 24
    gate = draw(3, 15, width * (1 if packing == "none" else 2))
    up = draw(3, 15, width, seed=1) if has_up else None
    beside = draw(15, 3, 20, seed=2).transpose(0, 1) if has_beside else None
    return [gate, up, beside, name, packing]


@pytest.mark.parametrize("rows, columns", FORMATS)
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_codes_of_an_activation(case: Any, rows: str, columns: str | None) -> None:
    args = activation_arguments(*case)
    gate, up, beside, *names = args
    y = gated_activation.triton_forward(gate, up, *names)
    y = y if beside is None else torch.cat([beside, y], -1)
    codes, scales, codes_t, scales_t = quantized(y, rows, columns)
    found = op.triton_activation(*args, rows, columns)
    assert same(found[0], codes) and same(found[1], scales)
    if columns is None:
        assert not found[2].numel()
        return
    assert torch.equal(found[2], op.amax_for(y, columns))
    width = y.shape[-1] - (0 if beside is None else beside.shape[-1])
    grad = draw(3, 15, y.shape[-1], seed=3)[..., -width:]
    *grads, _, _ = gated_activation.triton_backward(grad, gate, up, *names, False)
    *found_grads, codes, scales = op.triton_activation_backward(grad, *args, columns, found[2])
    assert same(codes, codes_t) and same(scales, scales_t)
    for f, g in zip(found_grads, grads, strict=True):
        assert torch.equal(f, g)


@pytest.mark.parametrize("rows, columns", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_native_provider_is_the_two_ops(
    dtype: torch.dtype, rows: str, columns: str | None
) -> None:
    args = norm_arguments("residual", dtype)
    y = native_norm_modulate.forward(*args)[0]
    expected = quantize.native(y, rows, columns, None, False)
    codes, scales, amax_t, h, mean, rstd = op.native_norm(*args, rows, columns)
    assert same(codes, expected[0]) and same(scales, expected[1])
    if columns is not None:
        # From h alone, as the backward has it.
        args = (h, *args[3:7], mean, rstd, *args[8:12], dtype, columns, amax_t)
        found = op.native_norm_columns(*args)
        assert same(found[0], expected[3]) and same(found[1], expected[4])


def test_what_is_not_finite_becomes_nan() -> None:
    args = activation_arguments("relu", "none", False, False)
    args[0] = args[0].clamp(min=0)
    args[0][1, 2, 3] = float("inf")
    for provider in (op.native_activation, op.triton_activation):
        codes, scales, amax_t = provider(*args, "e4m3/row/pow2", "e4m3/tensor/fp32")
        assert codes.float()[17].isnan().all() and scales[17].isnan().all()
        assert not codes.float()[:17].isnan().any()
        backward = (
            op.native_activation_backward
            if provider is op.native_activation
            else op.triton_activation_backward
        )
        found = backward(args[0], *args, "e4m3/tensor/fp32", amax_t)
        assert found[2].float()[:, :45].isnan().all()


@pytest.mark.parametrize("rows, columns", FORMATS[:3])
def test_opcheck(rows: str, columns: str | None) -> None:
    # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
    checks = ("test_faketensor", "test_autograd_registration")
    norm, activation = norm_arguments("residual"), activation_arguments(*ACTIVATIONS[1])
    found = op.native_norm(*norm, rows, columns)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (op.norm_modulate_quantize, (*norm, rows, columns)),
        (op.gated_activation_quantize, (*activation, rows, columns)),
    ]
    if columns is not None:
        after = (found[3], *norm[3:7], *found[4:], *norm[8:12], norm[13], columns, found[2])
        amax_t = op.native_activation(*activation, rows, columns)[2]
        calls.append((op.norm_modulate_quantize_columns, after))
        grad = draw(3, 15, 24)
        after = (grad, *activation, columns, amax_t)
        calls.append((op.gated_activation_quantize_backward, after))
    for overload, args in calls:
        torch.library.opcheck(overload, args, test_utils=checks)


def test_launches_and_second_reads_are_those_of_the_providers() -> None:
    """Counted in the interpreter: kernels, and reductions that ATen runs between them."""
    from fxopt.kernels import triton_gated_activation_quantize as activation
    from fxopt.kernels import triton_norm_modulate_quantize as norm

    counted: list[str] = []

    class Counting:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            counted.append("kernel")
            return self.kernel[grid]

    class Reductions(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten.amax.default:
                counted.append("amax")
            return func(*args, **(kwargs or {}))

    kernels = [(norm.kernels, "rows_kernel"), (norm.kernels, "tiles_kernel")]
    kernels += [(activation, "amax_kernel"), (activation, "cast_kernel")]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in kernels:
            patch.setattr(module, name, Counting(getattr(module, name)))
        for rows, columns in FORMATS:
            for name, function, args in (
                ("norm_modulate_quantize", norm.forward, norm_arguments("modulated")),
                (
                    "gated_activation_quantize",
                    activation.forward,
                    activation_arguments(*ACTIVATIONS[0]),
                ),
            ):
                counted.clear()
                with Reductions():
                    out = function(*args, rows, columns)
                given = (*args, rows, columns)
                assert LAUNCHES[f"fxopt::{name}"](*given) == len(counted)
                casts_later = "tensor" in rows or name.startswith("gated")
                assert bool(REREADS[f"fxopt::{name}"](given, out)) == casts_later
