"""Triton provider of `fxopt::norm_modulate_segments`: how its kernels are launched.

A launch also takes streams without an index: the text beside an image, say.

Shapes: G groups of R tokens with tables of their own, of N rows; D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op
from fxopt.kernels import triton_norm_modulate_segments_kernels as kernels
from fxopt.kernels import triton_tables
from fxopt.kernels.triton_norm_modulate import Arguments, Stream, Target, backward_streams, present
from fxopt.kernels.triton_norm_modulate_kernels import Backward, Forward
from fxopt.kernels.triton_norm_modulate_segments_kernels import Reading
from fxopt.kernels.triton_norm_modulate_sums import Reduce
from fxopt.kernels.triton_rows import groups_of, pointers_of, rows_of
from fxopt.kernels.triton_segments import Segments
from fxopt.kernels.triton_sizes import LAST, unspecialized

ORDER_BLOCK = 2048


def forward(*args: Any) -> tuple[Tensor, ...]:
    """The op's forward, with fp32 statistics."""
    return forward_of([args])[0]


def backward(*args: Any) -> tuple[Tensor, ...]:
    """The op's backward: the tokens in order, a pass over them, one over the partial sums."""
    return backward_of([args])[0]


def forward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """`forward` of each call, in one launch; the norm and D are those of the first."""
    found: list[tuple[Tensor, ...]] = []
    streams: list[tuple[Forward, Reading, Any]] = []
    num_tokens = 0
    for call in calls:
        x, norm, (eps, weight_offset, scale_offset, *dtypes) = call[0], call[10], call[11:]
        results = op.outputs(x, call[1], norm, *dtypes)
        found.append(results)
        if x.numel():
            operands, sizes, reading = _operands(x, call[:8], *call[8:10])
            num_tokens += x.numel() // x.shape[-1]
            constants = eps, weight_offset, scale_offset
            given = *operands, *results, *constants, *sizes, *pointers_of(()), LAST
            rows = Forward._make(given)
            streams.append((rows, reading, LAST))
    if streams:
        x, norm = calls[0][0], calls[0][10]
        num_features = x.shape[-1]
        with torch.cuda.device_of(x):
            kernels.forward_kernel[(num_tokens,)](
                tuple(streams), num_features, NUM_STREAMS=len(streams), NORM=norm,
                BLOCK_D=triton.next_power_of_2(num_features),
                **triton_tables.parameters("norm_modulate forward", num_features, num_tokens, x),
            )  # fmt: skip
    return found


def _operands(
    x: Tensor, tensors: Sequence[Tensor | None], index: Tensor | None, shift_per_token: bool
) -> tuple[list[Any], list[int], Reading]:
    """What a stream reads as (pointer, group stride, row stride), and its groups and rows."""
    gate, scale, shift = tensors[2], tensors[5], tensors[6]
    if index is None:
        groups, reading = groups_of(x, (gate, scale, shift)), Reading()
        operands = [rows_of(t, x, groups) for t in tensors]
    else:
        tables = (gate, scale, None if shift_per_token else shift)
        segments = Segments(x, tables, index)
        groups, reading = segments.groups, _reading(segments, shift_per_token)
        is_table = (2, 5) if shift_per_token else (2, 5, 6)
        operands = [
            (segments.table if i in is_table else segments.rows)(t) for i, t in enumerate(tensors)
        ]
    return operands, [unspecialized(n) for n in (groups.num_groups, groups.num_rows)], reading


def backward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """`backward` of each call, in one launch of each kernel."""
    streams = [
        _stream(Arguments(*call[:10], *call[12:]), index=call[10], shift_per_token=call[11])
        for call in calls
    ]
    return backward_streams(streams, kernels.backward_kernel, kernels.reduce_kernel)


def _stream(a: Arguments, index: Tensor | None, shift_per_token: bool) -> Stream:
    return _Plain(a) if index is None else _BySegment(a, index, shift_per_token)


class _Plain(Stream):
    """A stream without an index."""

    def rows(self) -> tuple[Backward, Reading, Any]:
        return super().rows(), Reading(), LAST

    def reduction(self) -> tuple[Reduce, Reading, Any]:
        return super().reduction(), Reading(), LAST


