"""Triton kernels of `fxopt::qk_norm_rope`; `triton_qk_norm_rope` launches them.

A program belongs to one section. In the forward it owns some heads of one token (all heads for a
norm across them) and reads the strided view of the merged projection where it lies. The backward
has a fixed number of programs per device, shared out by rows; each walks over tokens, keeps its
share of the parameters' gradients in registers and stores it once. A second launch adds up the
shares of all parameters, so the reduction is deterministic.

Tiles are [H, P]: heads of the program by pairs of a head, both padded to powers of two. A tile p
holds the first members of the rotated pairs and its twin q the second members.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxopt.kernels.triton_pairs import (
    group_mean,
    load_codes,
    load_head_pairs,
    load_pairs,
    load_parameter,
    load_rotation,
    statistic,
    store_codes,
    store_pairs,
)
from fxopt.kernels.triton_quantize_kernels import magnitude, raise_to
from fxopt.kernels.triton_sizes import LAST, size


class Config(NamedTuple):
    """What is compiled in: fixed by the model, independent of batch and tokens."""

    NUM_HEADS: tl.constexpr
    D: tl.constexpr
    NUM_GROUPS: tl.constexpr
    NUM_BLOCKS: tl.constexpr
    H: tl.constexpr
    P: tl.constexpr
    NORM: tl.constexpr
    ACROSS_HEADS: tl.constexpr
    INTERLEAVED: tl.constexpr
    WEIGHT_OFFSET: tl.constexpr
    MATH: tl.constexpr
    EPS: tl.constexpr
    ROTARY_DIM: tl.constexpr
    TABLES: tl.constexpr
    TABLE_PER_HEAD: tl.constexpr
    ROTATES_SOME: tl.constexpr


class Inputs(NamedTuple):
    """A section: pointers (None where absent) and their strides over (B, S, H, element).

    rotated: the first token that has a row of the tables and the one behind the last; None where
    all have. y is its part of the output, or of the output's gradient. Codes and scales are those
    of x, as `fxopt::pack` makes them: left by the forward, and read in place of x by the backward.
    """

    x: Any
    x_strides: Any
    codes: Any
    scales: Any
    x_bias: Any
    weight: Any
    bias: Any
    cos: Any
    cos_strides: Any
    sin: Any
    sin_strides: Any
    rotated: Any
    y: Any
    y_strides: Any
    last: Any = LAST


class Gradients(NamedTuple):
    """Where a section's gradients go: dx [B, S, H, D], and a row of partial sums per program; seen
    is raised to the magnitude of dx, None for nowhere."""

    dx: Any
    dx_bias: Any
    dweight: Any
    dbias: Any
    seen: Any
    last: Any = LAST


@triton.jit
def _load_x(s, batch, token, heads_H1, c):
    """x of one token."""
    heads = heads_H1.to(tl.int64)
    x_ptr = s.x + batch * s.x_strides[0] + token * s.x_strides[1] + heads * s.x_strides[2]
    return load_pairs(x_ptr, heads_H1, s.x_strides[3], c)


@triton.jit
def _biased(s, p, q, heads_H1, c):
    if s.x_bias is not None:
        bias_p, bias_q = load_head_pairs(s.x_bias, heads_H1, c)
        p += bias_p
        q += bias_q
    return p, q


@triton.jit
def _forward_token(s, mean_ptr, rstd_ptr, row, block, num_tokens, c):
    heads_H1 = block * c.H + tl.arange(0, c.H)[:, None]
    batch = (row // num_tokens).to(tl.int64)
    token = (row % num_tokens).to(tl.int64)
    p, q = _load_x(s, batch, token, heads_H1, c)
    if s.codes is not None:
        store_codes(s.codes, s.scales, row, block, heads_H1, p, q, c)
    p, q = _biased(s, p, q, heads_H1, c)
    stat, stat_mask = statistic(row.to(tl.int64), heads_H1, c)
    if c.NORM == "layer":
        mean = group_mean(p, q, c)
        inside = (heads_H1 < c.NUM_HEADS) & (tl.arange(0, c.P)[None, :] < c.D // 2)
        if s.x.dtype.element_ty == tl.float32:
            # What the sum rounded off, or heads of one value have a variance. Sums of 16-bit values
            # round nothing off there.
            mean += group_mean(tl.where(inside, p - mean, 0.0), tl.where(inside, q - mean, 0.0), c)
        p = tl.where(inside, p - mean, 0.0)
        q = tl.where(inside, q - mean, 0.0)
        tl.store(mean_ptr + stat, mean, mask=stat_mask)
    if c.NORM != "none":
        rstd = tl.rsqrt(group_mean(p * p, q * q, c) + c.EPS)
        p *= rstd
        q *= rstd
        tl.store(rstd_ptr + stat, rstd, mask=stat_mask)
    if s.weight is not None:
        weight_p, weight_q = load_parameter(s.weight, heads_H1, c)
        p *= weight_p + c.WEIGHT_OFFSET
        q *= weight_q + c.WEIGHT_OFFSET
    if s.bias is not None:
        bias_p, bias_q = load_parameter(s.bias, heads_H1, c)
        p += bias_p
        q += bias_q
    if s.cos is not None:
        cos_p, cos_q, sin_p, sin_q = load_rotation(s, batch, token, heads_H1, c)
        p, q = p * cos_p - q * sin_p, q * cos_q + p * sin_q
    y_ptr = s.y + batch * s.y_strides[0] + token * s.y_strides[1]
    store_pairs(y_ptr + heads_H1 * c.D, heads_H1, p, q, c)


@triton.jit
def forward(
    sections, configs, mean_ptr, rstd_ptr, num_rows, num_tokens, NUM_SECTIONS: tl.constexpr
):
    program = tl.program_id(0)
    group = tl.zeros((), tl.int64)
    for i in tl.static_range(NUM_SECTIONS):
        num_rows_i = size(num_rows[i])
        num_programs = num_rows_i * configs[i].NUM_BLOCKS
        if (program >= 0) & (program < num_programs):
            _forward_token(
                sections[i],
                mean_ptr + group,
                rstd_ptr + group,
                program // configs[i].NUM_BLOCKS,
                program % configs[i].NUM_BLOCKS,
                size(num_tokens[i]),
                configs[i],
            )
        program -= num_programs
        group += num_rows_i.to(tl.int64) * configs[i].NUM_GROUPS


@triton.jit
def _store_partial(ptr, walker, block, heads_H1, p, q, c):
    """Store the program's sums over its tokens, and over its heads unless the norm is across."""
    if c.ACROSS_HEADS:
        store_pairs(ptr + (walker * c.NUM_HEADS + heads_H1) * c.D, heads_H1, p, q, c)
    else:
        first_H1 = tl.zeros((1, 1), tl.int32)
        p = tl.sum(p, axis=0, keep_dims=True)
        q = tl.sum(q, axis=0, keep_dims=True)
        row = walker * c.NUM_BLOCKS + block
        store_pairs(ptr + row * c.D + first_H1, first_H1, p, q, c)


