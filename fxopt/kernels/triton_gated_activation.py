"""Triton provider of `fxopt::gated_activation`: one launch forward, one launch backward.

Tensors are seen as [N, F]: rows of a half of a packed projection are read and written where they
lie. A program owns a tile of BLOCK_N rows and BLOCK_F features.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements; 4 warps read 16 bytes of bf16 a thread, twice
MAX_BLOCK_F = 1024

# gelu_tanh(x) = x * sigmoid(LINEAR * x + CUBIC * x**3), as 1 + tanh(z) = 2 sigmoid(2z).
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
RSQRT_2 = tl.constexpr(math.sqrt(0.5))
RSQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


class Rows(NamedTuple):
    """A tensor seen as [N, F]."""

    pointer: Any
    stride_N: Any
    stride_F: Any


@triton.jit
def sigmoid_and_slope(x):
    """s = sigmoid(x) and s * (1 - s), without the cancellation of 1 - s."""
    e = tl.exp(-tl.abs(x))
    r = 1 / (1 + e)
    return tl.where(x >= 0, r, e * r), e * r * r


@triton.jit
def value_and_gradient(grad, x, ACTIVATION: tl.constexpr):
    """f(x) and grad * f'(x)."""
    if ACTIVATION == "gelu_tanh":
        q = LINEAR + CUBIC * x * x
        s, slope = sigmoid_and_slope(x * q)
        value = x * s
        # (xq)' = 3q - 2 LINEAR
        dx = grad * (s + x * slope * (3 * q - 2 * LINEAR))
    elif ACTIVATION == "gelu_erf":
        cdf = 0.5 * (1 + tl.erf(x * RSQRT_2))
        value = x * cdf
        dx = grad * (cdf + x * (tl.exp(-0.5 * x * x) * RSQRT_2PI))
    elif ACTIVATION == "silu":
        s, slope = sigmoid_and_slope(x)
        value = x * s
        dx = grad * (s + x * slope)
    elif ACTIVATION == "sigmoid":
        value, slope = sigmoid_and_slope(x)
        dx = grad * slope
    else:
        tl.static_assert(ACTIVATION == "relu")
        value = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
        dx = tl.where(x <= 0, 0.0, grad)
    return value, dx


@triton.jit
def tile(num_rows, num_features, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Row [BLOCK_N, 1] and feature [1, BLOCK_F] indices of the program's tile, and its mask."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return n, f, (n < num_rows) & (f < num_features)


@triton.jit
def load(rows, n, f, mask, MATH: tl.constexpr):
    return tl.load(rows.pointer + n * rows.stride_N + f * rows.stride_F, mask, other=0.0).to(MATH)


@triton.jit
def store(rows, n, f, mask, value):
    pointers = rows.pointer + n * rows.stride_N + f * rows.stride_F
    tl.store(pointers, value.to(rows.pointer.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    gate,
    up,
    y,
    num_rows,
    num_features,
    ACTIVATION: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """y = f(gate), times up where there is one."""
    n, f, mask = tile(num_rows, num_features, BLOCK_N, BLOCK_F)
    x = load(gate, n, f, mask, MATH)
    value, _ = value_and_gradient(x, x, ACTIVATION)  # the gradient is dead code here
    if up is not None:
        value *= load(up, n, f, mask, MATH)
    store(y, n, f, mask, value)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    grad,
    gate,
    up,
    dgate,
    dup,
    y,
    num_rows,
    num_features,
    ACTIVATION: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dgate = grad * up * f'(gate), dup = grad * f(gate), and the forward's y unless it is None."""
    n, f, mask = tile(num_rows, num_features, BLOCK_N, BLOCK_F)
    dy = load(grad, n, f, mask, MATH)
    x = load(gate, n, f, mask, MATH)
    if up is None:
        value, dx = value_and_gradient(dy, x, ACTIVATION)
    else:
        u = load(up, n, f, mask, MATH)
        value, dx = value_and_gradient(dy * u, x, ACTIVATION)
        store(dup, n, f, mask, dy * value)
        value *= u
    store(dgate, n, f, mask, dx)
    if y is not None:
        store(y, n, f, mask, value)


def forward(gate: Tensor, up: Tensor | None, y: Tensor, activation: str) -> None:
    """Write `y = act(gate) * up`; all [..., F], y contiguous."""
    _launch(forward_kernel, (gate, up, y), activation)


def backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    dgate: Tensor,
    dup: Tensor | None,
    y: Tensor | None,
    activation: str,
) -> None:
    """Write the gradients of gate and up, and y unless it is None; all [..., F].

    Outputs have evenly strided rows: they are contiguous or halves of a contiguous tensor.
    """
    _launch(backward_kernel, (grad, gate, up, dgate, dup, y), activation)


def _launch(kernel: Any, tensors: tuple[Tensor | None, ...], activation: str) -> None:
    like = tensors[0]
    assert like is not None
    if like.numel() == 0:
        return
    num_features = like.shape[-1]
    num_rows = like.numel() // num_features
    block_f = min(triton.next_power_of_2(num_features), MAX_BLOCK_F)
    block_n = TILE // block_f
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(num_rows, block_n), triton.cdiv(num_features, block_f))](
            *(_rows(t) for t in tensors),
            num_rows,
            num_features,
            ACTIVATION=activation,
            MATH=tl.float64 if like.dtype == torch.float64 else tl.float32,
            BLOCK_N=block_n,
            BLOCK_F=block_f,
        )


def _rows(x: Tensor | None) -> Rows | None:
    if x is None:
        return None
    x_NF = x.reshape(-1, x.shape[-1])
    return Rows(x_NF, *x_NF.stride())
