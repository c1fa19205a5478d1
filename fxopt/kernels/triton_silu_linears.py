"""Triton provider of `fxopt::silu_products`: linears on the SiLU of a few rows.

A weight is read once, whatever there are of rows: its bytes are what such a product costs.

Shape suffixes: B rows, padded to MAX_ROWS; K input features; N output features of a linear.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.silu_linears import MAX_ROWS

# Two tiles of bf16 on their way are 32 KB. Each warp computes all of a tile's SiLU, which the
# features of its program share.
FORWARD = {"OUT": 64, "IN": 128, "num_warps": 4, "num_stages": 3}
# STEPS tiles for a partial sum, which is 4 bytes for each sample and input feature, beside 2 KB of
# weights and their gradients.
BACKWARD = {"OUT": 64, "IN": 128, "STEPS": 8, "num_warps": 8, "num_stages": 2}
FINISH = {"PARTS": 16, "COLS": 64}  # of a tile of partial sums


class Linear(NamedTuple):
    """weight [N, K], bias [N] or None, y [B, N], all contiguous."""

    weight: Any
    bias: Any
    y: Any
    N: tl.constexpr


class Piece(NamedTuple):
    """Some rows of a weight, and the gradient [B, N] of what they make, all contiguous."""

    grad: Any
    weight: Any
    dweight: Any
    dbias: Any
    N: tl.constexpr


@triton.jit
def silu_of(x, rows_B, cols_K, num_rows, K: tl.constexpr):
    """silu(x) [B, K], in x's dtype."""
    mask = (rows_B < num_rows)[:, None] & (cols_K < K)[None, :]
    x_BK = tl.load(x + rows_B[:, None] * K + cols_K[None, :], mask, other=0.0)
    wide_BK = x_BK.to(tl.float32)
    return (wide_BK / (1.0 + tl.exp(-wide_BK))).to(x_BK.dtype)


