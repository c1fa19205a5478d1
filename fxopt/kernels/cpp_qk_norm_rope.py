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
    num_groups_of,
    rotary_dim,
    rotated_rows,
)

ROTATIONS = {"none": 0, "interleaved": 1, "half": 2}
TABLES = {"channels": 0, "pairs": 1, "matrices": 2}
SECTION = "6q2d4q3q5q5q5q"
FORWARD = Loop("qk_norm_rope", f"{SECTION}4q2q")
BACKWARD = Loop("qk_norm_rope_backward", f"{SECTION}4q2q4q")
NUM_BYTES = 4  # of an element


def applies(a: Arguments, sections: Sequence[Section], *others: Tensor) -> bool:
    """Whether the loops are for these arguments and further tensors."""
    if a.dtype is not torch.float32 or not is_plain(*a.x, *a.x_bias, *a.weight, *a.bias, *others):
        return False
    return a.x[0].numel() > 0 and all(_stays_inside(a, s) for s in sections)


def _stays_inside(a: Arguments, s: Section) -> bool:
    """Whether parameters and tables are of the sizes by which a loop reads them; ATen says what is
    wrong with others."""
    batch, _, num_heads, head_dim = s.x_BSHd.shape
    width, of_norm = num_heads * head_dim, num_heads * head_dim if a.across_heads else head_dim
    for t, size in ((s.x_bias, width), (s.weight, of_norm), (s.bias, of_norm)):
        if t is not None and (t.numel() != size or not t.is_contiguous()):
            return False
    tables = s.tables
    if tables is None or a.rotation == "none":
        return True
    rows = rotated_rows(a, s)
    sizes = num_heads, rows.stop - rows.start, batch
    for t in tables:
        *lead, num_entries = t.shape
        if len(lead) > 3 or num_entries != tables[0].shape[-1]:
            return False
        for n, size in zip(reversed(lead), sizes, strict=False):
            if n not in (1, size):
                return False
    return True


def forward(
    a: Arguments, sections: Sequence[Section], outs: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> None:
    """Write the outputs and the statistics."""
    start = 0
    for s in sections:
        statistics = _behind(mean, start), _behind(rstd, start)
        x, tables = _whole(s.x_BSHd), _tables(a, s)
        FORWARD(*_section(a, s, x, tables), *_heads(outs[s.output], s.rows.start), *statistics)
        start += num_groups_of(a, s.x_BSHd)


def backward(
    a: Arguments,
    sections: Sequence[Section],
    grads: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of all that is differentiable, None where it is not needed."""
    found = [
        t.new_empty(t.shape) if need and t is not None else None
        for t, need in zip(a.differentiable, needs, strict=True)
    ]
    reads_x, start = a.norm != "none" or any(t is not None for t in a.weight), 0
    grads = [_whole(grad) for grad in grads]
    for i, s in enumerate(sections):
        own = found[i :: len(sections)]
        if any(t is not None for t in own):
            x, tables = _whole(s.x_BSHd) if reads_x else None, _tables(a, s)
            statistics = _behind(mean, start), _behind(rstd, start)
            grad = _heads(grads[s.output], s.rows.start)
            BACKWARD(*_section(a, s, x, tables), *grad, *statistics, *map(pointer, own))
        start += num_groups_of(a, s.x_BSHd)
    return found


def _section(
    a: Arguments, s: Section, x: Tensor | None, tables: tuple[Tensor, Tensor] | None
) -> list[float]:
    settings = NORMS[a.norm], a.across_heads, s.eps, a.weight_offset
    parameters = pointer(s.x_bias), pointer(s.weight), pointer(s.bias)
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


def _heads(x_BSHd: Tensor | None, first_row: int = 0) -> tuple[int, ...]:
    if x_BSHd is None:
        return 0, 0, 0, 0
    of_batch, of_token, of_head, _ = x_BSHd.stride()
    return x_BSHd.data_ptr() + NUM_BYTES * first_row * of_token, of_batch, of_token, of_head


def _behind(statistics: Tensor, start: int) -> int:
    """Where those of a section begin; 0 where the norm has none."""
    return statistics.data_ptr() + NUM_BYTES * start if statistics.numel() else 0


def _table(t: Tensor) -> list[int]:
    """Its memory, and its strides in [B, S, H, r]; 0 where one entry serves all."""
    strides = [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return [t.data_ptr(), *[0] * (4 - len(strides)), *strides]
