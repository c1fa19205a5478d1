"""Triton provider of `fxopt::norm_modulate_quantize` and of its transposed copy: how the kernels
are launched, for one or more calls.

Shapes: M tokens are G groups of R rows that share per-group operands; K features; P programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op
from fxopt.kernels import triton_norm_modulate_quantize_kernels as kernels
from fxopt.kernels import triton_quantize as launch
from fxopt.kernels import triton_quantize_group as group
from fxopt.kernels import triton_tables
from fxopt.kernels.counters import Slot
from fxopt.kernels.saving import valued
from fxopt.kernels.triton_rows import groups_of, packed_rows_of, pointers_of, rows_of
from fxopt.kernels.triton_segments import Segments
from fxopt.kernels.triton_sizes import LAST, unspecialized
from fxopt.recipes import Operand

# Programs per SM: each leaves K magnitudes where columns have scales of their own.
NUM_PROGRAMS, NUM_PROGRAMS_OF_COLUMNS = 8, 2
TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def forward(*args: Any) -> tuple[Tensor, ...]:
    """The op's forward."""
    return forward_of([args])[0]


def columns(*args: Any) -> tuple[Tensor, Tensor]:
    """The transposed copy."""
    return columns_of([args])[0]


# Of a call by segment its index, and whether its shift is per token.
Index = tuple[Tensor, bool]