@triton.jit
def products(
    linear,
    x,
    block,
    num_rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """OUT features of one linear."""
    rows_B, outs_N = tl.arange(0, ROWS), block * OUT + tl.arange(0, OUT)
    inside_N = outs_N < linear.N
    y_BN = tl.zeros((ROWS, OUT), tl.float32)
    for start in tl.range(0, K, IN):
        cols_K = start + tl.arange(0, IN)
        a_BK = silu_of(x, rows_B, cols_K, num_rows, K)
        offsets = outs_N.to(tl.int64)[:, None] * K + cols_K[None, :]
        mask = inside_N[:, None] & (cols_K < K)[None, :]
        w_NK = tl.load(linear.weight + offsets, mask, other=0.0)
        y_BN = tl.dot(a_BK, w_NK.T, y_BN, input_precision="ieee")
    if linear.bias is not None:
        y_BN += tl.load(linear.bias + outs_N, inside_N, other=0.0).to(tl.float32)[None, :]
    mask = (rows_B < num_rows)[:, None] & inside_N[None, :]
    place = linear.y + rows_B[:, None] * linear.N + outs_N[None, :]
    tl.store(place, y_BN.to(linear.y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def products_kernel(
    linears,
    x,
    num_rows,
    K: tl.constexpr,
    NUM: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """y = silu(x) W^T + b of all linears; a program owns OUT features of one."""
    block = tl.program_id(0)
    for i in tl.static_range(NUM):
        num_blocks = tl.cdiv(linears[i].N, OUT)
        if (block >= 0) & (block < num_blocks):
            products(linears[i], x, block, num_rows, K, ROWS, OUT, IN)
        block -= num_blocks


@triton.jit(do_not_specialize=["num_rows"])
def gradients_kernel(
    pieces,
    x,
    partial,
    num_rows,
    K: tl.constexpr,
    NUM: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gradients of STEPS * OUT rows of a weight, at IN columns, and what these add to the input's.

    A partial sum [B, K] for each such share of the rows goes to `partial`.
    """
    program, block = tl.program_id(0), tl.program_id(0)
    grad, weight, dweight, dbias = (
        pieces[0].grad,
        pieces[0].weight,
        pieces[0].dweight,
        pieces[0].dbias,
    )
    num_outs = tl.full((), pieces[0].N, tl.int32)
    start = 0
    for i in tl.static_range(1, NUM):
        start += tl.cdiv(pieces[i - 1].N, OUT * STEPS)
        if program >= start:
            grad, weight = pieces[i].grad, pieces[i].weight
            dweight, dbias = pieces[i].dweight, pieces[i].dbias
            num_outs = tl.full((), pieces[i].N, tl.int32)
            block = program - start
    rows_B, cols_K = tl.arange(0, ROWS), tl.program_id(1) * IN + tl.arange(0, IN)
    inside_B, inside_K = rows_B < num_rows, cols_K < K
    a_BK = silu_of(x, rows_B, cols_K, num_rows, K)
    da_BK = tl.zeros((ROWS, IN), tl.float32)
    for step in tl.range(0, STEPS):
        outs_N = (block * STEPS + step) * OUT + tl.arange(0, OUT)
        inside_N = outs_N < num_outs
        place = grad + rows_B[:, None] * num_outs + outs_N[None, :]
        g_BN = tl.load(place, inside_B[:, None] & inside_N[None, :], other=0.0)
        offsets = outs_N.to(tl.int64)[:, None] * K + cols_K[None, :]
        mask = inside_N[:, None] & inside_K[None, :]
        if HAS_INPUT:
            w_NK = tl.load(weight + offsets, mask, other=0.0)
            da_BK = tl.dot(g_BN, w_NK, da_BK, input_precision="ieee")
        if HAS_WEIGHT:
            dw_NK = tl.dot(g_BN.T, a_BK, input_precision="ieee")
            tl.store(dweight + offsets, dw_NK.to(dweight.dtype.element_ty), mask)
        if HAS_BIAS and tl.program_id(1) == 0:
            db_N = tl.sum(g_BN.to(tl.float32), 0)
            tl.store(dbias + outs_N, db_N.to(dbias.dtype.element_ty), inside_N)
    if HAS_INPUT:
        place = partial + program * num_rows * K + rows_B[:, None] * K + cols_K[None, :]
        tl.store(place, da_BK, inside_B[:, None] & inside_K[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    partial,
    x,
    dx,
    num_rows,
    K: tl.constexpr,
    NUM: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx = silu'(x) * the sum of NUM partial sums; a program owns COLS elements of a row."""
    row, cols = tl.program_id(1), tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    mask = cols < K
    total = tl.zeros((PARTS, COLS), tl.float32)
    for start in tl.range(0, NUM, PARTS):
        parts = start + tl.arange(0, PARTS)[:, None]
        place = partial + (parts * num_rows + row) * K + cols
        total += tl.load(place, mask & (parts < NUM), other=0.0)
    value = tl.load(x + row * K + cols, mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-value))
    slope = sigmoid * (1.0 + value * (1.0 - sigmoid))
    found = tl.sum(total, axis=0, keep_dims=True) * slope
    tl.store(dx + row * K + cols, found.to(dx.dtype.element_ty), mask)


def forward(
    x_BK: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], ys: Sequence[Tensor]
) -> None:
    """Write `ys` in one launch."""
    linears = tuple(
        Linear(w.contiguous(), None if b is None else b.contiguous(), y, tl.constexpr(len(w)))
        for w, b, y in zip(weights, biases, ys, strict=True)
    )
    grid = (sum(triton.cdiv(len(w), FORWARD["OUT"]) for w in weights),)
    with torch.cuda.device_of(x_BK):
        products_kernel[grid](
            *(linears, x_BK.contiguous(), len(x_BK)),
            K=x_BK.shape[1],
            NUM=len(linears),
            ROWS=MAX_ROWS,
            **FORWARD,
        )


def backward(
    pieces: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]],
    x_BK: Tensor,
    dx_BK: Tensor | None,
) -> None:
    """Write the gradients of each (grad, weight, dweight, dbias), and dx, in one launch or two.

    dweight and dbias are there for all pieces or for none.
    """
    (num_rows, num_features), x_BK = x_BK.shape, x_BK.contiguous()
    _, _, has_weight, has_bias = (t is not None for t in pieces[0])
    given = tuple(
        Piece(
            *(grad.contiguous(), weight.contiguous()),
            *(weight if dweight is None else dweight, weight if dbias is None else dbias),
            tl.constexpr(len(weight)),
        )
        for grad, weight, dweight, dbias in pieces
    )
    share = BACKWARD["OUT"] * BACKWARD["STEPS"]
    num_shares = sum(triton.cdiv(len(weight), share) for _, weight, *_ in pieces)
    partial = x_BK
    if dx_BK is not None:
        partial = x_BK.new_empty((num_shares, num_rows, num_features), dtype=torch.float32)
    with torch.cuda.device_of(x_BK):
        gradients_kernel[(num_shares, triton.cdiv(num_features, BACKWARD["IN"]))](
            *(given, x_BK, partial, num_rows),
            K=num_features,
            NUM=len(given),
            HAS_INPUT=dx_BK is not None,
            HAS_WEIGHT=has_weight,
            HAS_BIAS=has_bias,
            ROWS=MAX_ROWS,
            **BACKWARD,
        )
        if dx_BK is not None:
            finish_kernel[(triton.cdiv(num_features, FINISH["COLS"]), num_rows)](
                *(partial, x_BK, dx_BK, num_rows), K=num_features, NUM=num_shares, **FINISH
            )
