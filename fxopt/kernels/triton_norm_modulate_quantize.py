"""Triton provider of `fxopt::norm_modulate_quantize` and of its transposed copy.

A row's largest magnitude is known to the program that owns the row: rows with scales of their own
are normed, rounded and cast in one pass, and so are all rows where the magnitude behind their one
scale is known beforehand; else a second pass casts where they share one scale.
The transposed copy is cast tile by tile from the norm's input and its statistics.

Shapes: M tokens are G groups of R rows that share per-group operands; K features; P programs.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import native_norm_modulate as op
from fxopt.kernels import triton_quantize as launch
from fxopt.kernels import triton_tables
from fxopt.kernels.counters import Slot
from fxopt.kernels.triton_quantize_kernels import (
    code_of,
    count,
    factor_of,
    magnitude,
    raise_to,
    scale_of,
    store_codes,
    tile_indices,
)
from fxopt.kernels.triton_rows import (
    affine_of,
    gated_residual,
    groups_of,
    load,
    mean_of,
    modulate,
    modulation_of,
    rows_of,
)
from fxopt.recipes import Operand

# Programs per SM: each leaves K magnitudes where columns have scales of their own.
NUM_PROGRAMS, NUM_PROGRAMS_OF_COLUMNS = 8, 2
TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def rows_kernel(
    x, residual, gate, weight, bias, scale, shift, x_bias, h, mean, rstd, codes, scales,
    column_amax, tensor_amax,
    num_tokens, num_rows, num_features, padded_columns, eps, weight_offset, scale_offset, counters,
    known, seen,
    NORM: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr,
    POW2: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program strides over tokens; inputs and operands are (pointer, group stride, row stride).

    column_amax [P, K] and tensor_amax [P] are bits of the largest magnitudes that a program met;
    codes, scales and those two are None where not wanted. All rows are scaled by the magnitude
    known [1] if it is there; seen [1] is raised to the magnitudes.
    """
    cols = tl.arange(0, BLOCK_K)
    mask = cols < num_features
    largest = tl.zeros([BLOCK_K], tl.int32)
    program = tl.program_id(0).to(tl.int64)
    if known is not None:
        factor = factor_of(tl.load(known), LARGEST, POW2)
        tl.store(scales, scale_of(factor), program == 0)
    for token in range(program, num_tokens, tl.num_programs(0)):
        group, row = token // num_rows, token % num_rows
        if residual[0] is not None:
            value = gated_residual(x, residual, gate, x_bias, group, row, cols, mask)
            rounded = value.to(h.dtype.element_ty)
            tl.store(h + token * num_features + cols, rounded, mask=mask)
            value = rounded.to(tl.float32)
        else:
            value = load(x, group, row, cols, mask)
        if NORM == "layer":
            kept = x[0] if residual[0] is None else h
            row_mean = mean_of(value, kept, num_features, mask)
            tl.store(mean + token, row_mean)
            value = tl.where(mask, value - row_mean, 0.0)
        row_rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / num_features + eps)
        tl.store(rstd + token, row_rstd)
        n = affine_of(value * row_rstd, weight, bias, weight_offset, cols, mask)
        modulation = modulation_of(scale, scale_offset, group, row, cols, mask)
        y = modulate(n, modulation, shift, group, row, cols, mask)
        y = tl.where(mask, y.to(DTYPE).to(tl.float32), 0.0)
        bits = magnitude(y)
        largest = tl.maximum(largest, bits)
        if codes is not None:
            if known is None:
                factor = factor_of(tl.max(bits, 0), LARGEST, POW2)
                tl.store(scales + token, scale_of(factor))
            scaled = tl.where(mask, y * factor, 0.0)
            code = code_of(scaled, LARGEST, FORMAT)
            if counters is not None:
                count(counters, y, scaled, code, factor, token == 0, LARGEST)
            tl.store(codes + token * padded_columns + cols, code, mask=cols < padded_columns)
    if column_amax is not None:
        tl.store(column_amax + program * num_features + cols, largest, mask=mask)
    if tensor_amax is not None:
        tl.store(tensor_amax + program, tl.max(largest, 0))
    if seen is not None:
        raise_to(seen, tl.max(largest, 0))


