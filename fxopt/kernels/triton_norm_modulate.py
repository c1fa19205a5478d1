"""Triton provider of `fxopt::norm_modulate`: how its kernels are launched.

Shapes: G groups of R rows share their per-group operands; D features; P programs per group in the
backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op
from fxopt.kernels.triton_norm_modulate_kernels import (
    backward_kernel,
    forward_kernel,
    reduce_kernel,
)

# Tile of the second kernel: partial sums and features at a time.
REDUCE_P, REDUCE_D = 32, 32


def forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
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
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    weight_offset: float,
    scale_offset: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
    recompute: bool,
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
    shared = [want and not differs for want, differs in zip(wants, per_row, strict=True)]
    summed = [shared[0], any(shared[1:5]), any(shared[1:5]), shared[5]]
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
