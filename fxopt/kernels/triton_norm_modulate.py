"""Triton provider of `fxopt::norm_modulate` and its backward: one pass over the rows each.

Shapes: G groups of R rows share their per-group operands; D features, padded to BLOCK_D; P programs
per group in the backward. Every program of the backward owns rows of one group and writes one row
of partial sums; a second reduction adds the P rows, in fixed order, so no atomics are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import norm_modulate as op

# Programs of the backward per multiprocessor: enough to hide latency, few enough that the partial
# sums stay small beside one activation.
PROGRAMS_PER_SM = 4


@triton.jit
def _load(ptr, offset, cols, mask):
    return tl.load(ptr + offset + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _map(n, weight, bias, scale, shift, weight_offset, scale_offset, cols, mask):
    """Affine, then modulation, of the normalized row `n`; pointers are None or point to a row."""
    if weight is not None:
        n = n * (weight_offset + _load(weight, 0, cols, mask))
    if bias is not None:
        n = n + _load(bias, 0, cols, mask)
    y = n
    if scale is not None:
        y = y * (scale_offset + _load(scale, 0, cols, mask))
    if shift is not None:
        y = y + _load(shift, 0, cols, mask)
    return n, y
