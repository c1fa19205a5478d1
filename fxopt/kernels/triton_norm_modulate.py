"""Triton provider of `fxopt::norm_modulate`: how its kernels are launched.

A launch serves one or more calls of the op: the streams of a block, text and image say.

Shapes: G groups of R rows share their per-group operands; D features; P programs per group in the
backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op
from fxopt.kernels import triton_norm_modulate_kernels as kernels
from fxopt.kernels import triton_norm_modulate_sums as sums
from fxopt.kernels import triton_tables
from fxopt.kernels.norm_modulate import decoded
from fxopt.kernels.saving import valued
from fxopt.kernels.triton_rows import (
    Groups,
    groups_of,
    packed_rows_of,
    pointers_of,
    rows_of,
    varies_per_row,
)
from fxopt.kernels.triton_sizes import LAST, unspecialized

# Tile of the last kernel: partial sums and features at a time.
REDUCE_P, REDUCE_D = 16, 32
# Codes beside four sums spilled at 5,120.
MAX_FEATURES_OF_CODES = 4096


def forward(*args: Any) -> tuple[Tensor, ...]:
    """The op's forward, with fp32 statistics."""
    return forward_of([args])[0]


def backward(*args: Any) -> tuple[Tensor, ...]:
    """The op's backward: one pass over the rows, then one over the partial sums."""
    return backward_of([args])[0]


def forward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """`forward` of each call, in one launch; the norm and D are those of the first."""
    found: list[tuple[Tensor, ...]] = []
    streams: list[kernels.Forward] = []
    num_tokens = 0
    for call in calls:
        tensors, rooms = call[:8], pointers_of(call[14:])
        norm, eps, weight_offset, scale_offset, h_dtype, dtype = call[8:14]
        x, residual, gate, _, _, scale, shift, _ = tensors
        results = op.outputs(x, residual, norm, h_dtype, dtype)
        found.append(results)
        if x.numel():
            groups = groups_of(x, (gate, scale, shift))
            num_tokens += groups.num_groups * groups.num_rows
            sizes = (unspecialized(n) for n in (groups.num_groups, groups.num_rows))
            rows = (rows_of(t, x, groups) for t in tensors)
            constants = eps, weight_offset, scale_offset
            given = *rows, *results, *constants, *sizes, *rooms, LAST
            streams.append(kernels.Forward._make(given))
    if streams:
        x, norm = calls[0][0], calls[0][8]
        with torch.cuda.device_of(x):
            num_features = x.shape[-1]
            kernels.forward_kernel[(num_tokens,)](
                tuple(streams), num_features, NUM_STREAMS=len(streams), NORM=norm,
                BLOCK_D=triton.next_power_of_2(num_features),
                **triton_tables.parameters("norm_modulate forward", num_features, num_tokens, x),
            )  # fmt: skip
    return found


def backward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """`backward` of each call, in one launch of each kernel."""
    streams = [_stream(call) for call in calls]
    return backward_streams(streams, kernels.backward_kernel, sums.reduce_kernel)


