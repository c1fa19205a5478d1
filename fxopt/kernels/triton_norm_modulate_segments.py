"""Triton provider of `fxopt::norm_modulate_segments`.

The backward goes through the tokens in the order of their segments, each program through as many
of them. A program writes a row of partial sums for each segment that it meets: P programs and K
segments make P + K - 1 rows at most, however many tokens there are. Of program p and segment k it
is row p + k: along the order one of them grows with each row written, so no two share one, and the
rows of a segment follow one another. No atomics are needed.

Shapes: G groups of R tokens with tables of their own, of N rows; K = G * N segments; D features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op
from fxopt.kernels import triton_tables
from fxopt.kernels.norm_modulate_segments import num_segments_of
from fxopt.kernels.triton_norm_modulate import (
    REDUCE_D,
    REDUCE_P,
    Target,
    blocks_of,
    num_sms,
    present,
)
from fxopt.kernels.triton_norm_modulate_kernels import (
    Backward,
    Forward,
    backward_row,
    forward_row,
    no_sums,
    store_sums,
)
from fxopt.kernels.triton_norm_modulate_sums import Reduce, add_group, no_totals, store_totals
from fxopt.kernels.triton_rows import rows_of, store
from fxopt.kernels.triton_sizes import LAST, size, unspecialized

ORDER_BLOCK = 2048


@triton.jit
def _segment(index, token, num_segments, mask):
    """Of tokens the row of their group's table, -1 if there is none."""
    i = tl.load(index + token, mask, other=0).to(tl.int64)
    i = tl.where(i < 0, i + num_segments, i)
    return tl.where((i >= 0) & (i < num_segments), i, -1).to(tl.int32)


# A function that returned a pointer that is None would not compile with Triton 3.6.
@triton.jit
def _row(table, group, segment):
    """The row of a table (pointer, group stride, row stride) as an operand that all rows share."""
    return table[0] + group * table[1] + segment * table[2], 0, 0


