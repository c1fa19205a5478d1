"""Ops that leave codes of what they read, and read them: bit for bit `fxopt::pack` and `unpack`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import norm_modulate as norm
from fxopt.kernels import qk_norm_rope_providers as heads
from fxopt.kernels import quantized_producers as producers
from fxopt.kernels import saving

# Compared with the same provider's own passes: the interpreter rounds to FP8 otherwise than ATen.
PROVIDERS = ["native", "triton"]
TENSOR = "e4m3/tensor/fp32"
DTYPE = torch.float16


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def rooms_of(*xs: Tensor, num_row_dims: int = 1) -> list[Tensor]:
    found = saving.fake_pack(xs, num_row_dims)
    return [t for pair in zip(found[: len(xs)], found[len(xs) :], strict=True) for t in pair]


def packed(provider: str, *xs: Tensor, num_row_dims: int = 1) -> list[Tensor]:
    found = getattr(saving, f"{provider}_pack")(xs, num_row_dims)
    return [t for pair in zip(found[: len(xs)], found[len(xs) :], strict=True) for t in pair]


def unpacked(provider: str, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    names = [saving.name_of(DTYPE)] * len(codes)
    found: list[Tensor] = getattr(saving, f"{provider}_unpack")(codes, scales, names)
    return found


def check(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert (f.shape, f.dtype) == (e.shape, e.dtype), i
        assert torch.equal(f.contiguous().view(torch.uint8), e.contiguous().view(torch.uint8)), i


def operands(features: int) -> tuple[Any, ...]:
    """Of a norm on a gated residual; x has a block of zeros and one with an Inf."""
    x, residual = 3 * randn(0, 2, 3, features), randn(1, 2, 3, features)
    x[0, 1, :128] = 0
    x[1, 2, -1] = float("inf")
    gate, scale, shift = (randn(i, 2, 1, features) for i in (2, 3, 4))
    return x, residual, gate, None, None, scale, shift, randn(5, features)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("features", [96, 320])
@pytest.mark.parametrize("kind", ["layer", "none"])
def test_norm(provider: str, features: int, kind: str) -> None:
    forward, backward = (
        (norm.native_forward, norm.native_backward)
        if provider == "native"
        else (norm._triton, norm._triton_backward)
    )
    x, residual, gate, *others = operands(features)
    given = x, residual, gate, *others, kind, 1e-6, 0.0, 1.0, DTYPE, DTYPE
    plain, rooms = forward(*given), rooms_of(x, x)
    is_normed = kind != "none"
    check(forward(*given, *(rooms if is_normed else [None, None, *rooms[2:]])), plain)
    expected = packed(provider, plain[1], x)
    check(rooms[0 if is_normed else 2 :], expected[0 if is_normed else 2 :])
    h_codes, h_scales, x_codes, x_scales = expected
    h, values = unpacked(provider, [h_codes, x_codes], [h_scales, x_scales])
    grad_y, grad_h = (randn(i, 2, 3, features) for i in (6, 7))
    settings = gate, *others, *plain[2:], kind, 0.0, 1.0, DTYPE, [True] * 8, is_normed
    grads = (grad_y, grad_h) if is_normed else (None, grad_h)
    h, h_codes = (h, h_codes) if is_normed else (grad_h, grad_h)
    scales = h_scales if is_normed else None, x_scales
    found = backward(*grads, h_codes, x_codes, *settings, *scales)
    check(found, backward(*grads, h, values, *settings))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("rows", [TENSOR, "e4m3/row/pow2"])
def test_quantized_norm(provider: str, rows: str) -> None:
    forward, columns = (getattr(producers, f"{provider}_norm{end}") for end in ("", "_columns"))
    x, residual, gate, weight, bias, scale, shift, x_bias = operands(320)
    affine, constants = (weight, bias, scale, shift), ("layer", 1e-6, 0.0, 1.0)
    given = x, residual, gate, *affine, x_bias, *constants, DTYPE, DTYPE, rows, rows
    plain, rooms = forward(*given), rooms_of(x, x)
    check(forward(*given, None, None, None, *rooms), plain)
    _, _, amax_t, h, mean, rstd = plain
    expected = packed(provider, h, x)
    check(rooms, expected)
    (values,) = unpacked(provider, expected[:1], expected[1:2])
    settings = *affine, mean, rstd, *constants, DTYPE, rows, amax_t
    check(columns(rooms[0], *settings, None, rooms[1]), columns(values, *settings))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "packing, has_up, width, features, is_apart",
    [
        *(("none", True, 128, 200, False), ("none", False, 0, 128, False)),
        *(("gate_up", False, 128, 128, False), ("up_gate", False, 0, 100, True)),
        ("none", True, 64, 128, True),
    ],
)
def test_activation(
    provider: str, packing: str, has_up: bool, width: int, features: int, is_apart: bool
) -> None:
    forward = getattr(producers, f"{provider}_activation")
    gate = randn(0, 2, 37, features * (1 if packing == "none" else 2))
    kept = [gate, randn(1, *gate.shape)] if has_up else [gate]
    up, beside = kept[-1] if has_up else None, randn(2, 2, 37, width) if width else None
    given = gate, up, beside, "silu", packing, TENSOR, TENSOR
    rooms = rooms_of(*kept)
    further = None, None, None, *rooms, *([] if has_up else [None, None])
    check(forward(*given, *further), forward(*given))
    # Where they are packed apart, it is by the pass that the device has: here ATen.
    check(rooms, packed("native" if is_apart else provider, *kept))
    assert producers.launches_of_activations([(*given, *further)]) == (3 if is_apart else 2)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "num_heads, dim, rotation, across_heads",
    [
        *((3, 128, "interleaved", False), (4, 64, "half", False), (8, 32, "interleaved", True)),
        (2, 96, "half", False),
    ],
)
def test_heads(provider: str, num_heads: int, dim: int, rotation: str, across_heads: bool) -> None:
    forward, backward = (getattr(heads, f"{provider}{end}") for end in ("", "_backward"))
    xs = [randn(i, 1, 3, 3, num_heads, dim)[:, :, 1] for i in range(2)]
    weights = [randn(2, num_heads * dim if across_heads else dim)] * 2
    tables, absent = [torch.rand(3, 1, dim)] * 2, [None] * 2
    fields = absent, weights, absent, tables, tables
    settings = [1, 1], "rms", [1e-6] * 2, 0.0, across_heads, rotation, "channels", "all", DTYPE
    rooms, plain = rooms_of(*xs, num_row_dims=2), forward(xs, *fields, *settings)
    codes, scales = rooms[::2], rooms[1::2]
    check(forward(xs, *fields, *settings, codes, scales), plain)
    is_apart = not heads.has_whole_blocks(xs[0])
    assert is_apart == (dim == 96)
    assert heads.forward_launches(xs, *fields, *settings, codes, scales) == 1 + is_apart
    by = "native" if is_apart else provider
    check(rooms, packed(by, *(x.contiguous() for x in xs), num_row_dims=2))
    if is_apart:
        return  # its backward gets what is unpacked
    grads = [randn(i, 1, 3, num_heads, dim) for i in (3, 4)]
    needs = [True, True, False, False, True, True, False, False]
    behind = *fields, *plain[2:], *settings, needs
    values = unpacked(provider, codes, scales)
    check(backward(grads, codes, *behind, scales), backward(grads, values, *behind))
