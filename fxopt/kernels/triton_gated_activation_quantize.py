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

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_quantize as launch
from fxopt.kernels import triton_quantize_group as group
from fxopt.kernels.counters import UNWATCHED, Slot
from fxopt.kernels.native_gated_activation import halves, packs_apart
from fxopt.kernels.quantize import operands
from fxopt.kernels.saving import fill
from fxopt.kernels.triton_gated_activation import rows_of
from fxopt.kernels.triton_gated_activation_kernels import (
    PACKED,
    PackedRows,
    Rows,
    gradients,
    load,
    value_and_gradient,
)
from fxopt.kernels.triton_quantize_group import has_tile, store_amax_of, store_codes_of
from fxopt.kernels.triton_quantize_kernels import (
    code_of,
    factor_of,
    load_pieces,
    load_tile,
    magnitude,
    raise_to,
    scale_of,
    tile_indices,
)
from fxopt.kernels.triton_saving import FORMAT, LARGEST
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
def joined(value, mask, like, beside, width, r, c, num_rows):
    """fp32 tile of [beside | value], the value rounded to the dtype of `like`; zero outside."""
    value = tl.where(mask, value.to(like.pointer.dtype.element_ty).to(tl.float32), 0.0)
    if beside is not None:
        stride_N, stride_F = beside.stride_N, beside.stride_F
        other = load_tile(beside.pointer, stride_N, stride_F, r, c, num_rows, width)
        value = tl.where((c < width)[None, :], other, value)
    return value


