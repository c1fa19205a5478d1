"""Triton kernels of `fxopt::norm_modulate`: forward, backward over rows, and sums of partial sums.

Shapes: G groups of R rows share their per-group operands; D features, padded to BLOCK_D; P programs
per group in the backward. Every program of the backward owns rows of one group and writes one row
of partial sums; the last kernel adds the P rows, in fixed order, so no atomics are needed, and
makes all gradients of operands from the sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(t, group, row, cols, mask):
    """Row of an operand given as (pointer, group stride, row stride), in fp32."""
    return tl.load(t[0] + group * t[1] + row * t[2] + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(t, offsets, value, mask):
    """Store where there is something to store to."""
    if t is not None:
        tl.store(t + offsets, value.to(t.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(dn, n, num_features, NORM: tl.constexpr):
    """Gradient of the norm's input, but for the factor rstd."""
    dnorm = dn - n * (tl.sum(dn * n, 0) / num_features)
    if NORM == "layer":
        dnorm -= tl.sum(dn, 0) / num_features
    return dnorm


@triton.jit
def _affine(n, weight, bias, weight_offset, cols, mask):
    if weight[0] is not None:
        n = n * (weight_offset + _load(weight, 0, 0, cols, mask))
    if bias[0] is not None:
        n = n + _load(bias, 0, 0, cols, mask)
    return n


@triton.jit
def _factor(scale, scale_offset, group, row, cols, mask):
    if scale[0] is not None:
        return scale_offset + _load(scale, group, row, cols, mask)
    else:
        return 1.0


@triton.jit
def _modulate(n, factor, shift, group, row, cols, mask):
    n = n * factor
    if shift[0] is not None:
        n = n + _load(shift, group, row, cols, mask)
    return n


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x, residual, gate, weight, bias, scale, shift, x_bias, y, h, mean, rstd,
    num_rows, num_features, eps, weight_offset, scale_offset,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program is one row; inputs and operands are (pointer, group stride, row stride)."""
    token = tl.program_id(0).to(tl.int64)
    group, row = token // num_rows, token % num_rows
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_features
    value = _load(x, group, row, cols, mask)
    if residual[0] is not None:
        if x_bias[0] is not None:
            value += _load(x_bias, 0, 0, cols, mask)
        if gate[0] is not None:
            value = value * _load(gate, group, row, cols, mask)
        rounded = (value + _load(residual, group, row, cols, mask)).to(h.dtype.element_ty)
        tl.store(h + token * num_features + cols, rounded, mask=mask)
        value = rounded.to(tl.float32)
    if NORM != "none":
        if NORM == "layer":
            row_mean = tl.sum(value, 0) / num_features
            if x[0].dtype.element_ty == tl.float32 or h.dtype.element_ty == tl.float32:
                # What the sum rounded off, or a row of one value has a variance. Sums of 16-bit
                # values round nothing off there.
                row_mean += tl.sum(tl.where(mask, value - row_mean, 0.0), 0) / num_features
            tl.store(mean + token, row_mean)
            value = tl.where(mask, value - row_mean, 0.0)
        row_rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / num_features + eps)
        tl.store(rstd + token, row_rstd)
        n = _affine(value * row_rstd, weight, bias, weight_offset, cols, mask)
        factor = _factor(scale, scale_offset, group, row, cols, mask)
        out = _modulate(n, factor, shift, group, row, cols, mask)
        tl.store(y + token * num_features + cols, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    grad_y, grad_h, h, x, gate, weight, bias, scale, shift, x_bias, mean, rstd,
    dh, dx, dgate, dscale, y, gate_sums, a_sums, c_sums, x_sums,
    num_rows, num_features, weight_offset, scale_offset,
    NORM: tl.constexpr, SCALE_PER_ROW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program strides over rows of group `program_id(0)`.

    `dgate` and `dscale` hold one value per element, for operands that differ from row to row.
    The `_sums`, `[G, P, D]`, are partial sums for operands of the group: of the gate's gradient, of
    those of n's factor and addend (of the affine alone if `scale` differs per row), and of x's.
    Each is None where not wanted.
    """
    group, program = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_features
    gate_sum = tl.zeros([BLOCK_D], tl.float32)
    a_sum = tl.zeros([BLOCK_D], tl.float32)
    c_sum = tl.zeros([BLOCK_D], tl.float32)
    x_sum = tl.zeros([BLOCK_D], tl.float32)
    for row in range(program, num_rows, tl.num_programs(1)):
        token = group * num_rows + row
        offsets = token * num_features + cols
        dvalue = tl.zeros([BLOCK_D], tl.float32)
        if grad_h[0] is not None:
            dvalue = _load(grad_h, group, row, cols, mask)
        if NORM != "none":
            row_rstd = tl.load(rstd + token)
            n = _load(h, group, row, cols, mask)
            if NORM == "layer":
                n = tl.where(mask, n - tl.load(mean + token), 0.0)
            n = n * row_rstd
            factor = _factor(scale, scale_offset, group, row, cols, mask)
            if y is not None:
                out = _affine(n, weight, bias, weight_offset, cols, mask)
                out = _modulate(out, factor, shift, group, row, cols, mask)
                _store(y, offsets, out, mask)
            if grad_y[0] is not None:
                dn = _load(grad_y, group, row, cols, mask)
                if dscale is not None:
                    affine = _affine(n, weight, bias, weight_offset, cols, mask)
                    _store(dscale, offsets, dn * affine, mask)
                if SCALE_PER_ROW:
                    dn = dn * factor
                if a_sums is not None:
                    a_sum += dn * n
                    c_sum += dn
                if scale[0] is not None and not SCALE_PER_ROW:
                    dn = dn * (scale_offset + _load(scale, group, 0, cols, mask))
                if weight[0] is not None:
                    dn = dn * (weight_offset + _load(weight, 0, 0, cols, mask))
                dvalue += _norm_backward(dn, n, num_features, NORM) * row_rstd
        _store(dh, offsets, dvalue, mask)
        if gate_sums is not None or dgate is not None:
            value = _load(x, group, row, cols, mask)
            if x_bias[0] is not None:
                value += _load(x_bias, 0, 0, cols, mask)
            _store(dgate, offsets, dvalue * value, mask)
            if gate_sums is not None:
                gate_sum += dvalue * value
        if gate[0] is not None:
            dvalue *= _load(gate, group, row, cols, mask)
        _store(dx, offsets, dvalue, mask)
        if x_sums is not None:
            x_sum += dvalue
    partial = (group * tl.num_programs(1) + program) * num_features + cols
    _store(gate_sums, partial, gate_sum, mask)
    _store(a_sums, partial, a_sum, mask)
    _store(c_sums, partial, c_sum, mask)
    _store(x_sums, partial, x_sum, mask)


