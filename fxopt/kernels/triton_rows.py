"""What the Triton kernels of norms do to a row, which is one program's: D features, in fp32.

Operands are (pointer, group stride, row stride), a pointer None where there is no operand.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(t, group, row, cols, mask):
    """Row of an operand given as (pointer, group stride, row stride), in fp32."""
    return tl.load(t[0] + group * t[1] + row * t[2] + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(t, offsets, value, mask):
    """Store where there is something to store to."""
    if t is not None:
        tl.store(t + offsets, value.to(t.dtype.element_ty), mask=mask)


@triton.jit
def gated_residual(x, residual, gate, x_bias, group, row, cols, mask):
    """residual + gate * (x + x_bias)"""
    value = load(x, group, row, cols, mask)
    if x_bias[0] is not None:
        value += load(x_bias, 0, 0, cols, mask)
    if gate[0] is not None:
        value = value * load(gate, group, row, cols, mask)
    return value + load(residual, group, row, cols, mask)


@triton.jit
def mean_of(value, stored, num_features, mask):
    """Mean of a row, which is kept at the pointer `stored`."""
    row_mean = tl.sum(value, 0) / num_features
    if stored.dtype.element_ty == tl.float32:
        # What the sum rounded off, or a row of one value has a variance. Sums of 16-bit values
        # round nothing off there.
        row_mean += tl.sum(tl.where(mask, value - row_mean, 0.0), 0) / num_features
    return row_mean


@triton.jit
def affine_of(n, weight, bias, weight_offset, cols, mask):
    if weight[0] is not None:
        n = n * (weight_offset + load(weight, 0, 0, cols, mask))
    if bias[0] is not None:
        n = n + load(bias, 0, 0, cols, mask)
    return n


@triton.jit
def modulation_of(scale, scale_offset, group, row, cols, mask):
    if scale[0] is not None:
        return scale_offset + load(scale, group, row, cols, mask)
    else:
        return 1.0


@triton.jit
def modulate(n, factor, shift, group, row, cols, mask):
    n = n * factor
    if shift[0] is not None:
        n = n + load(shift, group, row, cols, mask)
    return n
