"""No input that needs a gradient loses it: each alone gets what it gets among all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.gated_activation_linear import gated_activation_linear
from fxopt.kernels.linears import linears
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.norm_modulate_segments_linears import norm_modulate_segments_linears
from fxopt.kernels.qk_norm_rope import qk_norm_rope
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.kernels.silu_linears import silu_linears
from tests.kernels.interpreted import Interpreted

B, S, H, D, N = 2, 3, 2, 16, 32
FP32 = torch.float32
PIECES = [0, 0, 12, 0, 12, N, 1, 0, N]  # two pieces of the first linear, all of the second
Shapes = dict[str, tuple[int, ...]]
Run = Callable[[dict[str, Tensor]], list[Tensor]]

ROWS = dict.fromkeys(("x", "residual"), (B, S, D))
OPERANDS = dict.fromkeys(("gate", "scale", "shift"), (B, 1, D))
PER_TOKEN = dict.fromkeys(("gate", "scale", "shift"), (B, S, D))
TABLES = dict.fromkeys(("gate", "scale", "shift"), (B, 2, D))
INDEX = torch.tensor([0, 1, 0])
VECTORS = dict.fromkeys(("weight", "bias", "x_bias"), (D,))
LINEARS = {"w": (N, D), "b": (N,), "w2": (N, D), "b2": (N,)}


def norm_arguments(t: dict[str, Tensor], norm: str) -> list[Any]:
    names = ("x", "residual", "gate", "weight", "bias", "scale", "shift", "x_bias")
    return [*(t.get(name) for name in names), norm, 1e-6, 1.0, 1.0, FP32, FP32]


def of_norm(norm: str) -> Run:
    def run(t: dict[str, Tensor]) -> list[Tensor]:
        y, h, _, _ = norm_modulate(*norm_arguments(t, norm))
        return [out for out in (y, h) if out.numel() and out.requires_grad]

    return run


def of_norm_linears(t: dict[str, Tensor]) -> list[Tensor]:
    products = [t["w"], t["w2"]], [t["b"], t["b2"]], PIECES
    outs, h = norm_modulate_linears(*norm_arguments(t, "layer"), *products)
    return [*outs, h]


def of_segments(t: dict[str, Tensor]) -> list[Tensor]:
    operands, settings = (norm_arguments(t, "layer")[part] for part in (slice(8), slice(8, None)))
    y, h, _, _ = norm_modulate_segments(*operands, INDEX, False, *settings)
    return [out for out in (y, h) if out.requires_grad]


def of_segments_linears(t: dict[str, Tensor]) -> list[Tensor]:
    operands, settings = (norm_arguments(t, "layer")[part] for part in (slice(8), slice(8, None)))
    products = [t["w"], t["w2"]], [t["b"], t["b2"]], PIECES
    outs, h = norm_modulate_segments_linears(*operands, INDEX, False, *settings, *products)
    return [*outs, h]


def of_heads(across_heads: bool) -> Run:
    angle = torch.linspace(0, 3, 8).view(1, 1, 1, 8)  # one token a section
    tables = [[angle.cos()] * 2, [angle.sin()] * 2]

    def run(t: dict[str, Tensor]) -> list[Tensor]:
        fields = [[t[f"{f}{i}"] for i in range(2)] for f in ("x", "x_bias", "weight", "bias")]
        settings = ([1, 1], "layer", [1e-6] * 2, 0.0, across_heads, "half", "channels", "all", FP32)
        return qk_norm_rope(*fields, *tables, *settings)[:2]

    return run


def heads(across_heads: bool) -> Shapes:
    width = (H * 8,) if across_heads else (8,)
    shapes = {"x": (B, 1, H, 8), "x_bias": (H * 8,), "weight": width, "bias": width}
    return {f"{name}{i}": shape for i in range(2) for name, shape in shapes.items()}


def of_linears(t: dict[str, Tensor]) -> list[Tensor]:
    return linears(t["x"], [t["w"], t["w2"]], [t["b"], t["b2"]], PIECES)


def of_silu_linears(t: dict[str, Tensor]) -> list[Tensor]:
    return silu_linears(t["x"], [t["w"], t["w2"]], [t["b"], t["b2"]], PIECES)


def of_quantized(recipe: str, keeps_x: bool) -> Run:
    def run(t: dict[str, Tensor]) -> list[Tensor]:
        return quantized_linears(t["x"], [t["w"], t["w2"]], [t["b"], t["b2"]], recipe, keeps_x)

    return run


def of_activation(packing: str) -> Run:
    return lambda t: [gated_activation(t["gate"], t.get("up"), "silu", packing, t.get("bias"))]


def of_activation_linear(t: dict[str, Tensor]) -> list[Tensor]:
    arguments = (t["gate"], None, "silu", "none", t["beside"], t["bias"])
    return [gated_activation_linear(*arguments, t["w"], t["b"])]


CALLS: dict[str, tuple[Run, Shapes]] = {
    "norm_modulate layer": (of_norm("layer"), ROWS | OPERANDS | VECTORS),
    "norm_modulate rms, per token": (of_norm("rms"), ROWS | PER_TOKEN | VECTORS),
    "norm_modulate without a norm": (
        of_norm("none"),
        ROWS | {"gate": (B, 1, D), "x_bias": (D,)},
    ),
    "norm_modulate without a residual": (
        of_norm("layer"),
        {"x": (B, S, D), "scale": (B, 1, D), "shift": (B, S, D)},
    ),
    "norm_modulate_linears": (of_norm_linears, ROWS | OPERANDS | VECTORS | LINEARS),
    "norm_modulate_segments": (of_segments, ROWS | TABLES | VECTORS),
    "norm_modulate_segments_linears": (of_segments_linears, ROWS | TABLES | VECTORS | LINEARS),
    "qk_norm_rope": (of_heads(False), heads(False)),
    "qk_norm_rope across heads": (of_heads(True), heads(True)),
    "gated_activation": (of_activation("none"), {"gate": (B, S, D), "up": (B, S, D)}),
    "gated_activation packed": (
        of_activation("gate_up"),
        {"gate": (B, S, D), "bias": (D,)},
    ),
    "gated_activation_linear": (
        of_activation_linear,
        {"gate": (B, S, D), "bias": (D,), "beside": (B, S, 4), "w": (N, D + 4), "b": (N,)},
    ),
    "linears": (of_linears, {"x": (B, S, D)} | LINEARS),
    "silu_linears": (of_silu_linears, {"x": (B, D)} | LINEARS),
    "quantized_linears fp8": (of_quantized("fp8", True), {"x": (B, S, D)} | LINEARS),
    "quantized_linears mxfp8": (of_quantized("mxfp8", False), {"x": (B, S, D)} | LINEARS),
}


@pytest.mark.parametrize("provider", ["native", "triton"])
@pytest.mark.parametrize("call", CALLS)
def test_every_input_gets_its_gradient(call: str, provider: str) -> None:
    run, shapes = CALLS[call]
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def gradients(names: list[str]) -> tuple[Tensor | None, ...]:
        tensors = {n: t.detach().requires_grad_(n in names) for n, t in values.items()}
        outs = [out for out in run(tensors) if out.requires_grad]
        wanted = [tensors[name] for name in names]
        grads = [out.detach() for out in outs]
        return torch.autograd.grad(outs, wanted, grads, allow_unused=True)

    with Interpreted(provider == "triton"):
        together = dict(zip(values, gradients([*values]), strict=True))
        for name, expected in together.items():
            assert expected is not None and expected.count_nonzero(), name
            (alone,) = gradients([name])
            assert alone is not None, name
            # fp32: without other gradients an op may sum in another order.
            torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5, msg=name)