@triton.jit
def _column_sum(sums, group, num_programs, num_features, cols, mask, BLOCK_P: tl.constexpr):
    """Sum `[G, P, D]` partial sums of one group over P, always in the same order."""
    total = tl.zeros([BLOCK_P, cols.shape[0]], tl.float32)
    if sums is not None:
        for first in range(0, num_programs, BLOCK_P):
            programs = first + tl.arange(0, BLOCK_P)
            offsets = (group * num_programs + programs)[:, None] * num_features + cols[None, :]
            valid = (programs < num_programs)[:, None] & mask[None, :]
            total += tl.load(sums + offsets, mask=valid, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _reduced(out, total, value, group, cols, mask):
    """Store a gradient of its group, given as (pointer, group stride), or go on adding it up."""
    if out[0] is not None and out[1] is not None:
        _store(out[0], group * out[1] + cols, value, mask)
    return total + value


@triton.jit
def _stored(out, total, cols, mask):
    """Store a gradient that all groups share; its group stride is None."""
    if out[1] is None:
        _store(out[0], cols, total, mask)


@triton.jit(do_not_specialize=["num_programs"])
def reduce_kernel(
    weight, bias, scale, gate_sums, a_sums, c_sums, x_sums,
    dgate, dweight, dbias, dscale, dshift, dx_bias,
    num_groups, num_programs, num_features, weight_offset, scale_offset,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program makes the gradients of BLOCK_D features of all operands from the partial sums.

    Operands are (pointer, group stride, row stride), gradients (pointer, group stride); the group
    stride of a gradient is None where all groups share the operand.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < num_features
    zero = tl.zeros([BLOCK_D], tl.float32)
    gate_total, weight_total, bias_total = zero, zero, zero
    scale_total, shift_total, x_total = zero, zero, zero
    for i in range(num_groups):
        group = tl.cast(i, tl.int64)
        dg = _column_sum(gate_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        da = _column_sum(a_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        dc = _column_sum(c_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        dx = _column_sum(x_sums, group, num_programs, num_features, cols, mask, BLOCK_P)
        factor, affine_da = zero + 1.0, da
        if scale[0] is not None:
            factor = scale_offset + _load(scale, group, 0, cols, mask)
        if weight[0] is not None:
            affine_da = da * (weight_offset + _load(weight, 0, 0, cols, mask))
        if bias[0] is not None:
            affine_da += dc * _load(bias, 0, 0, cols, mask)
        gate_total = _reduced(dgate, gate_total, dg, group, cols, mask)
        weight_total = _reduced(dweight, weight_total, da * factor, group, cols, mask)
        bias_total = _reduced(dbias, bias_total, dc * factor, group, cols, mask)
        scale_total = _reduced(dscale, scale_total, affine_da, group, cols, mask)
        shift_total = _reduced(dshift, shift_total, dc, group, cols, mask)
        x_total = _reduced(dx_bias, x_total, dx, group, cols, mask)
    _stored(dgate, gate_total, cols, mask)
    _stored(dweight, weight_total, cols, mask)
    _stored(dbias, bias_total, cols, mask)
    _stored(dscale, scale_total, cols, mask)
    _stored(dshift, shift_total, cols, mask)
    _stored(dx_bias, x_total, cols, mask)