@triton.jit
def _magnitude(ptr, heads_H1, p, q, c):
    """Bits of the largest magnitude of what `store_pairs` stores."""
    inside = (heads_H1 < c.NUM_HEADS) & (tl.arange(0, c.P)[None, :] < c.D // 2)
    bits_p = magnitude(p.to(ptr.dtype.element_ty).to(tl.float32))
    bits_q = magnitude(q.to(ptr.dtype.element_ty).to(tl.float32))
    return tl.max(tl.max(tl.where(inside, tl.maximum(bits_p, bits_q), 0), 1), 0)


@triton.jit
def _backward_section(
    s, to, mean_ptr, rstd_ptr, walker, num_walkers, block, num_rows, num_tokens, c
):
    """Gradients of the rows `walker`, `walker + num_walkers`, ... of a section."""
    heads_H1 = block * c.H + tl.arange(0, c.H)[:, None]
    heads = heads_H1.to(tl.int64)
    dweight_p = tl.zeros((c.H, c.P), c.MATH)
    dweight_q = tl.zeros((c.H, c.P), c.MATH)
    dbias_p = tl.zeros((c.H, c.P), c.MATH)
    dbias_q = tl.zeros((c.H, c.P), c.MATH)
    dx_bias_p = tl.zeros((c.H, c.P), c.MATH)
    dx_bias_q = tl.zeros((c.H, c.P), c.MATH)
    largest = tl.zeros((), tl.int32)
    for i in tl.range(walker, num_rows, num_walkers):
        batch = (i // num_tokens).to(tl.int64)
        token = (i % num_tokens).to(tl.int64)
        row = batch * num_tokens + token
        y_ptr = s.y + batch * s.y_strides[0] + token * s.y_strides[1] + heads * s.y_strides[2]
        g_p, g_q = load_pairs(y_ptr, heads_H1, s.y_strides[3], c)
        if s.cos is not None:
            cos_p, cos_q, sin_p, sin_q = load_rotation(s, batch, token, heads_H1, c)
            g_p, g_q = g_p * cos_p + g_q * sin_q, g_q * cos_q - g_p * sin_p
        if s.codes is not None:
            x_p, x_q = load_codes(s.codes, s.scales, s.x, row, heads_H1, c)
        else:
            x_p, x_q = _load_x(s, batch, token, heads_H1, c)
        x_p, x_q = _biased(s, x_p, x_q, heads_H1, c)
        stat, stat_mask = statistic(row, heads_H1, c)
        if c.NORM == "layer":
            mean = tl.load(mean_ptr + stat, mask=stat_mask, other=0.0)
            x_p -= mean
            x_q -= mean
        if c.NORM != "none":
            rstd = tl.load(rstd_ptr + stat, mask=stat_mask, other=0.0)
            x_p *= rstd
            x_q *= rstd
        if to.dweight is not None:
            dweight_p += g_p * x_p
            dweight_q += g_q * x_q
        if to.dbias is not None:
            dbias_p += g_p
            dbias_q += g_q
        if to.dx is not None or to.dx_bias is not None:
            if s.weight is not None:
                weight_p, weight_q = load_parameter(s.weight, heads_H1, c)
                g_p *= weight_p + c.WEIGHT_OFFSET
                g_q *= weight_q + c.WEIGHT_OFFSET
            if c.NORM != "none":
                along_x = group_mean(g_p * x_p, g_q * x_q, c)
                along_1 = group_mean(g_p, g_q, c) if c.NORM == "layer" else 0.0
                g_p = (g_p - along_x * x_p - along_1) * rstd
                g_q = (g_q - along_x * x_q - along_1) * rstd
        if to.dx_bias is not None:
            dx_bias_p += g_p
            dx_bias_q += g_q
        if to.dx is not None:
            store_pairs(to.dx + (row * c.NUM_HEADS + heads) * c.D, heads_H1, g_p, g_q, c)
            if to.seen is not None:
                largest = tl.maximum(largest, _magnitude(to.dx, heads_H1, g_p, g_q, c))
    if to.dx is not None and to.seen is not None:
        raise_to(to.seen, largest)
    if to.dx_bias is not None:
        dx_bias_ptr = to.dx_bias + (walker * c.NUM_HEADS + heads_H1) * c.D
        store_pairs(dx_bias_ptr, heads_H1, dx_bias_p, dx_bias_q, c)
    if to.dweight is not None:
        _store_partial(to.dweight, walker, block, heads_H1, dweight_p, dweight_q, c)
    if to.dbias is not None:
        _store_partial(to.dbias, walker, block, heads_H1, dbias_p, dbias_q, c)


@triton.jit
def backward(
    sections, targets, configs, mean_ptr, rstd_ptr, num_rows, num_tokens, num_walkers,
    NUM_SECTIONS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = tl.zeros((), tl.int64)
    for i in tl.static_range(NUM_SECTIONS):
        num_rows_i = size(num_rows[i])
        num_programs = size(num_walkers[i]) * configs[i].NUM_BLOCKS
        if (program >= 0) & (program < num_programs):
            _backward_section(
                sections[i],
                targets[i],
                mean_ptr + group,
                rstd_ptr + group,
                program // configs[i].NUM_BLOCKS,
                size(num_walkers[i]),
                program % configs[i].NUM_BLOCKS,
                num_rows_i,
                size(num_tokens[i]),
                configs[i],
            )
        program -= num_programs
        group += num_rows_i.to(tl.int64) * configs[i].NUM_GROUPS