@triton.jit
def activation_tile(
    gate, up, beside, width, gate_codes, up_codes, r, c, num_rows, num_columns,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """fp32 tile of [beside | act(gate) * up], rounded as it would be stored; zero outside.

    gate, up and beside are `Rows` or None; beside has `width` columns. Leaves codes where there is
    room for them, in the pass that reads gate and up.
    """
    n, f, mask = features(r, c, width, num_rows, num_columns)
    x = load(gate, n, f, mask, tl.float32)
    pack_tile(x, gate_codes, r, c, n, f, width, num_rows, mask)
    value, _ = value_and_gradient(x, x, ACTIVATION)  # the gradient is dead code here
    if up is not None:
        factor = load(up, n, f, mask, tl.float32)
        pack_tile(factor, up_codes, r, c, n, f, width, num_rows, mask)
        value *= factor
    return joined(value, mask, gate, beside, width, r, c, num_rows)


@triton.jit
def tile_of(
    part, r, c, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Tile of a part made of (pieces, gate, up, beside, width, and where codes of gate and up are
    left): of `load_pieces`, or if there are none of [beside | activation]."""
    pieces, gate, up, beside, width, gate_codes, up_codes, _ = part.tile
    num_rows, num_columns = size(part.num_rows), part.num_columns
    if pieces is not None:
        return load_pieces(pieces, r, c, num_rows, BLOCK_R, BLOCK_C)
    else:
        return activation_tile(
            gate, up, beside, width, gate_codes, up_codes, r, c, num_rows, num_columns, ACTIVATION
        )


@triton.jit
def pack_tile(value, to, r, c, n, f, width, num_rows, mask):
    """Leave codes and scales of a tile of Rows as `fxopt::pack` makes them, at `to`, `PackedRows`
    or None; the tile's columns are one block."""
    if to is not None:
        tl.static_assert(c.shape[0] == PACKED)
        first = tl.program_id(1) * PACKED - width
        if first >= 0:
            factor = factor_of(tl.max(magnitude(value), 1), LARGEST, False)
            code = code_of(value * factor[:, None], LARGEST, FORMAT)
            tl.store(to.pointer + n * to.stride_N + f * to.stride_F, code, mask)
            block = (to.start + first) // PACKED
            place = to.scales + r * to.scales_stride_N + block
            tl.store(place, scale_of(factor), r < num_rows)


@triton.jit
def raise_to_rounded(seen, rows, value, mask):
    """Raise `seen`, if it is not None, to the magnitude of a tile as it is stored in Rows."""
    if seen is not None:
        rounded = tl.where(mask, value.to(rows.pointer.dtype.element_ty).to(tl.float32), 0.0)
        raise_to(seen, tl.max(tl.max(magnitude(rounded), 1), 0))


@triton.jit
def amax_kernel(
    parts, NUM_PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_amax` of each part, as `tile_of` makes it."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            value = tile_of(part, r, c, ACTIVATION, BLOCK_R, BLOCK_C)
            store_amax_of(part, value, r, c)


@triton.jit
def cast_kernel(
    parts, NUM_PARTS: tl.constexpr, FORMATS: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`store_codes` of each part, as `tile_of` makes it."""
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            value = tile_of(part, r, c, ACTIVATION, BLOCK_R, BLOCK_C)
            store_codes_of(part, value, r, c, *FORMATS[k], BLOCK_R, BLOCK_C, CHUNK)


@triton.jit
def backward_kernel(
    parts, NUM_PARTS: tl.constexpr, FORMATS: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dgate = grad * up * act'(gate), dup = grad * act(gate), `store_codes` of [beside | act * up].

    A part is made of (grad, gate, up, beside, dgate, dup, gate_seen, up_seen, width): matrices are
    `Rows` or None; all but beside belong to the activation. What is seen is raised to the
    magnitudes of dgate and dup, if it is not None.
    """
    for k in tl.static_range(NUM_PARTS):
        part = parts[k]
        if has_tile(part, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            grad, gate, up, beside, dgate, dup, gate_seen, up_seen, width, _ = part.tile
            num_rows = size(part.num_rows)
            n, f, mask = features(r, c, width, num_rows, part.num_columns)
            value, dx, du = gradients(
                grad, gate, up, dgate, dup, n, f, mask, ACTIVATION, tl.float32
            )
            raise_to_rounded(gate_seen, dgate, dx, mask)
            raise_to_rounded(up_seen, dup, du, mask)
            value = joined(value, mask, dgate, beside, width, r, c, num_rows)
            store_codes_of(part, value, r, c, *FORMATS[k], BLOCK_R, BLOCK_C, CHUNK)


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward."""
    return forward_of([args])[0]


def backward(*args: Any) -> tuple[Tensor, ...]:
    """The op's backward."""
    return backward_of([args])[0]


def forward_of(
    calls: Sequence[tuple[Any, ...]],
    weights: Sequence[Tensor] = (),
    weight_formats: Sequence[str | None] = (None, None),
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Codes, scales and amax_t of each call, then of each weight; no gate and no weight is empty or
    fp64, and names are those of the first call. With weights no magnitude is known."""
    # With as many as for an activation alone, weights spilled on sm_89; with fewer, codes of gate
    # and up do on sm_100.
    is_packing = any(room is not None for call in calls for room in call[10:])
    num_warps = launch.NUM_WARPS if weights and not is_packing else NUM_WARPS
    constants = {"ACTIVATION": calls[0][3], "num_warps": num_warps}
    of_weights = [_plain(weight, constants) for weight in weights]
    matrices = [_whole(call[:5], constants) for call in calls] + of_weights
    formats = [operands(*calls[0][5:7])] * len(calls) + [operands(*weight_formats)] * len(weights)
    lines = [call[7:10] or [None] * 3 for call in calls]
    slots = [Slot(line, None, *more) for line, *more in lines]
    slots += [UNWATCHED] * len(weights)
    amaxes = group.known(slots) or group.measure(amax_kernel, matrices, formats)
    each = zip(matrices, formats, strict=True)
    amax_t = [launch.amax_for(matrix, by_column) for matrix, (_, by_column) in each]
    of_rows = [(by_row, None) for by_row, _ in formats]
    matrices = [_whole(call[:5], constants, call[10:]) for call in calls] + of_weights
    pairs = group.cast(cast_kernel, matrices, amaxes, of_rows, slots, amax_out=amax_t)
    found = zip(pairs, amax_t, matrices, strict=True)
    return [(c.codes, c.scales, launch.present(a, m.like)) for (c, _), a, m in found]


def _whole(
    inputs: tuple[Any, ...], constants: dict[str, Any], rooms: Sequence[Any] = ()
) -> launch.Matrix:
    """[beside | activation], as `tile_of` takes it."""
    matrix, (gate, up, beside, _, packing) = _matrix(*inputs), inputs
    *rows, width, last = matrix.arguments
    codes: list[PackedRows | None] = [None, None]
    if packs_apart(gate, up, beside, packing, rooms):
        fill((gate, up), rooms)
    elif any(room is not None for room in rooms):
        of_gate, of_up = rooms[:2], rooms[2:] if up is not None else rooms[:2]
        lie_in = zip(halves(rooms[0], rooms[2], packing), (of_gate, of_up), strict=True)
        codes = [_packed(rows_of(t), own[0], own[1], gate) for t, own in lie_in]
    arguments = None, *rows, width, *codes, last
    return matrix._replace(arguments=arguments, constants=constants)


def _plain(x: Tensor, constants: dict[str, Any]) -> launch.Matrix:
    """A tensor as it is, beside such a matrix."""
    matrix = launch.of_tensors(x)
    arguments = tuple(matrix.arguments), None, None, None, None, None, None, LAST
    return matrix._replace(arguments=arguments, constants=constants)


def backward_of(
    calls: Sequence[tuple[Any, ...]], packed: Sequence[Sequence[Tensor | None]] = ()
) -> list[tuple[Tensor, ...]]:
    """dgate, dup, and codes and scales of the transposed copy, of each call.

    packed: scales of gate and up of each, if these are codes.
    """
    by_column = Operand.parse(calls[0][6])
    matrices, grads, amaxes, slots = [], [], [], []
    for call, scales in zip(calls, packed or [()] * len(calls), strict=True):
        grad, gate, up, beside, activation, packing, _, amax_t, *further = call
        counters, gate_seen, up_seen = (*further, None, None, None)[:3]
        # Halves of one tensor have one magnitude.
        up_seen = gate_seen if up is None and packing != "none" else up_seen
        own = grad.new_empty(gate.shape), grad.new_empty(0 if up is None else up.shape)
        dgate, dup = halves(own[0], None if up is None else own[1], packing)
        matrix = _matrix(gate, up, beside, activation, packing)
        *inputs, beside_rows, width, last = matrix.arguments
        if scales:
            lie_in = [(gate, scales[0])] * 2 if up is None else zip((gate, up), scales, strict=True)
            inputs = [_packed(r, *own, dgate) for r, own in zip(inputs, lie_in, strict=True)]
        outputs = rows_of(dgate), rows_of(dup)
        written = *outputs, gate_seen, up_seen
        arguments = (rows_of(grad), *inputs, beside_rows, *written, width, last)
        matrices.append(matrix._replace(arguments=arguments, like=grad))
        grads.append(own)
        amaxes.append(launch.Amax.known(by_column, amax_t))
        slots.append(Slot(columns=counters))
    formats = [(None, by_column)] * len(matrices)
    pairs = group.cast(backward_kernel, matrices, amaxes, formats, slots)
    return [(*own, c.codes, c.scales) for own, (_, c) in zip(grads, pairs, strict=True)]


def _packed(
    rows: Rows | None, codes: Tensor | None, scales: Tensor | None, like: Tensor
) -> PackedRows | None:
    """Rows that lie in `codes`, as codes of values of `like`'s dtype."""
    if rows is None or codes is None or scales is None:
        return None
    start = rows.pointer.storage_offset() - codes.storage_offset()
    scales_Nc = scales.reshape(-1, scales.shape[-1])
    of_codes = rows._replace(pointer=rows.pointer.view(torch.uint8))
    return PackedRows(*of_codes, scales_Nc, scales_Nc.stride(0), start, like)


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
