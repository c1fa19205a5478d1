"""Triton provider of `fxopt::norm_modulate` and its backward: one pass over the rows each.

Shapes: G groups of R rows share their per-group operands; D features, padded to BLOCK_D; P programs
per group in the backward. Every program of the backward owns rows of one group and writes one row
of partial sums; a second reduction adds the P rows, in fixed order, so no atomics are needed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op


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
    x, residual, gate, weight, bias, scale, shift, y, h, mean, rstd,
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
    grad_y, grad_h, h, x, gate, weight, bias, scale, shift, mean, rstd,
    dh, dx, dgate, dscale, y, gate_sums, a_sums, c_sums,
    num_rows, num_features, weight_offset, scale_offset,
    NORM: tl.constexpr, SCALE_PER_ROW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program strides over rows of group `program_id(0)`.

    `dgate` and `dscale` hold one value per element, for operands that differ from row to row.
    The `_sums`, `[G, P, D]`, are partial sums for operands of the group: of `dh * x`, and of the
    gradients of n's factor and addend (those of the affine alone if `scale` differs per row).
    Each is None where not wanted.
    """
    group, program = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_features
    gate_sum = tl.zeros([BLOCK_D], tl.float32)
    a_sum = tl.zeros([BLOCK_D], tl.float32)
    c_sum = tl.zeros([BLOCK_D], tl.float32)
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
        tl.store(dh + offsets, dvalue.to(dh.dtype.element_ty), mask=mask)
        if dx is not None:
            branch = dvalue * _load(gate, group, row, cols, mask)
            tl.store(dx + offsets, branch.to(dx.dtype.element_ty), mask=mask)
        if x[0] is not None:
            product = dvalue * _load(x, group, row, cols, mask)
            if dgate is not None:
                tl.store(dgate + offsets, product, mask=mask)
            gate_sum += product
    partial = (group * tl.num_programs(1) + program) * num_features + cols
    if gate_sums is not None:
        tl.store(gate_sums + partial, gate_sum, mask=mask)
    if a_sums is not None:
        tl.store(a_sums + partial, a_sum, mask=mask)
        tl.store(c_sums + partial, c_sum, mask=mask)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward, with fp32 statistics."""
    results = y, h, mean, rstd = op.outputs(x, residual, norm, h_dtype, dtype)
    if x.numel() == 0:
        return results
    groups = _groups(x, (gate, scale, shift))
    operands = (_rows(t, x, groups) for t in (x, residual, gate, weight, bias, scale, shift))
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
) -> tuple[Tensor, ...]:
    """The op's backward: one pass over the rows, then small sums over its P programs per group."""
    operands = (gate, weight, bias, scale, shift)
    wants = op.wanted(grad_y, h, operands, needs)
    results = op.outputs_backward(h, x, operands, wants, dtype, needs, recompute)
    if h.numel() == 0:
        return tuple(t.zero_() for t in results)
    dh, dx, *grads, y = results
    groups = _groups(h, (gate, scale, shift))
    num_programs = _programs_per_group(h, groups)
    sums = rstd.new_empty(3, groups.num_groups, num_programs, h.shape[-1])
    wants_sum = [wants[0], any(wants[1:]), any(wants[1:])]
    per_row = [_varies_per_row(t) for t in operands]
    dgate = rstd.new_empty(h.shape) if wants[0] and per_row[0] else None
    dscale = rstd.new_empty(h.shape) if wants[3] and per_row[3] else None
    inputs = (grad_y, grad_h, h, x if wants[0] else None, *operands)
    with torch.cuda.device_of(h):
        backward_kernel[(groups.num_groups, num_programs)](
            *(_rows(t, h, groups) for t in inputs), mean, rstd,
            dh, _present(dx), dgate, dscale, _present(y),
            *(t if want else None for t, want in zip(sums, wants_sum, strict=True)),
            groups.num_rows, h.shape[-1], weight_offset, scale_offset,
            NORM=norm, SCALE_PER_ROW=per_row[3], **tile(h.shape[-1], 8),
        )  # fmt: skip
    dgate_GD, da_GD, dc_GD = sums.sum(2)
    affine_operands = (weight, bias, None if per_row[3] else scale, None)
    affine = op.Affine(groups, affine_operands, (weight_offset, scale_offset), rstd.dtype)
    totals = [dgate_GD, *affine.grads(da_GD, dc_GD)]
    dy = grad_y if per_row[3] or per_row[4] else None
    elementwise = (dgate, None, None, dscale, dy)
    for grad, operand, want, total, each in zip(
        grads, operands, wants, totals, elementwise, strict=True
    ):
        if want and operand is not None:
            total = groups.reduce(total, operand) if each is None else _sum(each, operand)
            grad.copy_(total)
    return results


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
    return t.float().sum_to_size(operand.shape)


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