def forward_of(
    calls: Sequence[tuple[Any, ...]], indices: Sequence[Index | None] = ()
) -> list[tuple[Tensor, ...]]:
    """Codes, scales, amax_t, h, mean and rstd of each call; no x is empty and nothing is fp64.

    Width, norm, dtypes and operands are those of the first, and all magnitudes are known or none.

    Args:
        calls: arguments of `fxopt::norm_modulate_quantize`, and its lines if it counts.
        indices: of each call; None where gate, scale and shift are no tables.
    """
    x, norm, dtype, (rows, columns) = calls[0][0], calls[0][8], calls[0][13], calls[0][14:16]
    by_row, by_column = Operand.parse(rows), None if columns is None else Operand.parse(columns)
    slots = [Slot(line, None, *more) for line, *more in (c[16:19] or [None] * 3 for c in calls)]
    has_own = by_row.block == "row" or slots[0].known is not None
    of_columns = by_column is not None and by_column.block == "row"
    of_tensor = not has_own or (by_column is not None and not of_columns)
    num_tokens = [call[0].numel() // call[0].shape[-1] for call in calls]
    share = _num_programs(x, of_columns) / sum(num_tokens)
    made = []
    each = zip(calls, slots, num_tokens, indices or [None] * len(calls), strict=True)
    for call, slot, num, index in each:
        num_programs = min(max(1, int(share * num)), num)
        made.append(_Rows(call, slot, num_programs, has_own, of_columns, of_tensor, index))
    padded = launch.padded_size(by_row, x.shape[-1])
    with torch.cuda.device_of(x):
        kernels.rows_kernel[(sum(m.num_programs for m in made),)](
            tuple(m.stream() for m in made), x.shape[-1], padded,
            NUM_STREAMS=len(made), NORM=norm, DTYPE=TRITON_DTYPES[dtype],
            **_without_transposed(launch.settings(by_row, None)),
            BLOCK_K=triton.next_power_of_2(padded),
            **triton_tables.parameters("norm_modulate forward", padded, sum(num_tokens), x),
        )  # fmt: skip
    if has_own:
        copies = [m.copy for m in made]
        amax_t = [None if by_column is None else m.amax.of(by_column) for m in made]
    else:
        matrices = [m.matrix() for m in made]
        amax_t = [launch.amax_for(matrix, by_column) for matrix in matrices]
        lines, amaxes = [Slot(rows=slot.rows) for slot in slots], [m.amax for m in made]
        given = matrices, amaxes, [(by_row, None)] * len(matrices), lines
        pairs = group.cast(kernels.tiles_kernel, *given, amax_out=amax_t)
        copies = [copy for copy, _ in pairs]
    return [
        (copy.codes, copy.scales, launch.present(amax, m.h), m.h, m.mean, m.rstd)
        for m, copy, amax in zip(made, copies, amax_t, strict=True)
    ]


class _Rows:
    """One call of the forward: what its rows leave."""

    def __init__(
        self,
        call: tuple[Any, ...],
        slot: Slot,
        num_programs: int,
        has_own: bool,
        of_columns: bool,
        of_tensor: bool,
        index: Index | None,
    ) -> None:
        self.call, self.slot, self.num_programs = call, slot, num_programs
        (x, residual, gate, *_, scale, shift, _), norm = call[:8], call[8]
        num_features = x.shape[-1]
        self.num_tokens = x.numel() // num_features
        self.modulation = _Modulation(x, gate, scale, shift, index)
        _, self.h, *_ = op.outputs(x, residual, "none", *call[12:14])
        self.rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        self.mean = x.new_empty(x.shape[:-1] if norm == "layer" else 0, dtype=torch.float32)
        by_row = Operand.parse(call[14])
        copy = launch.copy_for(x, by_row, self.num_tokens, num_features) if has_own else None
        self.copy = launch.nothing(x) if copy is None else copy
        self.pointers = launch.pointers(copy)
        sizes = (num_programs, num_features), (num_programs,)
        bits = [x.new_empty(size, dtype=torch.int32) for size in sizes]
        self.amax = launch.Amax(
            None, bits[0] if of_columns else None, bits[1] if of_tensor else None
        )

    def stream(self) -> kernels.Stream:
        """Arguments of the first kernel."""
        known = None if self.slot.known is None else self.slot.known.view(torch.int32)
        x, residual, _, weight, bias, *_, x_bias = self.call[:8]
        rows, (gate, scale, shift) = self.modulation.rows, self.modulation.operands
        sizes = self.num_tokens, self.modulation.groups.num_rows, self.num_programs
        return kernels.Stream._make((
            rows(x), rows(residual), gate, rows(weight), rows(bias), scale, shift, rows(x_bias),
            self.h, self.mean, self.rstd, *self.pointers, self.amax.columns, self.amax.tensor,
            self.slot.rows, known, self.slot.seen, *self.call[9:12], *map(unspecialized, sizes),
            *self.modulation.index, *pointers_of(self.call[19:]), LAST,
        ))  # fmt: skip

    def matrix(self) -> launch.Matrix:
        """Those of the second."""
        x, residual, _, weight, bias = self.call[:5]
        norm, _, weight_offset, scale_offset, _, dtype = self.call[8:14]
        h = x if residual is None else self.h
        constants = norm, weight_offset, scale_offset, dtype
        return _matrix(h, weight, bias, self.mean, self.rstd, self.modulation, constants)


class _Modulation:
    """The rows of x in groups, gate, scale and shift of them, and by which index they look it up.

    operands: gate, scale and shift, each (pointer, group stride, row stride). index: the pointer,
    that of a shift which is a table, and the number of segments; or None.
    """

    def __init__(
        self,
        x: Tensor,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        index: Index | None,
    ) -> None:
        given, per_token = (gate, scale, shift), index is not None and index[1]
        tables = gate, scale, None if per_token else shift
        # The transposed copy of what only a gate was looked up for has none.
        if index is None or all(table is None for table in tables):
            self.x, self.groups = x, groups_of(x, given)
            self.operands = tuple(map(self.rows, given))
            self.index: tuple[Any, ...] = None, None, None
            return
        segments = Segments(x, tables, index[0])
        self.x, self.groups = x, segments.groups
        of_shift = self.rows(shift) if per_token else segments.table(shift)
        self.operands = segments.table(gate), segments.table(scale), of_shift
        num_segments = unspecialized(segments.num_segments)
        self.index = segments.index, None if per_token else segments.index, num_segments

    def rows(self, t: Tensor | None) -> tuple[Tensor | None, int, int]:
        return rows_of(t, self.x, self.groups)


def columns_of(
    calls: Sequence[tuple[Any, ...]], indices: Sequence[Index | None] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of the transposed copy of each call, in one pass; as `forward_of`."""
    by_column = Operand.parse(calls[0][12])
    matrices, amaxes = [], []
    for call, index in zip(calls, indices or [None] * len(calls), strict=True):
        h, weight, bias, scale, shift, mean, rstd, norm, _, *offsets, dtype, _, amax_t = call[:14]
        modulation, constants = _Modulation(h, None, scale, shift, index), (norm, *offsets, dtype)
        matrix = _matrix(h, weight, bias, mean, rstd, modulation, constants, *call[15:])
        matrices.append(matrix)
        amaxes.append(launch.Amax.known(by_column, amax_t))
    slots = [Slot(columns=call[14] if len(call) > 14 else None) for call in calls]
    formats = [(None, by_column)] * len(matrices)
    pairs = group.cast(kernels.tiles_kernel, matrices, amaxes, formats, slots)
    return [(copy.codes, copy.scales) for _, copy in pairs]


def _matrix(
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    modulation: _Modulation,
    settings: tuple[Any, ...],
    h_scales: Tensor | None = None,
) -> launch.Matrix:
    """y, as `tiles_kernel` makes its tiles; settings: norm, both offsets and dtype. h may be codes
    of values of that dtype."""
    norm, weight_offset, scale_offset, dtype = settings
    rows, (_, scale, shift) = modulation.rows, modulation.operands
    like = None if h_scales is None else valued(h, dtype)
    arguments = (
        packed_rows_of(h, h_scales, like, modulation.x, modulation.groups),
        *(rows(weight), rows(bias), scale, shift),
        mean if norm == "layer" else None,
        rstd,
        unspecialized(modulation.groups.num_rows),
        weight_offset,
        scale_offset,
        *modulation.index,
    )
    num_features = h.shape[-1]
    constants = {"DTYPE": TRITON_DTYPES[dtype]}
    return launch.Matrix(arguments, h.numel() // num_features, num_features, h, constants)


def _num_programs(x: Tensor, leaves_columns: bool) -> int:
    per_sm = NUM_PROGRAMS_OF_COLUMNS if leaves_columns else NUM_PROGRAMS
    if not x.is_cuda:
        return per_sm
    return per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count


def _without_transposed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.endswith("_T")}
