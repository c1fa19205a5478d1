"""Triton provider of `fxopt::gated_activation`: one launch forward, one launch backward.

A launch serves one or more streams (text and image, say). Tensors are seen as [N, F]: rows of a
half of a packed projection are read and written where they lie. A program owns a tile of BLOCK_N
rows and BLOCK_F features of one stream.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_tables
from fxopt.kernels.triton_sizes import size, unspecialized

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


class Forward(NamedTuple):
    """Rows of a stream, up None where there is none; their number `unspecialized`."""

    gate: Any
    up: Any
    y: Any
    num_rows: Any


class Backward(NamedTuple):
    """Rows of a stream, None where there is nothing to read or to store."""

    grad: Any
    gate: Any
    up: Any
    dgate: Any
    dup: Any
    y: Any
    num_rows: Any


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
def tile(block, num_rows, num_features, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Row [BLOCK_N, 1] and feature [1, BLOCK_F] indices of the program's tile, and its mask."""
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return n, f, (n < num_rows) & (f < num_features)


@triton.jit
def load(rows, n, f, mask, MATH: tl.constexpr):
    return tl.load(rows.pointer + n * rows.stride_N + f * rows.stride_F, mask, other=0.0).to(MATH)


@triton.jit
def store(rows, n, f, mask, value):
    pointers = rows.pointer + n * rows.stride_N + f * rows.stride_F
    tl.store(pointers, value.to(rows.pointer.dtype.element_ty), mask)


@triton.jit
def value_of(gate, up, n, f, mask, ACTIVATION: tl.constexpr, MATH: tl.constexpr):
    """f(gate), times up where there is one."""
    x = load(gate, n, f, mask, MATH)
    value, _ = value_and_gradient(x, x, ACTIVATION)  # the gradient is dead code here
    if up is not None:
        value *= load(up, n, f, mask, MATH)
    return value


@triton.jit
def gradients(
    grad, gate, up, dgate, dup, n, f, mask, ACTIVATION: tl.constexpr, MATH: tl.constexpr
):  # fmt: skip
    """Store dgate = grad * up * f'(gate) and dup = grad * f(gate); returns `value_of(gate, up)`."""
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
    return value


@triton.jit
def forward_kernel(
    streams, num_features, ACTIVATION: tl.constexpr, MATH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = f(gate), times up where there is one."""
    block = tl.program_id(0)
    for i in tl.static_range(len(streams)):
        num_rows = size(streams[i].num_rows)
        if (block >= 0) & (block < tl.cdiv(num_rows, BLOCK_N)):
            n, f, mask = tile(block, num_rows, num_features, BLOCK_N, BLOCK_F)
            s = streams[i]
            store(s.y, n, f, mask, value_of(s.gate, s.up, n, f, mask, ACTIVATION, MATH))
        block -= tl.cdiv(num_rows, BLOCK_N)


@triton.jit
def backward_kernel(
    streams, num_features, ACTIVATION: tl.constexpr, MATH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dgate = grad * up * f'(gate), dup = grad * f(gate), and the forward's y unless it is None."""
    block = tl.program_id(0)
    for i in tl.static_range(len(streams)):
        num_rows = size(streams[i].num_rows)
        if (block >= 0) & (block < tl.cdiv(num_rows, BLOCK_N)):
            n, f, mask = tile(block, num_rows, num_features, BLOCK_N, BLOCK_F)
            s = streams[i]
            value = gradients(s.grad, s.gate, s.up, s.dgate, s.dup, n, f, mask, ACTIVATION, MATH)
            if s.y is not None:
                store(s.y, n, f, mask, value)
        block -= tl.cdiv(num_rows, BLOCK_N)


def forward(streams: Sequence[tuple[Tensor | None, ...]], activation: str) -> None:
    """Write `y = act(gate) * up` for (gate, up, y) of each stream; all [..., F], y contiguous."""
    _launch("forward", streams, activation)


def backward(streams: Sequence[tuple[Tensor | None, ...]], activation: str) -> None:
    """Write the gradients of gate and up, and y unless it is None, of each stream.

    A stream is (grad, gate, up, dgate, dup, y), all [..., F]. Outputs have evenly strided rows:
    they are contiguous or halves of a contiguous tensor.
    """
    _launch("backward", streams, activation)


KERNELS: dict[str, tuple[Any, type[Forward | Backward]]] = {
    "forward": (forward_kernel, Forward),
    "backward": (backward_kernel, Backward),
}


def _launch(which: str, streams: Sequence[tuple[Tensor | None, ...]], activation: str) -> None:
    kernel, kind = KERNELS[which]
    firsts = [s[0] for s in streams if s[0] is not None]
    like, num_features = firsts[0], firsts[0].shape[-1]
    if not any(t.numel() for t in firsts):
        return
    num_rows = [t.numel() // num_features for t in firsts]
    name = f"gated_activation {which}"
    chosen = triton_tables.parameters(name, num_features, sum(num_rows), like)
    block_f = min(triton.next_power_of_2(num_features), chosen["columns"])
    block_n = chosen["tile"] // block_f
    num_blocks = sum(triton.cdiv(n, block_n) for n in num_rows)
    with torch.cuda.device_of(like):
        kernel[(num_blocks, triton.cdiv(num_features, block_f))](
            tuple(
                kind._make((*map(rows_of, s), unspecialized(n)))
                for s, n in zip(streams, num_rows, strict=True)
            ),
            num_features,
            ACTIVATION=activation,
            MATH=tl.float64 if like.dtype == torch.float64 else tl.float32,
            BLOCK_N=block_n,
            BLOCK_F=block_f,
            num_warps=chosen["num_warps"],
        )


def rows_of(x: Tensor | None) -> Rows | None:
    """View a tensor [..., F] as `Rows`."""
    if x is None:
        return None
    x_NF = x.reshape(-1, x.shape[-1])
    return Rows(x_NF, *x_NF.stride())
