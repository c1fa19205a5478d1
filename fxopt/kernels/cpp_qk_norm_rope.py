"""Loops of `fxopt::qk_norm_rope` for a CPU: where they apply, and their arguments.

Shape suffixes: B batch, S tokens of a section, H heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels.cpp import Loop, is_plain, pointer
from fxopt.kernels.cpp_norm_modulate import NORMS
from fxopt.kernels.qk_norm_rope_arguments import (
    Arguments,
    Section,
    math_tables,
    rotary_dim,
    rotated_rows,
)

ROTATIONS = {"none": 0, "interleaved": 1, "half": 2}
TABLES = {"channels": 0, "pairs": 1, "matrices": 2}
SECTION = "6q2d4q3q5q5q5q"
FORWARD = Loop("qk_norm_rope", f"{SECTION}4q2q")
BACKWARD = Loop("qk_norm_rope_backward", f"{SECTION}4q2q4q")


def applies(a: Arguments, *others: Tensor) -> bool:
    """Whether the loops are for these arguments and further tensors."""
    if a.dtype is not torch.float32 or not is_plain(*a.x, *a.x_bias, *a.weight, *a.bias, *others):
        return False
    return a.x[0].numel() > 0 and all(_stays_inside(a, s) for s in a.sections)


def _stays_inside(a: Arguments, s: Section) -> bool:
    """Whether parameters and tables are of the sizes by which a loop reads them; ATen says what is
    wrong with others."""
    batch, _, num_heads, head_dim = s.x_BSHd.shape
    width, of_norm = num_heads * head_dim, num_heads * head_dim if a.across_heads else head_dim
    for t, size in ((s.x_bias, width), (s.weight, of_norm), (s.bias, of_norm)):
        if t is not None and (t.numel() != size or not t.is_contiguous()):
            return False
    if s.tables is None or a.rotation == "none":
        return True
    rows = rotated_rows(a, s)
    sizes = batch, rows.stop - rows.start, num_heads
    return all(
        len(t.shape) <= 4
        and t.shape[-1] == s.tables[0].shape[-1]
        and all(n in (1, size) for n, size in zip(t.shape[-2::-1], sizes[::-1], strict=False))
        for t in s.tables
    )


def forward(a: Arguments, s: Section, out: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Write the section's own rows of an output, and its statistics."""
    x = _whole(s.x_BSHd)
    tables = _tables(a, s)
    FORWARD(*_section(a, s, x, tables), *_heads(out), pointer(mean), pointer(rstd))


def backward(
    a: Arguments,
    s: Section,
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the section's x, x_bias, weight and bias, given that of its own rows."""
    reads_x = a.norm != "none" or s.weight is not None
    x, grad = _whole(s.x_BSHd) if reads_x else None, _whole(grad)
    tables = _tables(a, s)
    inputs = s.x_BSHd, s.x_bias, s.weight, s.bias
    grads = [
        s.x_BSHd.new_empty(t.shape) if need and t is not None else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    written = [pointer(g) for g in grads]
    statistics = pointer(mean), pointer(rstd)
    BACKWARD(*_section(a, s, x, tables), *_heads(grad), *statistics, *written)
    return grads


def _section(
    a: Arguments, s: Section, x: Tensor | None, tables: tuple[Tensor, Tensor] | None
) -> list[float]:
    settings = NORMS[a.norm], a.across_heads, s.eps, a.weight_offset
    parameters = [pointer(t) for t in (s.x_bias, s.weight, s.bias)]
    found = [*s.x_BSHd.shape, *settings, *_heads(x), *parameters]
    if tables is None:
        return [*found, *[0] * 15]
    rows = rotated_rows(a, s)
    rotation = ROTATIONS[a.rotation], TABLES[a.tables], rotary_dim(a, s), rows.start, rows.stop
    return [*found, *rotation, *_table(tables[0]), *_table(tables[1])]


def _tables(a: Arguments, s: Section) -> tuple[Tensor, Tensor] | None:
    return math_tables(a, s) if rotary_dim(a, s) else None


def _whole(x_BSHd: Tensor) -> Tensor:
    """`x`, or a copy if its channels do not lie one behind the other."""
    return x_BSHd if x_BSHd.stride(3) == 1 else x_BSHd.contiguous()


def _heads(x_BSHd: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x_BSHd is None else (x_BSHd.data_ptr(), *x_BSHd.stride()[:3])


def _table(t: Tensor) -> list[int]:
    """Its memory, and its strides in [B, S, H, r]; 0 where one entry serves all."""
    strides = [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return [t.data_ptr(), *[0] * (4 - len(strides)), *strides]