def backward_streams(
    streams: Sequence[Stream], backward_kernel: Any, reduce_kernel: Any
) -> list[tuple[Tensor, ...]]:
    """What the backward returns for each stream, by these two kernels."""
    present = [s for s in streams if s.num_tokens]
    if present:
        a = present[0].arguments
        num_features = a.h.shape[-1]
        num_tokens = sum(s.num_tokens for s in present)
        kernel = "norm_modulate backward"
        if any(all(s.summed) or s.arguments.h_scales is not None for s in present):
            kernel += " of four sums"
        chosen = triton_tables.parameters(kernel, num_features, num_tokens, a.h)
        num_resident = num_sms(a.h) * chosen["programs"]
        for s in present:
            s.share(max(1, num_resident * s.num_tokens // num_tokens))
        num_programs = sum(s.num_launched for s in present)
        summed = [s for s in present if s.sums]
        with torch.cuda.device_of(a.h):
            backward_kernel[(num_programs,)](
                tuple(s.rows() for s in present), num_features,
                NUM_STREAMS=len(present), NORM=a.norm,
                BLOCKS=blocks_of(num_features, chosen["pieces"]), num_warps=chosen["num_warps"],
            )  # fmt: skip
            if summed:
                reduce_kernel[(triton.cdiv(num_features, REDUCE_D), len(summed))](
                    tuple(s.reduction() for s in summed), num_features,
                    NUM_STREAMS=len(summed), BLOCK_P=REDUCE_P, BLOCK_D=REDUCE_D, num_warps=4,
                )  # fmt: skip
    return [s.finished() for s in streams]


def _stream(call: tuple[Any, ...]) -> Stream:
    s = Stream(Arguments(*call))
    reads_codes = s.arguments.h_scales is not None
    is_too_wide = s.arguments.h.shape[-1] > MAX_FEATURES_OF_CODES and all(s.summed)
    if not (reads_codes and is_too_wide):
        return s
    return Stream(Arguments(*decoded(call))._replace(seen=s.arguments.seen))


class Arguments(NamedTuple):
    """Arguments of `norm_modulate_backward`; h and x that have scales are codes; seen is raised to
    the magnitude of the gradient of x."""

    grad_y: Tensor | None
    grad_h: Tensor | None
    h: Tensor
    x: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    x_bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    norm: str
    weight_offset: float
    scale_offset: float
    dtype: torch.dtype
    needs: Sequence[bool]
    recompute: bool
    h_scales: Tensor | None = None
    x_scales: Tensor | None = None
    seen: Tensor | None = None

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        """h and x, or where these are codes what has the shape and dtype of their values."""
        h, x = self.h, self.x
        h = h if self.h_scales is None else valued(h, self.dtype)
        return h, valued(x, self.dtype) if x is not None and self.x_scales is not None else x


class Stream:
    """One call of the backward: what it writes, its partial sums, and what is made of them."""

    def __init__(self, a: Arguments) -> None:
        self.arguments, self.operands = a, a[4:10]
        self.wants = op.wanted(a.grad_y, self.operands, a.needs)
        self.results = op.outputs_backward(
            a.grad_y, *a.values, self.operands, self.wants, a.dtype, a.needs, a.recompute
        )
        self.groups = groups_of(a.h, (a.gate, a.scale, a.shift))
        self.num_tokens = self.groups.num_groups * self.groups.num_rows
        self.per_row = [varies_per_row(t) for t in self.operands]
        pairs = zip(self.wants, self.per_row, strict=True)
        shared = [want and not differs for want, differs in pairs]
        affine = any(shared[1:5])
        self.summed = [shared[0], affine, affine, shared[5]]

    def share(self, num_programs: int) -> None:
        """Allocate the partial sums of this many programs, or fewer if there are fewer rows."""
        a, wants, groups = self.arguments, self.wants, self.groups
        self.num_programs = max(1, min(groups.num_rows, num_programs // groups.num_groups))
        empty = a.rstd.new_empty
        self.dgate, self.dscale = self._elements(0), self._elements(3)
        shape = groups.num_groups, self.num_programs, a.h.shape[-1]
        each = iter(empty(sum(self.summed), *shape))
        parts = [next(each) if want else None for want in self.summed]
        self.sums = parts if any(self.summed) else []
        self.targets = [
            Target(grad if want and t is None else None, operand, groups)
            for grad, operand, want, t in zip(
                self.results[2:-1], self.operands, wants, self.elementwise(), strict=True
            )
        ]

    @property
    def seen(self) -> Tensor | None:
        """What is raised to the magnitude of x's gradient, if there is one."""
        a, (dh, dx, *_) = self.arguments, self.results
        return a.seen if (dh if a.gate is None else dx).numel() else None

    @property
    def num_launched(self) -> int:
        """Programs of the first kernel."""
        return self.groups.num_groups * self.num_programs

    def _elements(self, i: int) -> Tensor | None:
        """Where the first kernel writes the gradient of an operand that differs from row to row."""
        if not self.wants[i] or not self.per_row[i]:
            return None
        a, grad = self.arguments, self.results[2 + i]
        return grad if grad.shape == a.h.shape else a.rstd.new_empty(a.h.shape)

    def elementwise(self) -> tuple[Tensor | None, ...]:
        """For each operand that differs from row to row, its gradient element by element."""
        dy = self.arguments.grad_y if self.per_row[3] or self.per_row[4] else None
        return self.dgate, None, None, self.dscale, dy, None

    def rows(self) -> Any:
        """Arguments of the first kernel."""
        a, groups = self.arguments, self.groups
        dh, dx, *_, y = self.results
        (h, x), given = a.values, (a.h, groups)
        grads = (rows_of(t, *given) for t in (a.grad_y, a.grad_h))
        kept = (a.h, a.h_scales, h), (a.x if self.wants[0] else None, a.x_scales, x)
        sizes = groups.num_groups, groups.num_rows, self.num_programs
        return kernels.Backward._make((
            *grads, *(packed_rows_of(*own, *given) for own in kept),
            *(rows_of(t, *given) for t in self.operands), a.mean, a.rstd,
            present(dh), present(dx), self.dgate, self.dscale, present(y),
            *(self.sums or [None] * 4), self.seen, a.weight_offset, a.scale_offset,
            *map(unspecialized, sizes), tl.constexpr(self.per_row[3]),
        ))  # fmt: skip

    def reduction(self) -> Any:
        """Arguments of the second kernel, which makes the gradients of operands from the sums."""
        a = self.arguments
        _, weight, bias, scale, *_ = self.operands
        affine = weight, bias, None if self.per_row[3] else scale
        sizes = self.groups.num_groups, self.num_programs
        return sums.Reduce._make((
            *(rows_of(t, a.h, self.groups) for t in affine), *self.sums,
            *(t.argument for t in self.targets), a.weight_offset, a.scale_offset,
            *map(unspecialized, sizes), LAST,
        ))  # fmt: skip

    def finished(self) -> tuple[Tensor, ...]:
        """The outputs, once the kernels ran."""
        if not self.num_tokens:
            return tuple(t.zero_() for t in self.results)
        each = zip(self.results[2:-1], self.operands, self.wants, self.elementwise(), strict=True)
        for grad, operand, want, elements in each:
            if want and elements is not None and elements is not grad and operand is not None:
                grad.copy_(_sum(elements, operand))
        for target in self.targets:
            target.finish()
        return self.results


class Target:
    """Where the second kernel writes the gradient of an operand: one row, or one per group."""

    def __init__(self, grad: Tensor | None, operand: Tensor | None, groups: Groups) -> None:
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


def _sum(t: Tensor, operand: Tensor) -> Tensor:
    """Sum to the shape of an operand, accumulating in fp32."""
    sizes = (1,) * (t.dim() - operand.dim()) + operand.shape
    dims = [i for i, (a, b) in enumerate(zip(t.shape, sizes, strict=True)) if a != b]
    return t.sum(dims, dtype=torch.float32).view(operand.shape) if dims else t.view(operand.shape)


def present(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def blocks_of(num_features: int, num_pieces: int) -> tuple[Any, ...]:
    """Sizes of the one or two pieces in which the backward holds a row."""
    whole = triton.next_power_of_2(num_features)
    half = whole // 2
    rest = triton.next_power_of_2(num_features - half)
    return tuple(map(tl.constexpr, (whole,) if num_pieces == 1 else (half, rest)))


def num_sms(x: Tensor) -> int:
    if not x.is_cuda:
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count
