"""Triton kernels of `fxopt::gated_activation`, in parts that its quantized form shares.

Tensors are seen as [N, F]. A program owns tiles of BLOCK_N rows and BLOCK_F features of one stream,
one below the other: one tile, or some where it leaves partial sums of the gradient of a bias.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxopt.kernels import saving
from fxopt.kernels.triton_sizes import LAST, size

# gelu_tanh(x) = x * sigmoid(LINEAR * x + CUBIC * x**3), as 1 + tanh(z) = 2 sigmoid(2z).
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
PACKED = tl.constexpr(saving.BLOCK)
RSQRT_2 = tl.constexpr(math.sqrt(0.5))
RSQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


class Rows(NamedTuple):
    """A tensor seen as [N, F]."""

    pointer: Any
    stride_N: Any
    stride_F: Any


class PackedRows(NamedTuple):
    """Codes of a tensor seen as [N, F]: its features from `start` on, as `fxopt::pack` packs them.

    scales: [N, c]. like: a pointer to values of the dtype that is packed. Kernels tell it from
    `Rows` by its length: with Triton 3.6 neither may hold a None.
    """

    pointer: Any
    stride_N: Any
    stride_F: Any
    scales: Any
    scales_stride_N: Any
    start: Any
    like: Any


class Features(NamedTuple):
    """A contiguous tensor [F]."""

    pointer: Any
    size: Any


class Forward(NamedTuple):
    """Rows and biases of a stream, None where there are none; number of rows `unspecialized`."""

    gate: Any
    up: Any
    gate_bias: Any
    up_bias: Any
    y: Any
    num_rows: Any
    last: Any = LAST


class Backward(NamedTuple):
    """A stream, None where there is nothing to read or to store.

    dgate_bias and dup_bias have a row of partial sums for every program.
    """

    grad: Any
    gate: Any
    up: Any
    gate_bias: Any
    up_bias: Any
    dgate: Any
    dup: Any
    y: Any
    dgate_bias: Any
    dup_bias: Any
    num_rows: Any
    last: Any = LAST


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
    value = tl.load(rows.pointer + n * rows.stride_N + f * rows.stride_F, mask, other=0)
    if len(rows) > 3:
        block = (rows.start + f) // PACKED
        scale = tl.load(rows.scales + n * rows.scales_stride_N + block, mask, other=0.0)
        value = value.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
        value = value.to(rows.like.dtype.element_ty)
    return value.to(MATH)


@triton.jit
def store(rows, n, f, mask, value):
    pointers = rows.pointer + n * rows.stride_N + f * rows.stride_F
    tl.store(pointers, value.to(rows.pointer.dtype.element_ty), mask)


@triton.jit
def load_biased(rows, bias, n, f, mask, MATH: tl.constexpr):
    """Rows plus their bias, if it is not None."""
    value = load(rows, n, f, mask, MATH)
    if bias is not None:
        value += tl.load(bias.pointer + f, f < bias.size, other=0.0).to(MATH)
    return value


@triton.jit
def value_of(
    gate, up, n, f, mask, ACTIVATION: tl.constexpr, MATH: tl.constexpr,
    gate_bias=None, up_bias=None,
):  # fmt: skip
    """f(gate), times up where there is one."""
    x = load_biased(gate, gate_bias, n, f, mask, MATH)
    value, _ = value_and_gradient(x, x, ACTIVATION)  # the gradient is dead code here
    if up is not None:
        value *= load_biased(up, up_bias, n, f, mask, MATH)
    return value


@triton.jit
def gradients(
    grad, gate, up, dgate, dup, n, f, mask, ACTIVATION: tl.constexpr, MATH: tl.constexpr,
    gate_bias=None, up_bias=None,
):  # fmt: skip
    """Store dgate = grad * up * f'(gate) and dup = grad * f(gate).

    Returns `value_of(gate, up)`, dgate, and dup or, without an up, dgate again.
    """
    dy = load(grad, n, f, mask, MATH)
    x = load_biased(gate, gate_bias, n, f, mask, MATH)
    if up is None:
        value, dx = value_and_gradient(dy, x, ACTIVATION)
        du = dx
    else:
        u = load_biased(up, up_bias, n, f, mask, MATH)
        value, dx = value_and_gradient(dy * u, x, ACTIVATION)
        du = dy * value
        store(dup, n, f, mask, du)
        value *= u
    store(dgate, n, f, mask, dx)
    return value, dx, du


@triton.jit
def forward_kernel(
    streams, num_features,
    NUM_STREAMS: tl.constexpr, ACTIVATION: tl.constexpr, MATH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = f(gate), times up where there is one."""
    block = tl.program_id(0)
    for i in tl.static_range(NUM_STREAMS):
        num_rows = size(streams[i].num_rows)
        if (block >= 0) & (block < tl.cdiv(num_rows, BLOCK_N)):
            n, f, mask = tile(block, num_rows, num_features, BLOCK_N, BLOCK_F)
            s = streams[i]
            value = value_of(s.gate, s.up, n, f, mask, ACTIVATION, MATH, s.gate_bias, s.up_bias)
            store(s.y, n, f, mask, value)
        block -= tl.cdiv(num_rows, BLOCK_N)


@triton.jit
def backward_kernel(
    streams, num_features,
    NUM_STREAMS: tl.constexpr, ACTIVATION: tl.constexpr, MATH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dgate = grad * up * f'(gate), dup = grad * f(gate), and the forward's y unless it is None;
    and the sums of dgate and dup over the program's TILES."""
    program = tl.program_id(0)
    for i in tl.static_range(NUM_STREAMS):
        num_rows = size(streams[i].num_rows)
        if (program >= 0) & (program < tl.cdiv(num_rows, BLOCK_N * TILES)):
            _backward_of(
                streams[i], program, num_rows, num_features,
                ACTIVATION, MATH, BLOCK_N, BLOCK_F, TILES,
            )  # fmt: skip
        program -= tl.cdiv(num_rows, BLOCK_N * TILES)


@triton.jit
def _backward_of(
    s, program, num_rows, num_features, ACTIVATION: tl.constexpr, MATH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The program's tiles of a stream."""
    gate_sums = tl.zeros([BLOCK_N, BLOCK_F], MATH)
    up_sums = tl.zeros([BLOCK_N, BLOCK_F], MATH)
    for i in range(TILES):
        n, f, mask = tile(program * TILES + i, num_rows, num_features, BLOCK_N, BLOCK_F)
        value, dx, du = gradients(
            s.grad, s.gate, s.up, s.dgate, s.dup, n, f, mask, ACTIVATION, MATH,
            s.gate_bias, s.up_bias,
        )  # fmt: skip
        if s.y is not None:
            store(s.y, n, f, mask, value)
        if s.dgate_bias is not None:
            gate_sums += tl.where(mask, dx, 0.0)
        if s.dup_bias is not None:
            up_sums += tl.where(mask, du, 0.0)
    n, f, mask = tile(program, program + 1, num_features, 1, BLOCK_F)
    if s.dgate_bias is not None:
        store(s.dgate_bias, n, f, mask, tl.sum(gate_sums, 0, keep_dims=True))
    if s.dup_bias is not None:
        store(s.dup_bias, n, f, mask, tl.sum(up_sums, 0, keep_dims=True))