@triton.jit(do_not_specialize=["num_segments"])
def forward_kernel(
    s, index, num_segments, num_features,
    SHIFT_PER_TOKEN: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program is one token."""
    token = tl.program_id(0).to(tl.int64)
    group, row = token // size(s.num_rows), token % size(s.num_rows)
    segment = _segment(index, token, num_segments, True)
    if segment >= 0:
        gate = s.gate if s.gate[0] is None else _row(s.gate, group, segment)
        scale = s.scale if s.scale[0] is None else _row(s.scale, group, segment)
        shift = s.shift if SHIFT_PER_TOKEN or s.shift[0] is None else _row(s.shift, group, segment)
        forward_row(s, (gate, scale, shift), group, row, num_features, NORM, BLOCK_D)
    else:
        cols = tl.arange(0, BLOCK_D)
        nan = tl.full([BLOCK_D], float("nan"), tl.float32)
        if NORM != "none":
            store(s.y, token * num_features + cols, nan, cols < num_features)
            tl.store(s.rstd + token, float("nan"))
        if NORM == "layer":
            tl.store(s.mean + token, float("nan"))
        if s.residual[0] is not None:
            store(s.h, token * num_features + cols, nan, cols < num_features)


@triton.jit(do_not_specialize=["num_rows", "num_segments"])
def order_kernel(index, order, ends, num_rows, num_segments, BLOCK: tl.constexpr):
    """One program lists the tokens of one segment, in order, behind those of the segments before.

    A token without a row counts with the first segment.
    """
    group = tl.program_id(0).to(tl.int64) // num_segments
    segment = tl.program_id(0) % num_segments
    own, end = index + group * num_rows, group * num_rows
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < num_rows
        found = tl.maximum(_segment(own, rows, num_segments, mask), 0)
        end += tl.sum(tl.where(mask & (found < segment), 1, 0), 0)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < num_rows
        found = tl.maximum(_segment(own, rows, num_segments, mask), 0)
        is_mine = tl.where(mask & (found == segment), 1, 0)
        at = end + tl.cumsum(is_mine, 0) - 1
        tl.store(order + at, (group * num_rows + rows).to(tl.int32), is_mine > 0)
        end += tl.sum(is_mine, 0)
    tl.store(ends + tl.program_id(0), end)


@triton.jit(do_not_specialize=["num_segments", "num_tokens", "tokens_per_program"])
def backward_kernel(
    s, index, order, ends, num_segments, num_tokens, tokens_per_program, num_features,
    SHIFT_PER_TOKEN: tl.constexpr, NORM: tl.constexpr, BLOCKS,
):  # fmt: skip
    """One program goes through tokens that follow one another in `order`."""
    program = tl.program_id(0).to(tl.int64)
    at = program * tokens_per_program
    last = tl.minimum(at + tokens_per_program, num_tokens)
    while at < last:
        token = tl.load(order + at).to(tl.int64)
        group = token // size(s.num_rows)
        segment = tl.maximum(_segment(index, token, num_segments, True), 0)
        key = group * num_segments + segment
        end = tl.minimum(last, tl.load(ends + key))
        gate = s.gate if s.gate[0] is None else _row(s.gate, group, segment)
        scale = s.scale if s.scale[0] is None else _row(s.scale, group, segment)
        shift = s.shift if SHIFT_PER_TOKEN or s.shift[0] is None else _row(s.shift, group, segment)
        sums = no_sums(BLOCKS)
        for i in range(at, end):
            row = tl.load(order + i).to(tl.int64) % size(s.num_rows)
            sums = backward_row(
                s, (gate, scale, shift), group, row, sums, num_features, NORM, BLOCKS
            )
        store_sums(s, program + key, sums, num_features, BLOCKS)
        at = end


@triton.jit(do_not_specialize=["num_segments", "tokens_per_program"])
def reduce_kernel(
    s, ends, num_segments, tokens_per_program, num_features,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program makes the gradients of BLOCK_D features of all operands."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < num_features
    totals = no_totals(BLOCK_D)
    for i in range(size(s.num_groups)):
        key = tl.cast(i, tl.int64)
        start, end = tl.load(ends + key - 1, key > 0, other=0), tl.load(ends + key)
        first = start // tokens_per_program
        num_rows = tl.where(start < end, (end - 1) // tokens_per_program - first + 1, 0)
        scale = s.scale
        if s.scale[0] is not None:
            scale = _row(s.scale, key // num_segments, key % num_segments)
        totals = add_group(
            s, totals, key, scale, first + key, num_rows, cols, mask, num_features, BLOCK_P
        )
    store_totals(s, totals, cols, mask)


class _Segments:
    """The tokens of `x` in groups, their index, and tables as operands of the kernels."""

    def __init__(self, x: Tensor, tables: tuple[Tensor | None, ...], index: Tensor) -> None:
        self.x, self.num_segments = x, num_segments_of(*tables)
        self.groups = op.Groups(x, (x[..., :1, :],))
        every = x.new_empty(()).expand(*x.shape[:-2], self.num_segments, x.shape[-1])
        self.every, self.of_tables = every, op.Groups(every, (every[..., :1, :],))
        self.keys = op.Groups(every, (every,))
        sizes = self.groups.num_groups, self.groups.num_rows
        index = index.view(torch.int8) if index.dtype == torch.bool else index
        self.index = index.expand(x.shape[:-1]).contiguous()
        self.num_tokens = sizes[0] * sizes[1]
        self.sizes = tuple(map(unspecialized, sizes))

    def rows(self, t: Tensor | None) -> tuple[Tensor | None, int, int]:
        return rows_of(t, self.x, self.groups)

    def table(self, t: Tensor | None) -> tuple[Tensor | None, int, int]:
        return rows_of(t, self.every, self.of_tables)

    def order(self) -> tuple[Tensor, Tensor]:
        """All tokens by segment, and where each segment ends."""
        num_keys = self.groups.num_groups * self.num_segments
        order = self.x.new_empty(self.num_tokens, dtype=torch.int32)
        ends = self.x.new_empty(num_keys, dtype=torch.int64)
        order_kernel[(num_keys,)](
            self.index, order, ends, self.groups.num_rows, self.num_segments,
            BLOCK=ORDER_BLOCK, num_warps=8,
        )  # fmt: skip
        return order, ends


def forward(*args: Any) -> tuple[Tensor, ...]:
    """The op's forward, with fp32 statistics."""
    x, residual, gate, weight, bias, scale, shift, x_bias, index, shift_per_token = args[:10]
    norm, eps, weight_offset, scale_offset, *dtypes = args[10:]
    results = op.outputs(x, residual, norm, *dtypes)
    if not x.numel():
        return results
    segments = _Segments(x, (gate, scale, None if shift_per_token else shift), index)
    rows, table = segments.rows, segments.table
    shift_row = rows(shift) if shift_per_token else table(shift)
    stream = Forward._make((
        rows(x), rows(residual), table(gate), rows(weight), rows(bias), table(scale), shift_row,
        rows(x_bias), *results, eps, weight_offset, scale_offset, *segments.sizes, LAST,
    ))  # fmt: skip
    num_features = x.shape[-1]
    with torch.cuda.device_of(x):
        forward_kernel[(segments.num_tokens,)](
            stream, segments.index, segments.num_segments, num_features,
            SHIFT_PER_TOKEN=shift_per_token, NORM=norm,
            BLOCK_D=triton.next_power_of_2(num_features),
            **triton_tables.parameters(
                "norm_modulate forward", num_features, segments.num_tokens, x
            ),
        )  # fmt: skip
    return results


def backward(
    grad_y: Tensor | None, grad_h: Tensor | None, h: Tensor, x: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    """The op's backward: the tokens in order, a pass over them, one over the partial sums."""
    operands, index, shift_per_token, mean, rstd, norm = args[:6], *args[6:11]
    weight_offset, scale_offset, dtype, needs, recompute = args[11:]
    wants = op.wanted(grad_y, operands, needs)
    results = op.outputs_backward(grad_y, h, x, operands, wants, dtype, needs, recompute)
    if not h.numel():
        return tuple(t.zero_() for t in results)
    gate, weight, bias, scale, shift, x_bias = operands
    affine = any(wants[1:5])
    summed = (wants[0], affine, affine, wants[5])
    segments = _Segments(h, (gate, scale, None if shift_per_token else shift), index)
    rows, table, num_features = segments.rows, segments.table, h.shape[-1]
    shift_row = rows(shift) if shift_per_token else table(shift)
    kernel = "norm_modulate backward" + (" of four sums" if all(summed) else "")
    num_tokens, num_segments = segments.num_tokens, segments.num_segments
    chosen = triton_tables.parameters(kernel, num_features, num_tokens, h)
    tokens_per_program = triton.cdiv(num_tokens, num_sms(h) * chosen["programs"])
    num_programs, num_keys = triton.cdiv(num_tokens, tokens_per_program), segments.keys.num_groups
    each = iter(rstd.new_empty(sum(summed), num_programs + num_keys - 1, num_features))
    sums = [next(each) if want else None for want in summed]
    targets = [
        Target(grad if want else None, t, segments.keys)
        for grad, t, want in zip(results[2:-1], operands, wants, strict=True)
    ]
    dh, dx, *_, y = map(present, results)
    stream = Backward._make((
        rows(grad_y), rows(grad_h), rows(h), rows(x if wants[0] else None),
        table(gate), rows(weight), rows(bias), table(scale), shift_row, rows(x_bias), mean, rstd,
        dh, dx, None, None, y, *sums, weight_offset, scale_offset,
        *segments.sizes, unspecialized(num_programs), tl.constexpr(False),
    ))  # fmt: skip
    with torch.cuda.device_of(h):
        order, ends = segments.order()
        backward_kernel[(num_programs,)](
            stream, segments.index, order, ends, num_segments, num_tokens, tokens_per_program,
            num_features, SHIFT_PER_TOKEN=shift_per_token, NORM=norm,
            BLOCKS=blocks_of(num_features, chosen["pieces"]), num_warps=chosen["num_warps"],
        )  # fmt: skip
        if any(summed):
            reduction = Reduce._make((
                rows(weight), rows(bias), table(scale), *sums, *(t.argument for t in targets),
                weight_offset, scale_offset, unspecialized(num_keys), unspecialized(num_programs),
                LAST,
            ))  # fmt: skip
            reduce_kernel[(triton.cdiv(num_features, REDUCE_D),)](
                reduction, ends, num_segments, tokens_per_program, num_features,
                BLOCK_P=REDUCE_P, BLOCK_D=REDUCE_D, num_warps=4,
            )  # fmt: skip
    for target in targets:
        target.finish()
    return results
