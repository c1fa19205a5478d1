"""Triton provider of `fxopt::gated_activation_quantize` and of its backward, of one or more calls.

The activation, and what the linear takes beside it, is made tile by tile where it is measured, and
again where it is cast; if the magnitude is known beforehand, it is only cast. The backward casts
the transposed copy in the pass that makes gradients.

Shapes: M tokens, K features, of which the last F are the activation's.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_quantize as launch
from fxopt.kernels import triton_quantize_group as group
from fxopt.kernels.counters import Slot
from fxopt.kernels.native_gated_activation import halves
from fxopt.kernels.triton_gated_activation import rows_of
from fxopt.kernels.triton_gated_activation_kernels import gradients, value_of
from fxopt.kernels.triton_quantize_group import has_tile, store_amax_of, store_codes_of
from fxopt.kernels.triton_quantize_kernels import load_tile, tile_indices
from fxopt.kernels.triton_sizes import LAST, size
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
    gate, up, beside, width, last, r, c, num_rows, num_columns, ACTIVATION: tl.constexpr
):  # fmt: skip
    """fp32 tile of [beside | act(gate) * up], rounded as it would be stored; zero outside.

    gate, up and beside are `Rows` or None; beside has `width` columns.
    """
    n, f, mask = features(r, c, width, num_rows, num_columns)
    value = value_of(gate, up, n, f, mask, ACTIVATION, tl.float32)
    return joined(value, mask, gate, beside, width, r, c, num_rows)


@triton.jit
def amax_kernel(
    parts, NUM_PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_amax` of [beside | activation] of each part, made of (gate, up, beside, width)."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            num_rows, num_columns = size(part.num_rows), part.num_columns
            value = activation_tile(*part.tile, r, c, num_rows, num_columns, ACTIVATION)
            store_amax_of(part, value, r, c)


@triton.jit
def cast_kernel(
    parts, NUM_PARTS: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of [beside | activation] of each part, made of (gate, up, beside, width)."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            num_rows, num_columns = size(part.num_rows), part.num_columns
            value = activation_tile(*part.tile, r, c, num_rows, num_columns, ACTIVATION)
            store_codes_of(
                part, value, r, c,
                FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
            )  # fmt: skip


@triton.jit
def backward_kernel(
    parts, NUM_PARTS: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT_T: tl.constexpr, LARGEST: tl.constexpr, LARGEST_T: tl.constexpr,
    POW2: tl.constexpr, POW2_T: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dgate = grad * up * act'(gate), dup = grad * act(gate), `store_codes` of [beside | act * up].

    A part is made of (grad, gate, up, beside, dgate, dup, width): matrices are `Rows` or None; all
    but beside belong to the activation.
    """
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            grad, gate, up, beside, dgate, dup, width, _ = part.tile
            num_rows = size(part.num_rows)
            n, f, mask = features(r, c, width, num_rows, part.num_columns)
            value, _, _ = gradients(grad, gate, up, dgate, dup, n, f, mask, ACTIVATION, tl.float32)
            value = joined(value, mask, gate, beside, width, r, c, num_rows)
            store_codes_of(
                part, value, r, c,
                FORMAT, FORMAT_T, LARGEST, LARGEST_T, POW2, POW2_T, BLOCK_R, BLOCK_C, CHUNK,
            )  # fmt: skip


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward."""
    return forward_of([args])[0]


def backward(*args: Any) -> tuple[Tensor, ...]:
    """The op's backward."""
    return backward_of([args])[0]


def forward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Codes, scales and amax_t of each call; no gate is empty or fp64, and names are those of the
    first."""
    rows, columns = calls[0][5:7]
    by_row, by_column = Operand.parse(rows), None if columns is None else Operand.parse(columns)
    matrices = [_matrix(*call[:5]) for call in calls]
    slots = [Slot(line, None, *more) for line, *more in (call[7:] or [None] * 3 for call in calls)]
    amaxes = group.known(slots) or group.measure(amax_kernel, matrices, by_row, by_column)
    amax_t = [launch.amax_for(matrix, by_column) for matrix in matrices]
    pairs = group.cast(cast_kernel, matrices, amaxes, by_row, None, slots, amax_out=amax_t)
    each = zip(pairs, amax_t, matrices, strict=True)
    return [(c.codes, c.scales, launch.present(a, m.like)) for (c, _), a, m in each]


def backward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """dgate, dup, and codes and scales of the transposed copy, of each call."""
    by_column = Operand.parse(calls[0][6])
    matrices, grads, amaxes, slots = [], [], [], []
    for grad, gate, up, beside, activation, packing, _, amax_t, *counters in calls:
        own = gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)
        dgate, dup = halves(own[0], None if up is None else own[1], packing)
        matrix = _matrix(gate, up, beside, activation, packing)
        *given, width, last = matrix.arguments
        arguments = (rows_of(grad), *given, rows_of(dgate), rows_of(dup), width, last)
        matrices.append(matrix._replace(arguments=arguments))
        grads.append(own)
        amaxes.append(launch.Amax.known(by_column, amax_t))
        slots.append(Slot(columns=counters[0] if counters else None))
    pairs = group.cast(backward_kernel, matrices, amaxes, None, by_column, slots)
    return [(*own, c.codes, c.scales) for own, (_, c) in zip(grads, pairs, strict=True)]


def _matrix(
    gate: Tensor, up: Tensor | None, beside: Tensor | None, activation: str, packing: str
) -> launch.Matrix:
    gate, up = halves(gate, up, packing)
    width = 0 if beside is None else beside.shape[-1]
    num_features = gate.shape[-1]
    arguments = (*(rows_of(t) for t in (gate, up, beside)), width, LAST)
    constants = {"ACTIVATION": activation, "num_warps": NUM_WARPS}
    num_tokens = gate.numel() // num_features
    return launch.Matrix(arguments, num_tokens, width + num_features, gate, constants)
