"""Triton provider of `fxopt::gated_activation_quantize` and of its backward.

The activation, and what the linear takes beside it, is made tile by tile where it is measured, and
again where it is cast; if the magnitude is known beforehand, it is only cast. The backward casts
the transposed copy in the pass that makes gradients.

Shapes: M tokens, K features, of which the last F are the activation's.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_quantize as launch
from fxopt.kernels.counters import Slot
from fxopt.kernels.native_gated_activation import halves
from fxopt.kernels.triton_gated_activation import rows_of
from fxopt.kernels.triton_gated_activation_kernels import gradients, value_of
from fxopt.kernels.triton_quantize_kernels import (
    load_tile,
    store_amax,
    store_codes,
    tile_indices,
)
from fxopt.recipes import Operand

# Twice the usual: a thread holds elements of up to four tensors; with 8 warps the backward spilled.
NUM_WARPS = 16


@triton.jit
def features(r, c, width, num_rows, num_columns):
    """Row and feature indices of the activation in a tile, and which of its elements are such."""
    f = c - width
    mask = (r < num_rows)[:, None] & ((f >= 0) & (c < num_columns))[None, :]
    return r[:, None], f[None, :], mask


@triton.jit
def joined(value, mask, gate, beside, width, r, c, num_rows):
    """fp32 tile of [beside | value], the value rounded as gate is; zero outside."""
    value = tl.where(mask, value.to(gate.pointer.dtype.element_ty).to(tl.float32), 0.0)
    if beside is not None:
        other = load_tile(*beside, r, c, num_rows, width)
        value = tl.where((c < width)[None, :], other, value)
    return value


@triton.jit
def activation_tile(
    gate, up, beside, width, r, c, num_rows, num_columns, ACTIVATION: tl.constexpr
):  # fmt: skip
    """fp32 tile of [beside | act(gate) * up], rounded as it would be stored; zero outside.

    gate, up and beside are `Rows` or None; beside has `width` columns.
    """
    n, f, mask = features(r, c, width, num_rows, num_columns)
    value = value_of(gate, up, n, f, mask, ACTIVATION, tl.float32)
    return joined(value, mask, gate, beside, width, r, c, num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def amax_kernel(
    gate, up, beside, width, num_rows, num_columns, row_amax, column_amax, tile_amax,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_amax` of [beside | activation]."""
    r, c = tile_indices(BLOCK_R, BLOCK_C)
    value = activation_tile(gate, up, beside, width, r, c, num_rows, num_columns, ACTIVATION)
    store_amax(value, r, c, num_rows, num_columns, row_amax, column_amax, tile_amax, None)


@triton.jit(do_not_specialize=["num_rows", "num_row_partials", "num_column_partials", "num_tiles"])
def cast_kernel(
    gate, up, beside, width,
    num_rows, num_columns, num_row_partials, num_column_partials, num_tiles,
    row_amax, column_amax, tile_amax, codes, scales, codes_t, scales_t, amax,
    padded_rows, padded_columns, counters, counters_t, seen,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of [beside | activation]."""
    r, c = tile_indices(BLOCK_R, BLOCK_C)
    value = activation_tile(gate, up, beside, width, r, c, num_rows, num_columns, ACTIVATION)
    store_codes(
        value, r, c, num_rows, num_columns, num_row_partials, num_column_partials, num_tiles,
        row_amax, column_amax, tile_amax, codes, scales, codes_t, scales_t, amax,
        padded_rows, padded_columns, counters, counters_t, seen,
        FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    grad, gate, up, beside, dgate, dup, width,
    num_rows, num_columns, num_row_partials, num_column_partials, num_tiles,
    row_amax, column_amax, tile_amax, codes, scales, codes_t, scales_t, amax,
    padded_rows, padded_columns, counters, counters_t, seen,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dgate = grad * up * act'(gate), dup = grad * act(gate), `store_codes` of [beside | act * up].

    Matrices are `Rows` or None; all but beside belong to the activation.
    """
    r, c = tile_indices(BLOCK_R, BLOCK_C)
    n, f, mask = features(r, c, width, num_rows, num_columns)
    value, _, _ = gradients(grad, gate, up, dgate, dup, n, f, mask, ACTIVATION, tl.float32)
    value = joined(value, mask, gate, beside, width, r, c, num_rows)
    store_codes(
        value, r, c, num_rows, num_columns, num_row_partials, num_column_partials, num_tiles,
        row_amax, column_amax, tile_amax, codes, scales, codes_t, scales_t, amax,
        padded_rows, padded_columns, counters, counters_t, seen,
        FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
    )  # fmt: skip


def forward(
    gate: Tensor,
    up: Tensor | None,
    beside: Tensor | None,
    activation: str,
    packing: str,
    rows: str,
    columns: str | None,
    counters: Tensor | None = None,
    known: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and amax_t; gate is not empty and not fp64."""
    by_row, by_column = Operand.parse(rows), None if columns is None else Operand.parse(columns)
    matrix = _matrix(gate, up, beside, activation, packing)
    if known is None:
        amax = launch.measure(amax_kernel, matrix, by_row, by_column)
    else:
        amax = launch.Amax.known(None, known)
    amax_t = launch.amax_for(matrix, by_column)
    slot = Slot(counters, None, known, seen)
    copy = launch.cast(cast_kernel, matrix, amax, by_row, None, amax_t, (), slot)[0]
    return copy.codes, copy.scales, launch.present(amax_t, gate)


def backward(
    grads: tuple[Tensor, Tensor | None],
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    beside: Tensor | None,
    activation: str,
    packing: str,
    columns: str,
    amax_t: Tensor,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write `grads`, dgate and dup; codes and scales of the transposed copy, in the same pass."""
    by_column = Operand.parse(columns)
    matrix = _matrix(gate, up, beside, activation, packing)
    dgate, dup = halves(*grads, packing)
    *given, width = matrix.arguments
    arguments = (rows_of(grad), *given, rows_of(dgate), rows_of(dup), width)
    amax = launch.Amax.known(by_column, amax_t)
    matrix = matrix._replace(arguments=arguments)
    slot = Slot(columns=counters)
    copy = launch.cast(backward_kernel, matrix, amax, None, by_column, None, (), slot)[1]
    return copy.codes, copy.scales


def _matrix(
    gate: Tensor, up: Tensor | None, beside: Tensor | None, activation: str, packing: str
) -> launch.Matrix:
    gate, up = halves(gate, up, packing)
    width = 0 if beside is None else beside.shape[-1]
    num_features = gate.shape[-1]
    arguments = (*(rows_of(t) for t in (gate, up, beside)), width)
    constants = {"ACTIVATION": activation, "num_warps": NUM_WARPS}
    num_tokens = gate.numel() // num_features
    return launch.Matrix(arguments, num_tokens, width + num_features, gate, constants)
