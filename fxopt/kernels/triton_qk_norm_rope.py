"""Triton provider of `fxopt::qk_norm_rope`: one launch forward, one launch and a sum backward.

A program of the forward owns some heads of one token (all heads for a norm across them) and reads
the strided view of the merged projection where it lies. The backward has a fixed number of programs
per device; each walks over tokens, keeps its share of the weight and bias gradients in registers
and stores it once, so the reduction is deterministic.

Tiles are [H, P]: heads of the program by pairs of a head, both padded to powers of two. A tile p
holds the first members of the rotated pairs and its twin q the second members.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.qk_norm_rope import Arguments, Section, outputs, split_backward_arguments
from fxopt.kernels.triton_pairs import (
    group_mean,
    load_pairs,
    load_parameter,
    load_table,
    statistic,
    store_pairs,
)

MAX_TILE = 4096  # elements of a program, unless a norm across the heads needs more
WARPS_PER_SM = 16  # of the backward: few partial sums, enough loads in flight
MATH = {torch.float32: tl.float32, torch.float64: tl.float64}


class Inputs(NamedTuple):
    """A section: pointers (None where absent) and their strides over (B, S, H, element)."""

    x: Any
    x_strides: Any
    weight: Any
    bias: Any
    cos: Any
    cos_strides: Any
    sin: Any
    sin_strides: Any
    EPS: tl.constexpr
    TABLE_WIDTH: tl.constexpr
    TABLE_PER_HEAD: tl.constexpr


class Incoming(NamedTuple):
    """What the backward of either section reads besides its inputs."""

    grad: Any
    grad_strides: Any
    mean: Any
    rstd: Any


class Gradients(NamedTuple):
    """Where a section's gradients go: dx [B, S, H, D], and a row of partial sums per program."""

    dx: Any
    dweight: Any
    dbias: Any


class Config(NamedTuple):
    """What is compiled in: fixed by the model, independent of batch and tokens."""

    NUM_HEADS: tl.constexpr
    D: tl.constexpr
    H: tl.constexpr
    P: tl.constexpr
    NORM: tl.constexpr
    ACROSS_HEADS: tl.constexpr
    INTERLEAVED: tl.constexpr
    WEIGHT_OFFSET: tl.constexpr
    MATH: tl.constexpr


