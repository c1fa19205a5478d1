"""Tiles of rotated pairs: how the kernels of `qk_norm_rope` load, store and average them.

A tile is [H, P]: heads by pairs of a head, both padded to powers of two. p holds the first members
of the pairs, its twin q the second. The rotated pairs come first; channels that are not rotated are
paired as well, so that a tile is a head. `c` is the kernel's Config.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fxopt.kernels.triton_gated_activation_kernels import PACKED
from fxopt.kernels.triton_quantize_kernels import code_of, factor_of, magnitude, scale_of
from fxopt.kernels.triton_saving import FORMAT, LARGEST
from fxopt.kernels.triton_sizes import size


@triton.jit
def load_pairs(ptr, heads_H1, stride, c):
    """Tiles (p, q) of the rows of D elements that start at `ptr` [H, 1]."""
    return load_pairs_as(c.MATH, ptr, heads_H1, stride, c)


@triton.jit
def load_pairs_as(DTYPE: tl.constexpr, ptr, heads_H1, stride, c):
    if c.INTERLEAVED:
        cols = tl.arange(0, 2 * c.P)[None, :].to(tl.int64)
        mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D)
        x = tl.load(ptr + cols * stride, mask=mask, other=0).to(DTYPE)
        return tl.split(tl.reshape(x, (x.shape[0], c.P, 2)))
    else:
        cols_p, cols_q, mask = _halves(heads_H1, c)
        p = tl.load(ptr + cols_p.to(tl.int64) * stride, mask=mask, other=0).to(DTYPE)
        q = tl.load(ptr + cols_q.to(tl.int64) * stride, mask=mask, other=0).to(DTYPE)
        return p, q


@triton.jit
def _halves(heads_H1, c):
    """Channels of the members p and q [1, P], and which of the tile's elements there are."""
    cols = tl.arange(0, c.P)[None, :]
    mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D // 2)
    if c.ROTARY_DIM == c.D:
        return cols, cols + c.D // 2, mask
    else:
        half: tl.constexpr = c.ROTARY_DIM // 2
        is_rotated = cols < half
        cols_p = tl.where(is_rotated, cols, cols + half)
        return cols_p, tl.where(is_rotated, cols + half, cols + c.D // 2), mask


@triton.jit
def store_pairs(ptr, heads_H1, p, q, c):
    """Inverse of `load_pairs` for contiguous rows."""
    if c.INTERLEAVED:
        cols = tl.arange(0, 2 * c.P)[None, :]
        mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D)
        x = tl.reshape(tl.join(p, q), (p.shape[0], 2 * c.P))
        tl.store(ptr + cols, x.to(ptr.dtype.element_ty), mask=mask)
    else:
        cols_p, cols_q, mask = _halves(heads_H1, c)
        tl.store(ptr + cols_p, p.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + cols_q, q.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_codes(codes, scales, row, block, heads_H1, p, q, c):
    """Codes [., H, D] and scales of a token's heads, as `fxopt::pack` makes them: PACKED // D heads
    are a block."""
    NUM: tl.constexpr = PACKED // c.D
    NUM_BLOCKS: tl.constexpr = c.NUM_HEADS // NUM
    bits = tl.maximum(tl.max(magnitude(p), 1), tl.max(magnitude(q), 1))
    factor = factor_of(tl.max(tl.reshape(bits, [c.H // NUM, NUM]), 1), LARGEST, False)
    at = block * (c.H // NUM) + tl.arange(0, c.H // NUM)
    row = row.to(tl.int64)
    tl.store(scales + row * NUM_BLOCKS + at, scale_of(factor), at < NUM_BLOCKS)
    factor = tl.broadcast_to(factor[:, None], [c.H // NUM, NUM])
    factor = tl.reshape(factor, [c.H, 1])
    code_p = code_of(p * factor, LARGEST, FORMAT)
    code_q = code_of(q * factor, LARGEST, FORMAT)
    heads = heads_H1.to(tl.int64)
    store_pairs(codes + (row * c.NUM_HEADS + heads) * c.D, heads_H1, code_p, code_q, c)


@triton.jit
def load_codes(codes, scales, like, row, heads_H1, c):
    """What they stand for, rounded to the dtype of `like`."""
    NUM: tl.constexpr = PACKED // c.D
    heads = heads_H1.to(tl.int64)
    at = row * (c.NUM_HEADS // NUM) + heads // NUM
    scale = tl.load(scales + at, heads_H1 < c.NUM_HEADS, other=0.0)
    codes += (row * c.NUM_HEADS + heads) * c.D
    p, q = load_pairs_as(tl.uint8, codes, heads_H1, 1, c)
    p = p.to(FORMAT, bitcast=True).to(tl.float32) * scale
    q = q.to(FORMAT, bitcast=True).to(tl.float32) * scale
    dtype: tl.constexpr = like.dtype.element_ty
    return p.to(dtype).to(c.MATH), q.to(dtype).to(c.MATH)


@triton.jit
def load_rotation(s, batch, token, heads_H1, c):
    """(cos_p, cos_q, sin_p, sin_q) of one token, [H, P] or [1, P]: the rotation is

    (p, q) -> (p cos_p - q sin_p, q cos_q + p sin_q).
    """
    has_row = token >= 0
    if c.ROTATES_SOME:
        first = size(s.rotated[0])
        has_row = (token >= first) & (token < size(s.rotated[1]))
        token -= first
    cos_p, cos_q = _load_table(s.cos, s.cos_strides, batch, token, has_row, heads_H1, c)
    sin_p, sin_q = _load_table(s.sin, s.sin_strides, batch, token, has_row, heads_H1, c)
    if c.TABLES == "matrices":
        cos_q, sin_p, sin_q = sin_q, -sin_p, cos_q
    if c.ROTARY_DIM < c.D:
        is_rotated = tl.arange(0, c.P)[None, :] < c.ROTARY_DIM // 2
        cos_p = tl.where(is_rotated, cos_p, 1.0)
        cos_q = tl.where(is_rotated, cos_q, 1.0)
    if c.ROTATES_SOME:
        cos_p = tl.where(has_row, cos_p, 1.0)
        cos_q = tl.where(has_row, cos_q, 1.0)
    return cos_p, cos_q, sin_p, sin_q


@triton.jit
def _load_table(ptr, strides, batch, token, has_row, heads_H1, c):
    """The entries for the first and the second members of pairs; 0 for what is not rotated."""
    if not c.TABLE_PER_HEAD:
        heads_H1 = tl.zeros((1, 1), tl.int32)
    ptr += batch * strides[0] + token * strides[1] + heads_H1.to(tl.int64) * strides[2]
    is_head = heads_H1 < c.NUM_HEADS
    if c.ROTATES_SOME:
        is_head = is_head & has_row
    if c.TABLES == "matrices" or (c.TABLES == "channels" and c.INTERLEAVED):
        cols = tl.arange(0, 2 * c.P)[None, :].to(tl.int64)
        mask = is_head & (cols < c.ROTARY_DIM)
        table = tl.load(ptr + cols * strides[3], mask=mask, other=0.0).to(c.MATH)
        return tl.split(tl.reshape(table, (table.shape[0], c.P, 2)))
    else:
        half: tl.constexpr = c.ROTARY_DIM // 2
        cols = tl.arange(0, c.P)[None, :].to(tl.int64)
        mask = is_head & (cols < half)
        p = tl.load(ptr + cols * strides[3], mask=mask, other=0.0).to(c.MATH)
        if c.TABLES == "pairs":
            return p, p
        else:
            return p, tl.load(ptr + (cols + half) * strides[3], mask=mask, other=0.0).to(c.MATH)


@triton.jit
def load_parameter(ptr, heads_H1, c):
    """A weight or bias, [1, P], or [H, P] for a norm across heads."""
    if not c.ACROSS_HEADS:
        heads_H1 = tl.zeros((1, 1), tl.int32)
    return load_head_pairs(ptr, heads_H1, c)


@triton.jit
def load_head_pairs(ptr, heads_H1, c):
    """The elements of some heads of a vector [H*D]."""
    return load_pairs(ptr + heads_H1 * c.D, heads_H1, 1, c)


@triton.jit
def statistic(row, heads_H1, c):
    """(offset, mask) of the token's mean and rstd: [H, 1], or [1, 1] for a norm across heads."""
    if c.ACROSS_HEADS:
        heads_H1 = tl.zeros((1, 1), tl.int32)
        return row + heads_H1, heads_H1 == 0
    else:
        return row * c.NUM_HEADS + heads_H1, heads_H1 < c.NUM_HEADS


@triton.jit
def group_mean(p, q, c):
    """Mean over the elements that are normed together, [H, 1] or [1, 1]."""
    total = tl.sum(p + q, axis=1, keep_dims=True)
    if c.ACROSS_HEADS:
        return tl.sum(total, axis=0, keep_dims=True) / (c.NUM_HEADS * c.D)
    else:
        return total / c.D
