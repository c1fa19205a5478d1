"""Triton kernels of `fxopt::norm_modulate_segments`, for one or more streams.

The backward goes through the tokens in the order of their segments, each program through as many
of them. A program writes a row of partial sums for each segment that it meets: P programs and K
segments make P + K - 1 rows at most, however many tokens there are. Of program p and segment k it
is row p + k: along the order one of them grows with each row written, so no two share one, and the
rows of a segment follow one another. No atomics are needed.

Shapes: G groups of R tokens with tables of their own, of N rows; K = G * N segments; D features.
"""


# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxopt.kernels.triton_norm_modulate_kernels import (
    backward_row,
    backward_rows,
    forward_row,
    no_sums,
    store_sums,
)
from fxopt.kernels.triton_norm_modulate_sums import (
    add_group,
    no_totals,
    reduce_stream,
    store_totals,
)
from fxopt.kernels.triton_rows import store
from fxopt.kernels.triton_segments import row_of, segment_of
from fxopt.kernels.triton_sizes import size


class Reading(NamedTuple):
    """How the tables of a stream are read; pointers, and sizes that are `unspecialized`.

    index: of each token; None for a stream without tables. index_of_shift: the same, None if the
    shift is no table. order: all tokens by segment. ends: of the segments in it.
    """

    index: Any = None
    index_of_shift: Any = None
    num_segments: Any = None
    order: Any = None
    ends: Any = None
    tokens_per_program: Any = None
    num_tokens: Any = None


@triton.jit
def _forward_by_segment(s, reading, token, num_features, NORM: tl.constexpr, BLOCK_D: tl.constexpr):
    group, row = token // size(s.num_rows), token % size(s.num_rows)
    segment = segment_of(reading.index, token, size(reading.num_segments), True)
    if segment >= 0:
        gate = s.gate if s.gate[0] is None else row_of(s.gate, group, segment)
        scale = s.scale if s.scale[0] is None else row_of(s.scale, group, segment)
        shift = s.shift
        if reading.index_of_shift is not None and s.shift[0] is not None:
            shift = row_of(s.shift, group, segment)
        m = gate, scale, shift
        forward_row(s, m, group, row, num_features, NORM, BLOCK_D)
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


@triton.jit
def forward_kernel(
    streams, num_features, NUM_STREAMS: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program is one token; streams are (Forward, Reading, LAST)."""
    token = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(NUM_STREAMS):
        s, reading, _ = streams[i]
        num_tokens = size(s.num_groups).to(tl.int64) * size(s.num_rows)
        if (token >= 0) & (token < num_tokens):
            if reading.index is not None:
                _forward_by_segment(s, reading, token, num_features, NORM, BLOCK_D)
            else:
                group, row = token // size(s.num_rows), token % size(s.num_rows)
                m = s.gate, s.scale, s.shift
                forward_row(s, m, group, row, num_features, NORM, BLOCK_D)
        token -= num_tokens


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
        found = tl.maximum(segment_of(own, rows, num_segments, mask), 0)
        end += tl.sum(tl.where(mask & (found < segment), 1, 0), 0)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < num_rows
        found = tl.maximum(segment_of(own, rows, num_segments, mask), 0)
        is_mine = tl.where(mask & (found == segment), 1, 0)
        at = end + tl.cumsum(is_mine, 0) - 1
        tl.store(order + at, (group * num_rows + rows).to(tl.int32), is_mine > 0)
        end += tl.sum(is_mine, 0)
    tl.store(ends + tl.program_id(0), end)


@triton.jit
def _backward_by_segment(s, reading, program, num_features, NORM: tl.constexpr, BLOCKS):
    """Tokens that follow one another in `order`."""
    num_segments, tokens_per_program = size(reading.num_segments), size(reading.tokens_per_program)
    at = program * tokens_per_program
    last = tl.minimum(at + tokens_per_program, size(reading.num_tokens))
    while at < last:
        token = tl.load(reading.order + at).to(tl.int64)
        group = token // size(s.num_rows)
        segment = tl.maximum(segment_of(reading.index, token, num_segments, True), 0)
        key = group * num_segments + segment
        end = tl.minimum(last, tl.load(reading.ends + key))
        gate = s.gate if s.gate[0] is None else row_of(s.gate, group, segment)
        scale = s.scale if s.scale[0] is None else row_of(s.scale, group, segment)
        shift = s.shift
        if reading.index_of_shift is not None and s.shift[0] is not None:
            shift = row_of(s.shift, group, segment)
        m = gate, scale, shift
        sums = no_sums(BLOCKS)
        for i in range(at, end):
            row = tl.load(reading.order + i).to(tl.int64) % size(s.num_rows)
            sums = backward_row(s, m, group, row, sums, num_features, NORM, BLOCKS)
        store_sums(s, program + key, sums, num_features, BLOCKS)
        at = end


@triton.jit
def backward_kernel(streams, num_features, NUM_STREAMS: tl.constexpr, NORM: tl.constexpr, BLOCKS):
    """A program belongs to one of the streams, which are (Backward, Reading, LAST)."""
    program = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(NUM_STREAMS):
        s, reading, _ = streams[i]
        num_programs = size(s.num_programs)
        total = num_programs
        if reading.index is None:
            total = size(s.num_groups) * num_programs
        if (program >= 0) & (program < total):
            if reading.index is not None:
                _backward_by_segment(s, reading, program, num_features, NORM, BLOCKS)
            else:
                backward_rows(
                    s, program // num_programs, program % num_programs, num_features, NORM, BLOCKS
                )
        program -= total


@triton.jit
def _reduce_by_segment(
    s, reading, cols, mask, num_features, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    num_segments, tokens_per_program = size(reading.num_segments), size(reading.tokens_per_program)
    totals = no_totals(BLOCK_D)
    for i in range(size(s.num_groups)):
        key = tl.cast(i, tl.int64)
        start = tl.load(reading.ends + key - 1, key > 0, other=0)
        end = tl.load(reading.ends + key)
        first = start // tokens_per_program
        num_rows = tl.where(start < end, (end - 1) // tokens_per_program - first + 1, 0)
        scale = s.scale
        if s.scale[0] is not None:
            scale = row_of(s.scale, key // num_segments, key % num_segments)
        totals = add_group(
            s, totals, key, scale, first + key, num_rows, cols, mask, num_features, BLOCK_P
        )
    store_totals(s, totals, cols, mask)


@triton.jit
def reduce_kernel(
    streams, num_features, NUM_STREAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program makes the gradients of BLOCK_D features of a stream's operands."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < num_features
    for i in tl.static_range(NUM_STREAMS):
        if tl.program_id(1) == i:
            s, reading, _ = streams[i]
            if reading.index is not None:
                _reduce_by_segment(s, reading, cols, mask, num_features, BLOCK_P, BLOCK_D)
            else:
                reduce_stream(s, cols, mask, num_features, BLOCK_P, BLOCK_D)