@triton.jit
def _tile(t, group, row, c, mask):
    """fp32 tile of an operand (pointer, group stride, row stride)."""
    offsets = group[:, None] * t[1] + row[:, None] * t[2] + c[None, :]
    return tl.load(t[0] + offsets, mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "group_rows", "num_rows", "num_row_partials", "num_column_partials", "num_tiles",
    ]
)  # fmt: skip
def tiles_kernel(
    h, weight, bias, scale, shift, mean, rstd, group_rows, weight_offset, scale_offset,
    num_rows, num_columns, num_row_partials, num_column_partials, num_tiles,
    row_amax, column_amax, tile_amax, codes, scales, codes_t, scales_t, amax,
    padded_rows, padded_columns, counters, counters_t, seen,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, DTYPE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of y, made from the norm's input h and its statistics.

    h and the operands are (pointer, group stride, row stride); mean is None for an RMSNorm.
    """
    r, c = tile_indices(BLOCK_R, BLOCK_C)
    group, row = r // group_rows, r % group_rows
    mask = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    y = _tile(h, group, row, c, mask)
    if mean is not None:
        y = y - tl.load(mean + r, r < num_rows, other=0.0)[:, None]
    y = y * tl.load(rstd + r, r < num_rows, other=0.0)[:, None]
    if weight[0] is not None:
        y = y * (weight_offset + _tile(weight, group, row, c, mask))
    if bias[0] is not None:
        y = y + _tile(bias, group, row, c, mask)
    if scale[0] is not None:
        y = y * (scale_offset + _tile(scale, group, row, c, mask))
    if shift[0] is not None:
        y = y + _tile(shift, group, row, c, mask)
    y = tl.where(mask, y.to(DTYPE).to(tl.float32), 0.0)
    store_codes(
        y, r, c, num_rows, num_columns, num_row_partials, num_column_partials, num_tiles,
        row_amax, column_amax, tile_amax, codes, scales, codes_t, scales_t, amax,
        padded_rows, padded_columns, counters, counters_t, seen,
        FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
    )  # fmt: skip


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
    rows: str,
    columns: str | None,
    counters: Tensor | None = None,
    known: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Codes, scales, amax_t, h, mean and rstd; x is not empty and nothing is fp64."""
    by_row, by_column = Operand.parse(rows), None if columns is None else Operand.parse(columns)
    num_features = x.shape[-1]
    num_tokens = x.numel() // num_features
    _, h, mean, rstd = op.outputs(x, residual, "none", h_dtype, dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = x.new_empty(x.shape[:-1] if norm == "layer" else 0, dtype=torch.float32)
    groups = groups_of(x, (gate, scale, shift))
    has_own = by_row.block == "row" or known is not None
    copy = launch.copy_for(x, by_row, num_tokens, num_features) if has_own else None
    of_columns = by_column is not None and by_column.block == "row"
    of_tensor = not has_own or (by_column is not None and not of_columns)
    num_programs = min(_num_programs(x, of_columns), num_tokens)
    amax = launch.Amax(
        None,
        x.new_empty((num_programs, num_features), dtype=torch.int32) if of_columns else None,
        x.new_empty(num_programs, dtype=torch.int32) if of_tensor else None,
    )
    formats = launch.settings(by_row, None)
    padded = launch.padded_size(by_row, num_features)
    given = (x, residual, gate, weight, bias, scale, shift, x_bias)
    with torch.cuda.device_of(x):
        rows_kernel[(num_programs,)](
            *(rows_of(t, x, groups) for t in given), h, mean, rstd,
            *launch.pointers(copy), amax.columns, amax.tensor,
            num_tokens, groups.num_rows, num_features, padded, eps, weight_offset, scale_offset,
            counters, None if known is None else known.view(torch.int32), seen,
            NORM=norm, DTYPE=TRITON_DTYPES[dtype], **_without_transposed(formats),
            BLOCK_K=triton.next_power_of_2(padded),
            **triton_tables.parameters("norm_modulate forward", padded, num_tokens, x),
        )  # fmt: skip
    source = x if residual is None else h
    affine, constants = (weight, bias, scale, shift), (norm, weight_offset, scale_offset, dtype)
    matrix = _matrix(source, affine, mean, rstd, groups, constants)
    if copy is None:
        amax_t = launch.amax_for(matrix, by_column)
        copy = launch.cast(
            tiles_kernel, matrix, amax, by_row, None, amax_t, (), Slot(rows=counters)
        )[0]
    else:
        amax_t = None if by_column is None else amax.of(by_column)
    return copy.codes, copy.scales, launch.present(amax_t, x), h, mean, rstd


def columns(
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    eps: float,
    weight_offset: float,
    scale_offset: float,
    dtype: torch.dtype,
    columns: str,
    amax_t: Tensor,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of the transposed copy, in one pass."""
    by_column = Operand.parse(columns)
    groups = groups_of(h, (scale, shift))
    settings = (norm, weight_offset, scale_offset, dtype)
    matrix = _matrix(h, (weight, bias, scale, shift), mean, rstd, groups, settings)
    amax = launch.Amax.known(by_column, amax_t)
    slot = Slot(columns=counters)
    copy = launch.cast(tiles_kernel, matrix, amax, None, by_column, None, (), slot)[1]
    return copy.codes, copy.scales


def _matrix(
    h: Tensor,
    operands: Sequence[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    groups: op.Groups,
    settings: tuple[str, float, float, torch.dtype],
) -> launch.Matrix:
    """y, as `tiles_kernel` makes its tiles."""
    norm, weight_offset, scale_offset, dtype = settings
    arguments = (
        *(rows_of(t, h, groups) for t in (h, *operands)),
        mean if norm == "layer" else None,
        rstd,
        groups.num_rows,
        weight_offset,
        scale_offset,
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