class _BySegment(Stream):
    """A stream whose gate, scale and shift are tables."""

    def __init__(self, a: Arguments, index: Tensor, shift_per_token: bool) -> None:
        self.arguments, self.operands, self.shift_per_token = a, a[4:10], shift_per_token
        self.wants = op.wanted(a.grad_y, self.operands, a.needs)
        self.results = op.outputs_backward(
            a.grad_y, a.h, a.x, self.operands, self.wants, a.dtype, a.needs, a.recompute
        )
        tables = a.gate, a.scale, None if shift_per_token else a.shift
        self.segments = Segments(a.h, tables, index)
        self.groups = self.segments.groups
        self.num_tokens = self.groups.num_groups * self.groups.num_rows
        affine = any(self.wants[1:5])
        self.summed = [self.wants[0], affine, affine, self.wants[5]]

    def share(self, num_programs: int) -> None:
        self.tokens_per_program = triton.cdiv(self.num_tokens, num_programs)
        self.num_programs = triton.cdiv(self.num_tokens, self.tokens_per_program)
        a, keys = self.arguments, self.segments.keys
        num_rows = self.num_programs + keys.num_groups - 1
        each = iter(a.rstd.new_empty(sum(self.summed), num_rows, a.h.shape[-1]))
        parts = [next(each) if want else None for want in self.summed]
        self.sums = parts if any(self.summed) else []
        self.targets = [
            Target(grad if want else None, t, keys)
            for grad, t, want in zip(self.results[2:-1], self.operands, self.wants, strict=True)
        ]

    @property
    def num_launched(self) -> int:
        return self.num_programs

    def rows(self) -> tuple[Backward, Reading, Any]:
        a, (dh, dx, *_, y) = self.arguments, map(present, self.results)
        rows, table = self.segments.rows, self.segments.table
        inputs = a.grad_y, a.grad_h, a.h, a.x if self.wants[0] else None
        shift = rows(a.shift) if self.shift_per_token else table(a.shift)
        sizes = self.groups.num_groups, self.groups.num_rows, self.num_programs
        self.order, self.ends = _in_order(self.segments)
        return Backward._make((
            *map(rows, inputs), table(a.gate), rows(a.weight), rows(a.bias), table(a.scale), shift,
            rows(a.x_bias), a.mean, a.rstd, dh, dx, None, None, y, *(self.sums or [None] * 4),
            self.seen, a.weight_offset, a.scale_offset, *map(unspecialized, sizes),
            tl.constexpr(False),
        )), self.reading(), LAST  # fmt: skip

    def reduction(self) -> tuple[Reduce, Reading, Any]:
        a, rows = self.arguments, self.segments.rows
        sizes = self.segments.keys.num_groups, self.num_programs
        return Reduce._make((
            rows(a.weight), rows(a.bias), self.segments.table(a.scale), *self.sums,
            *(t.argument for t in self.targets), a.weight_offset, a.scale_offset,
            *map(unspecialized, sizes), LAST,
        )), self.reading(), LAST  # fmt: skip

    def reading(self) -> Reading:
        sizes = self.tokens_per_program, self.num_tokens
        found = _reading(self.segments, self.shift_per_token)
        return found._replace(
            order=self.order,
            ends=self.ends,
            tokens_per_program=unspecialized(sizes[0]),
            num_tokens=unspecialized(sizes[1]),
        )

    def finished(self) -> tuple[Tensor, ...]:
        if not self.num_tokens:
            return tuple(t.zero_() for t in self.results)
        for target in self.targets:
            target.finish()
        return self.results


def _reading(segments: Segments, shift_per_token: bool) -> Reading:
    index, num_segments = segments.index, unspecialized(segments.num_segments)
    return Reading(index, None if shift_per_token else index, num_segments)


def _in_order(segments: Segments) -> tuple[Tensor, Tensor]:
    """All tokens by segment, and where each segment ends."""
    x, num_keys = segments.x, segments.keys.num_groups
    order = x.new_empty(x.shape[:-1].numel(), dtype=torch.int32)
    ends = x.new_empty(num_keys, dtype=torch.int64)
    with torch.cuda.device_of(x):
        kernels.order_kernel[(num_keys,)](
            segments.index, order, ends, segments.groups.num_rows, segments.num_segments,
            BLOCK=ORDER_BLOCK, num_warps=8,
        )  # fmt: skip
    return order, ends
