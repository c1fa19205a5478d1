"""Triton provider of `fxopt::norm_modulate` and its backward: one pass over the rows each.

Shapes: G groups of R rows share their per-group operands; D features, padded to BLOCK_D; P programs
per group in the backward. Every program of the backward owns rows of one group and writes one row
of partial sums; a second kernel adds the P rows, in fixed order, so no atomics are needed, and
makes all gradients of operands from the sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op

# Tile of the second kernel: partial sums and features at a time.
REDUCE_P, REDUCE_D = 32, 32


@triton.jit
def _load(t, group, row, cols, mask):
    """Row of an operand given as (pointer, group stride, row stride), in fp32."""
    return tl.load(t[0] + group * t[1] + row * t[2] + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _affine(n, weight, bias, weight_offset, cols, mask):
    if weight[0] is not None:
        n = n * (weight_offset + _load(weight, 0, 0, cols, mask))
    if bias[0] is not None:
        n = n + _load(bias, 0, 0, cols, mask)
    return n


@triton.jit
def _modulate(n, scale, shift, scale_offset, group, row, cols, mask):
    if scale[0] is not None:
        n = n * (scale_offset + _load(scale, group, row, cols, mask))
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
            tl.store(mean + token, row_mean)
            value = tl.where(mask, value - row_mean, 0.0)
        row_rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / num_features + eps)
        tl.store(rstd + token, row_rstd)
        n = _affine(value * row_rstd, weight, bias, weight_offset, cols, mask)
        out = _modulate(n, scale, shift, scale_offset, group, row, cols, mask)
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
            if y is not None:
                affine = _affine(n, weight, bias, weight_offset, cols, mask)
                out = _modulate(affine, scale, shift, scale_offset, group, row, cols, mask)
                tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask)
            if grad_y[0] is not None:
                dn = _load(grad_y, group, row, cols, mask)
                if dscale is not None:
                    affine = _affine(n, weight, bias, weight_offset, cols, mask)
                    tl.store(dscale + offsets, dn * affine, mask=mask)
                if SCALE_PER_ROW:
                    dn = dn * (scale_offset + _load(scale, group, row, cols, mask))
                if a_sums is not None:
                    a_sum += dn * n
                    c_sum += dn
                if scale[0] is not None and not SCALE_PER_ROW:
                    dn = dn * (scale_offset + _load(scale, group, 0, cols, mask))
                if weight[0] is not None:
                    dn = dn * (weight_offset + _load(weight, 0, 0, cols, mask))
                dnorm = dn - n * (tl.sum(dn * n, 0) / num_features)
                if NORM == "layer":
                    dnorm -= tl.sum(dn, 0) / num_features
                dvalue += dnorm * row_rstd
        if dh is not None:
            tl.store(dh + offsets, dvalue.to(dh.dtype.element_ty), mask=mask)
        if gate_sums is not None or dgate is not None:
            value = _load(x, group, row, cols, mask)
            if x_bias[0] is not None:
                value += _load(x_bias, 0, 0, cols, mask)
            if dgate is not None:
                tl.store(dgate + offsets, dvalue * value, mask=mask)
            if gate_sums is not None:
                gate_sum += dvalue * value
        if gate[0] is not None:
            dvalue *= _load(gate, group, row, cols, mask)
        if dx is not None:
            tl.store(dx + offsets, dvalue.to(dx.dtype.element_ty), mask=mask)
        if x_sums is not None:
            x_sum += dvalue
    partial = (group * tl.num_programs(1) + program) * num_features + cols
    _store(gate_sums, partial, gate_sum, mask)
    _store(a_sums, partial, a_sum, mask)
    _store(c_sums, partial, c_sum, mask)
    _store(x_sums, partial, x_sum, mask)


@triton.jit
def _store(t, offsets, value, mask):
    """Store where there is something to store to."""
    if t is not None:
        tl.store(t + offsets, value.to(t.dtype.element_ty), mask=mask)


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


def forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    weight_offset: float,
    scale_offset: float,
    h_dtype: torch.dtype,
    dtype: torch.dtype,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward, with fp32 statistics."""
    results = y, h, mean, rstd = op.outputs(x, residual, norm, h_dtype, dtype)
    if x.numel() == 0:
        return results
    groups = _groups(x, (gate, scale, shift))
    given = (x, residual, gate, weight, bias, scale, shift, x_bias)
    operands = (_rows(t, x, groups) for t in given)
    with torch.cuda.device_of(x):
        forward_kernel[(groups.num_groups * groups.num_rows,)](
            *operands, y, h, mean, rstd,
            groups.num_rows, x.shape[-1], eps, weight_offset, scale_offset,
            NORM=norm, **tile(x.shape[-1], 16),
        )  # fmt: skip
    return results


def backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    weight_offset: float,
    scale_offset: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
    recompute: bool,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The op's backward: one pass over the rows, then one over the partial sums."""
    operands = (gate, weight, bias, scale, shift, x_bias)
    wants = op.wanted(grad_y, h, operands, needs)
    results = op.outputs_backward(grad_y, h, x, operands, wants, dtype, needs, recompute)
    if h.numel() == 0:
        return tuple(t.zero_() for t in results)
    dh, dx, *grads, y = results
    groups = _groups(h, (gate, scale, shift))
    num_programs = _programs_per_group(h, groups)
    per_row = [_varies_per_row(t) for t in operands]
    dgate = rstd.new_empty(h.shape) if wants[0] and per_row[0] else None
    dscale = rstd.new_empty(h.shape) if wants[3] and per_row[3] else None
    summed = [wants[0] and not per_row[0], any(wants[1:5]), any(wants[1:5]), wants[5]]
    each = iter(rstd.new_empty(sum(summed), groups.num_groups, num_programs, h.shape[-1]))
    sums = [next(each) if want else None for want in summed]
    inputs = (grad_y, grad_h, h, x if wants[0] else None, *operands)
    with torch.cuda.device_of(h):
        backward_kernel[(groups.num_groups, num_programs)](
            *(_rows(t, h, groups) for t in inputs), mean, rstd,
            _present(dh), _present(dx), dgate, dscale, _present(y), *sums,
            groups.num_rows, h.shape[-1], weight_offset, scale_offset,
            NORM=norm, SCALE_PER_ROW=per_row[3], **tile(h.shape[-1], 8),
        )  # fmt: skip
    dy = grad_y if per_row[3] or per_row[4] else None
    elementwise = (dgate, None, None, dscale, dy, None)
    targets = []
    for grad, operand, want, each in zip(grads, operands, wants, elementwise, strict=True):
        if want and each is not None and operand is not None:
            grad.copy_(_sum(each, operand))
        targets.append(_Target(grad if want and each is None else None, operand, groups))
    if any(summed):
        affine = (weight, bias, None if per_row[3] else scale)
        _reduce(h, affine, sums, targets, groups, (weight_offset, scale_offset))
    return results


def _reduce(
    h: Tensor,
    affine: Sequence[Tensor | None],
    sums: Sequence[Tensor | None],
    targets: Sequence[_Target],
    groups: op.Groups,
    offsets: tuple[float, float],
) -> None:
    """Make the gradients of all operands from the partial sums `[G, P, D]`."""
    num_programs = next(t.shape[1] for t in sums if t is not None)
    with torch.cuda.device_of(h):
        reduce_kernel[(triton.cdiv(h.shape[-1], REDUCE_D),)](
            *(_rows(t, h, groups) for t in affine), *sums, *(t.argument for t in targets),
            groups.num_groups, num_programs, h.shape[-1], *offsets,
            BLOCK_P=REDUCE_P, BLOCK_D=REDUCE_D, num_warps=4,
        )  # fmt: skip
    for target in targets:
        target.finish()


class _Target:
    """Where the second kernel writes the gradient of an operand: one row, or one per group."""

    def __init__(self, grad: Tensor | None, operand: Tensor | None, groups: op.Groups) -> None:
        self.grad, self.operand, self.groups, self.rows = grad, operand, groups, grad
        self.argument: tuple[Tensor | None, int | None] = None, None
        if grad is None or operand is None:
            return
        num_groups, num_features = groups.num_groups, groups.num_features
        num_rows = operand.numel() // num_features if operand.shape[-1] == num_features else 0
        if num_rows not in (1, num_groups):  # the operand differs over some of the groups' dims
            self.rows = grad.new_empty(num_groups, num_features, dtype=torch.float32)
        self.argument = self.rows, None if num_rows == 1 else num_features

    def finish(self) -> None:
        """Reduce rows of groups to the operand's own shape, where that is another."""
        grad, rows, operand = self.grad, self.rows, self.operand
        if grad is not None and rows is not None and operand is not None and rows is not grad:
            grad.copy_(self.groups.reduce(rows, operand))


def _varies_per_row(t: Tensor | None) -> bool:
    return t is not None and t.dim() > 1 and t.shape[-2] != 1


def _groups(x: Tensor, operands: Sequence[Tensor | None]) -> op.Groups:
    return op.Groups(x, [None if _varies_per_row(t) else t for t in operands])


def _rows(t: Tensor | None, x: Tensor, groups: op.Groups) -> tuple[Tensor | None, int, int]:
    """View an input or operand as `[G, R, D]`: its pointer, group stride and row stride."""
    if t is None:
        return None, 0, 0
    t_GRD = t.expand(x.shape).reshape(groups.num_groups, groups.num_rows, x.shape[-1])
    if t_GRD.stride(-1) != 1:
        t_GRD = t_GRD.contiguous()
    return t_GRD, t_GRD.stride(0), t_GRD.stride(1)


def _sum(t: Tensor, operand: Tensor) -> Tensor:
    """Sum to the shape of an operand, accumulating in fp32."""
    sizes = (1,) * (t.dim() - operand.dim()) + operand.shape
    dims = [i for i, (a, b) in enumerate(zip(t.shape, sizes, strict=True)) if a != b]
    return t.sum(dims, dtype=torch.float32).view(operand.shape) if dims else t.view(operand.shape)


def _present(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def tile(num_features: int, elements_per_thread: int) -> dict[str, int]:
    """Launch options for one row of `num_features` at a time; the backward has more per element."""
    block = triton.next_power_of_2(num_features)
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // (32 * elements_per_thread)))}


def _programs_per_group(x: Tensor, groups: op.Groups) -> int:
    """Programs that fill the device, by the registers each needs; independent of the row count.

    Source: https://github.com/Dao-AILab/quack/blob/main/quack/rmsnorm.py (programs per SM by D).
    """
    num_sms = 1
    if x.is_cuda:
        num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    num_programs = num_sms * min(16, max(1, 8192 // triton.next_power_of_2(x.shape[-1])))
    return max(1, min(groups.num_rows, num_programs // groups.num_groups))
