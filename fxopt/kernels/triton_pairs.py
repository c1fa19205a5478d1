"""Tiles of rotated pairs: how the kernels of `qk_norm_rope` load, store and average them.

A tile is [H, P]: heads by pairs of a head, both padded to powers of two. p holds the first members
of the pairs, its twin q the second. `c` is the kernel's Config.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def load_pairs(ptr, heads_H1, stride, c):
    """Tiles (p, q) of the rows of D elements that start at `ptr` [H, 1]."""
    if c.INTERLEAVED:
        cols = tl.arange(0, 2 * c.P)[None, :].to(tl.int64)
        mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D)
        x = tl.load(ptr + cols * stride, mask=mask, other=0.0).to(c.MATH)
        return tl.split(tl.reshape(x, (x.shape[0], c.P, 2)))
    else:
        cols = tl.arange(0, c.P)[None, :].to(tl.int64)
        mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D // 2)
        p = tl.load(ptr + cols * stride, mask=mask, other=0.0).to(c.MATH)
        q = tl.load(ptr + (cols + c.D // 2) * stride, mask=mask, other=0.0).to(c.MATH)
        return p, q


@triton.jit
def store_pairs(ptr, heads_H1, p, q, c):
    """Inverse of `load_pairs` for contiguous rows."""
    if c.INTERLEAVED:
        cols = tl.arange(0, 2 * c.P)[None, :]
        mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D)
        x = tl.reshape(tl.join(p, q), (p.shape[0], 2 * c.P))
        tl.store(ptr + cols, x.to(ptr.dtype.element_ty), mask=mask)
    else:
        cols = tl.arange(0, c.P)[None, :]
        mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D // 2)
        tl.store(ptr + cols, p.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + cols + c.D // 2, q.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_table(ptr, strides, batch, token, heads_H1, c):
    """cos or sin of one token, [H, P] or [1, P]."""
    if not c.TABLE_PER_HEAD:
        heads_H1 = tl.zeros((1, 1), tl.int32)
    ptr += batch * strides[0] + token * strides[1] + heads_H1.to(tl.int64) * strides[2]
    if c.TABLE_WIDTH == c.D:
        return load_pairs(ptr, heads_H1, strides[3], c)
    else:
        cols = tl.arange(0, c.P)[None, :].to(tl.int64)
        mask = (heads_H1 < c.NUM_HEADS) & (cols < c.D // 2)
        both = tl.load(ptr + cols * strides[3], mask=mask, other=0.0).to(c.MATH)
        return both, both


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