@triton.jit
def _forward_token(s, batch, token, row, heads_H1, out_ptr, mean_ptr, rstd_ptr, c):
    heads = heads_H1.to(tl.int64)
    x_ptr = s.x + batch * s.x_strides[0] + token * s.x_strides[1] + heads * s.x_strides[2]
    p, q = load_pairs(x_ptr, heads_H1, s.x_strides[3], c)
    stat, stat_mask = statistic(row, heads_H1, c)
    if c.NORM == "layer":
        mean = group_mean(p, q, c)
        inside = (heads_H1 < c.NUM_HEADS) & (tl.arange(0, c.P)[None, :] < c.D // 2)
        p = tl.where(inside, p - mean, 0.0)
        q = tl.where(inside, q - mean, 0.0)
        tl.store(mean_ptr + stat, mean, mask=stat_mask)
    if c.NORM != "none":
        rstd = tl.rsqrt(group_mean(p * p, q * q, c) + s.EPS)
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
        cos_p, cos_q = load_table(s.cos, s.cos_strides, batch, token, heads_H1, s, c)
        sin_p, sin_q = load_table(s.sin, s.sin_strides, batch, token, heads_H1, s, c)
        p, q = p * cos_p - q * sin_p, q * cos_q + p * sin_q
    store_pairs(out_ptr + (row * c.NUM_HEADS + heads) * c.D, heads_H1, p, q, c)


@triton.jit(do_not_specialize=["num_first", "num_second"])
def _forward(first, second, out_ptr, mean_ptr, rstd_ptr, num_first, num_second, c):
    row = tl.program_id(0)
    heads_H1 = tl.program_id(1) * c.H + tl.arange(0, c.H)[:, None]
    batch = (row // (num_first + num_second)).to(tl.int64)
    token = (row % (num_first + num_second)).to(tl.int64)
    row = row.to(tl.int64)
    if token < num_first:
        _forward_token(first, batch, token, row, heads_H1, out_ptr, mean_ptr, rstd_ptr, c)
    elif second is not None:
        token -= num_first
        _forward_token(second, batch, token, row, heads_H1, out_ptr, mean_ptr, rstd_ptr, c)


@triton.jit
def _store_partial(ptr, heads_H1, p, q, c):
    """Store the program's sums over its tokens, and over its heads unless the norm is across."""
    if ptr is not None:
        if c.ACROSS_HEADS:
            ptr += tl.program_id(0) * c.NUM_HEADS * c.D + heads_H1 * c.D
            store_pairs(ptr, heads_H1, p, q, c)
        else:
            program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            first_H1 = tl.zeros((1, 1), tl.int32)
            p = tl.sum(p, axis=0, keep_dims=True)
            q = tl.sum(q, axis=0, keep_dims=True)
            store_pairs(ptr + program * c.D + first_H1, first_H1, p, q, c)


@triton.jit
def _backward_section(s, to, incoming, num_batches, start, num_tokens, num_all, c):
    """Gradients of the tokens `start` to `start + num_tokens` of every sample."""
    heads_H1 = tl.program_id(1) * c.H + tl.arange(0, c.H)[:, None]
    heads = heads_H1.to(tl.int64)
    dweight_p = tl.zeros((c.H, c.P), c.MATH)
    dweight_q = tl.zeros((c.H, c.P), c.MATH)
    dbias_p = tl.zeros((c.H, c.P), c.MATH)
    dbias_q = tl.zeros((c.H, c.P), c.MATH)
    for i in tl.range(tl.program_id(0), num_batches * num_tokens, tl.num_programs(0)):
        batch = (i // num_tokens).to(tl.int64)
        token = (i % num_tokens).to(tl.int64)
        row = batch * num_all + start + token
        strides = incoming.grad_strides
        g_ptr = incoming.grad + batch * strides[0] + (start + token) * strides[1]
        g_p, g_q = load_pairs(g_ptr + heads * strides[2], heads_H1, strides[3], c)
        if s.cos is not None:
            cos_p, cos_q = load_table(s.cos, s.cos_strides, batch, token, heads_H1, s, c)
            sin_p, sin_q = load_table(s.sin, s.sin_strides, batch, token, heads_H1, s, c)
            g_p, g_q = g_p * cos_p + g_q * sin_q, g_q * cos_q - g_p * sin_p
        x_ptr = s.x + batch * s.x_strides[0] + token * s.x_strides[1] + heads * s.x_strides[2]
        x_p, x_q = load_pairs(x_ptr, heads_H1, s.x_strides[3], c)
        stat, stat_mask = statistic(row, heads_H1, c)
        if c.NORM == "layer":
            mean = tl.load(incoming.mean + stat, mask=stat_mask, other=0.0)
            x_p -= mean
            x_q -= mean
        if c.NORM != "none":
            rstd = tl.load(incoming.rstd + stat, mask=stat_mask, other=0.0)
            x_p *= rstd
            x_q *= rstd
        dweight_p += g_p * x_p
        dweight_q += g_q * x_q
        dbias_p += g_p
        dbias_q += g_q
        if to.dx is not None:
            if s.weight is not None:
                weight_p, weight_q = load_parameter(s.weight, heads_H1, c)
                g_p *= weight_p + c.WEIGHT_OFFSET
                g_q *= weight_q + c.WEIGHT_OFFSET
            if c.NORM != "none":
                along_x = group_mean(g_p * x_p, g_q * x_q, c)
                along_1 = group_mean(g_p, g_q, c) if c.NORM == "layer" else 0.0
                g_p = (g_p - along_x * x_p - along_1) * rstd
                g_q = (g_q - along_x * x_q - along_1) * rstd
            dx_ptr = to.dx + ((batch * num_tokens + token) * c.NUM_HEADS + heads) * c.D
            store_pairs(dx_ptr, heads_H1, g_p, g_q, c)
    _store_partial(to.dweight, heads_H1, dweight_p, dweight_q, c)
    _store_partial(to.dbias, heads_H1, dbias_p, dbias_q, c)


@triton.jit(do_not_specialize=["num_batches", "num_first", "num_second"])
def _backward(first, second, to_first, to_second, incoming, num_batches, num_first, num_second, c):
    num_all = num_first + num_second
    _backward_section(first, to_first, incoming, num_batches, 0, num_first, num_all, c)
    if second is not None:
        _backward_section(
            second, to_second, incoming, num_batches, num_first, num_second, num_all, c
        )


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fxopt::qk_norm_rope` in one launch."""
    a = Arguments(*args)
    out, mean, rstd = outputs(a)
    config, num_blocks, num_warps = _plan(a)
    grid = (out.shape[0] * out.shape[1], num_blocks)
    with torch.cuda.device_of(a.x):
        _forward[grid](*_inputs(a), out, mean, rstd, *_num_tokens(a), config, num_warps=num_warps)
    return out, mean, rstd


def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """`fxopt::qk_norm_rope_backward` in one launch, and a sum per weight and bias."""
    a, mean, rstd, needs = split_backward_arguments(args)
    config, num_blocks, num_warps = _plan(a)
    # The gradient sums double the registers of a tile: half as many elements per thread.
    num_warps = min(16, 2 * num_warps)
    num_rows = grad.shape[0] * max(_num_tokens(a))
    num_programs = max(1, min(num_rows, _num_resident(a.x.device, num_warps) // num_blocks))
    targets: list[Tensor | None] = []
    for i, (t, need) in enumerate(zip(a.differentiable, needs, strict=True)):
        if t is None or not need:
            targets.append(None)
        elif i % 3 == 0:
            targets.append(t.new_empty(t.shape))
        else:
            targets.append(t.new_empty((num_programs * num_blocks, *t.shape), dtype=a.math))
    with torch.cuda.device_of(a.x):
        _backward[(num_programs, num_blocks)](
            *_inputs(a),
            Gradients(*targets[:3]),
            Gradients(*targets[3:]),
            Incoming(grad, grad.stride(), mean, rstd),
            grad.shape[0],
            *_num_tokens(a),
            config,
            num_warps=num_warps,
        )
    return tuple(
        a.x.new_empty(0) if g is None or t is None else g if i % 3 == 0 else g.sum(0).to(t.dtype)
        for i, (g, t) in enumerate(zip(targets, a.differentiable, strict=True))
    )


def _plan(a: Arguments) -> tuple[Config, int, int]:
    """(what to compile, programs along the heads, warps per program)."""
    _, _, num_heads, dim = a.x.shape
    if dim % 2:
        raise ValueError(f"qk_norm_rope works on pairs, but the head dim is {dim}: pad it to even")
    pairs = triton.next_power_of_2(dim // 2)
    heads = triton.next_power_of_2(num_heads)
    if not a.across_heads:
        # The fewest padded heads, then the fewest programs: 24 heads of 128 are 3 blocks of 8.
        sizes = [1 << i for i in range(heads.bit_length()) if (2 * pairs << i) <= MAX_TILE]
        heads = min(sizes, key=lambda size: (-(-num_heads // size) * size, -size))
    interleaved = a.rotation == "interleaved"
    compiled = (num_heads, dim, heads, pairs, a.norm, a.across_heads, interleaved)
    config = Config(*map(tl.constexpr, (*compiled, a.weight_offset, MATH[a.math])))
    # 16 elements per thread.
    num_warps = max(1, min(16, 2 * heads * pairs // (16 * 32)))
    return config, -(-num_heads // heads), num_warps


def _inputs(a: Arguments) -> list[Inputs | None]:
    return ([_section_inputs(s, a.rotation) for s in a.sections] + [None])[:2]


def _section_inputs(s: Section, rotation: str) -> Inputs:
    weight, bias = (None if t is None else t.contiguous() for t in (s.weight, s.bias))
    cos: Tensor | None = None
    sin: Tensor | None = None
    strides: tuple[Any, Any] = (None, None)
    width, per_head = 0, False
    if rotation != "none" and s.cos is not None and s.sin is not None:
        width = s.cos.shape[-1]
        cos, sin = (t.expand(*s.x_BSHd.shape[:3], width) for t in (s.cos, s.sin))
        strides = (cos.stride(), sin.stride())
        per_head = any(stride[2] for stride in strides)
    compiled = map(tl.constexpr, (s.eps, width, per_head))
    x = s.x_BSHd
    return Inputs(x, x.stride(), weight, bias, cos, strides[0], sin, strides[1], *compiled)


def _num_tokens(a: Arguments) -> tuple[int, int]:
    return a.x.shape[1], 0 if a.x2 is None else a.x2.shape[1]


def _num_resident(device: torch.device, num_warps: int) -> int:
    """Programs of the backward that run at once; independent of the number of tokens."""
    if device.type != "cuda":
        return 4
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return num_sms * max(1, WARPS_PER_SM // num_warps)
