"""Triton provider of `fxopt::pack` and `fxopt::unpack`: one pass each, one launch for all tensors.

A program owns BLOCK_R rows of one block of 128 features, so it knows its scales. The third index of
the grid says of which tensor; programs beyond its rows do nothing.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.formats import FORMATS
from fxopt.kernels.triton_quantize_group import has_tile
from fxopt.kernels.triton_quantize_kernels import (
    code_of,
    factor_of,
    load_tile,
    magnitude,
    scale_of,
    tile_indices,
)
from fxopt.kernels.triton_sizes import size, unspecialized

BLOCKS = 32, 128  # 4 warps read 16 bytes of bf16 a thread, 4 times
LARGEST = tl.constexpr(FORMATS["e4m3"].largest)
FORMAT = tl.constexpr(tl.float8e4nv)


class Packed(NamedTuple):
    """A matrix [R, C], its codes [R, C] and scales [R, c]; number of rows `unspecialized`."""

    x: Any
    stride_R: Any
    stride_C: Any
    codes: Any
    scales: Any
    num_rows: Any
    num_columns: Any


@triton.jit
def offsets_of(m, r, c, BLOCK_C: tl.constexpr):
    """Where the tile's codes and scales lie."""
    of_block = r * tl.cdiv(m.num_columns, BLOCK_C) + tl.program_id(1)
    return r[:, None] * m.num_columns + c[None, :], of_block


@triton.jit
def pack_kernel(matrices, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    for k in tl.static_range(len(matrices)):
        m = matrices[k]
        if has_tile(m, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            num_rows = size(m.num_rows)
            value = load_tile(m.x, m.stride_R, m.stride_C, r, c, num_rows, m.num_columns)
            factor = factor_of(tl.max(magnitude(value), 1), LARGEST, False)
            code = code_of(value * factor[:, None], LARGEST, FORMAT)
            mask = (r < num_rows)[:, None] & (c < m.num_columns)[None, :]
            offsets, of_block = offsets_of(m, r, c, BLOCK_C)
            tl.store(m.codes + offsets, code, mask)
            tl.store(m.scales + of_block, scale_of(factor), r < num_rows)


@triton.jit
def unpack_kernel(matrices, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """x is contiguous."""
    for k in tl.static_range(len(matrices)):
        m = matrices[k]
        if has_tile(m, k, BLOCK_R, BLOCK_C):
            r, c = tile_indices(BLOCK_R, BLOCK_C)
            num_rows = size(m.num_rows)
            mask = (r < num_rows)[:, None] & (c < m.num_columns)[None, :]
            offsets, of_block = offsets_of(m, r, c, BLOCK_C)
            code = tl.load(m.codes + offsets, mask, other=0)
            scale = tl.load(m.scales + of_block, r < num_rows, other=0.0)
            value = code.to(FORMAT, bitcast=True).to(tl.float32) * scale[:, None]
            tl.store(m.x + offsets, value.to(m.x.dtype.element_ty), mask)


def pack(rows: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Fill codes and scales of all `rows` [..., C]."""
    _launch(pack_kernel, [x.reshape(-1, x.shape[-1]) for x in rows], codes, scales)


def unpack(codes: Sequence[Tensor], scales: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    """Fill xs of codes' shapes, contiguous."""
    rows = [x.flatten(s.dim() - 1) for x, s in zip(xs, scales, strict=True)]
    _launch(unpack_kernel, [x.view(-1, x.shape[-1]) for x in rows], codes, scales)


def _launch(
    kernel: Any, xs_RC: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> None:
    present = [each for each in zip(xs_RC, codes, scales, strict=True) if each[0].numel()]
    matrices = tuple(
        Packed(
            x, x.stride(0), x.stride(1), c.view(torch.uint8), s, unspecialized(len(x)), x.shape[1]
        )
        for x, c, s in present
    )
    if matrices:
        largest = (max(sizes) for sizes in zip(*(x.shape for x, _, _ in present), strict=True))
        tiles = (triton.cdiv(n, block) for n, block in zip(largest, BLOCKS, strict=True))
        with torch.cuda.device_of(present[0][0]):
            kernel[(*tiles, len(matrices))](matrices, *BLOCKS)
