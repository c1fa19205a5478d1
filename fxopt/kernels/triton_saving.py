"""Triton provider of `fxopt::pack` and `fxopt::unpack`: one pass each.

A program owns BLOCK_R rows of one block of 128 features, so it knows its scales.
"""

# Kernel parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels.formats import FORMATS
from fxopt.kernels.triton_quantize_kernels import (
    code_of,
    factor_of,
    load_tile,
    magnitude,
    scale_of,
    tile_indices,
)

BLOCK_R, BLOCK_C = 32, 128  # 4 warps read 16 bytes of bf16 a thread, 4 times
LARGEST = tl.constexpr(FORMATS["e4m3"].largest)
FORMAT = tl.constexpr(tl.float8e4nv)


@triton.jit(do_not_specialize=["num_rows"])
def pack_kernel(
    x, stride_R, stride_C, num_rows, num_columns, codes, scales,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c = tile_indices(BLOCK_R, BLOCK_C)
    value = load_tile(x, stride_R, stride_C, r, c, num_rows, num_columns)
    factor = factor_of(tl.max(magnitude(value), 1), LARGEST, False)
    code = code_of(value * factor[:, None], LARGEST, FORMAT)
    mask = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    tl.store(codes + r[:, None] * num_columns + c[None, :], code, mask)
    tl.store(scales + r * tl.num_programs(1) + tl.program_id(1), scale_of(factor), r < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def unpack_kernel(
    codes, scales, num_rows, num_columns, x, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    r, c = tile_indices(BLOCK_R, BLOCK_C)
    offsets = r[:, None] * num_columns + c[None, :]
    mask = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    code = tl.load(codes + offsets, mask, other=0)
    of_block = r * tl.num_programs(1) + tl.program_id(1)
    scale = tl.load(scales + of_block, r < num_rows, other=0.0)
    value = code.to(FORMAT, bitcast=True).to(tl.float32) * scale[:, None]
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask)


def can_cast(device: torch.device) -> bool:
    """Whether Triton compiles casts to e4m3 there; interpreted it does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def pack(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Fill codes and scales of `rows` [..., C]."""
    x_RC = rows.reshape(-1, rows.shape[-1])
    num_rows, num_columns = x_RC.shape
    arguments = x_RC, *x_RC.stride(), num_rows, num_columns, codes.view(torch.uint8), scales
    with torch.cuda.device_of(codes):
        pack_kernel[_grid(num_rows, num_columns)](*arguments, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C)


def unpack(codes: Tensor, scales: Tensor, x: Tensor) -> None:
    """Fill x of codes' shape."""
    num_columns = codes.flatten(scales.dim() - 1).shape[-1]
    num_rows = codes.numel() // num_columns
    arguments = codes.view(torch.uint8), scales, num_rows, num_columns, x
    with torch.cuda.device_of(codes):
        unpack_kernel[_grid(num_rows, num_columns)](*arguments, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C)


def _grid(num_rows: int, num_columns: int) -> tuple[int, int]:
    return triton.cdiv(num_rows, BLOCK_R), triton.cdiv(num_columns, BLOCK_C)
