"""Native provider of `fxopt::qk_norm_rope`: the fewest ATen passes, where no loop applies.

Shape suffixes: B batch, S tokens of a section, H heads, d head dim, G groups that are normed (H, or
1 across heads), N elements of such a group (d, or H*d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import cpp_qk_norm_rope as loops
from fxopt.kernels.qk_norm_rope import outputs
from fxopt.kernels.qk_norm_rope_arguments import (
    Arguments,
    Section,
    grouped,
    math_tables,
    num_groups_of,
    rotated_rows,
    split_backward_arguments,
)
from fxopt.kernels.registration import in_dtype
from fxopt.kernels.rotary import rotate_into, signed, turn_into, turns

aten = torch.ops.aten
RotateInto = Callable[[Tensor, Tensor], None]  # (out, n)


def forward(*args: Any) -> list[Tensor]:
    """`fxopt::qk_norm_rope`: [*outs, mean, rstd]."""
    a = Arguments(*args)
    sections, (outs, mean, rstd) = a.sections, outputs(a)
    if loops.applies(a, sections):
        loops.forward(a, sections, outs, mean, rstd)
        return [*outs, mean, rstd]
    math, rotations = a.math, _rotations(a, is_transposed=False)
    for s, mean_s, rstd_s in _with_statistics(a, sections, mean, rstd):
        v_BSGN, is_own = _normed_values(a, s, math)
        w_N, b_N = _affine(a, s, math)
        if a.norm == "layer":
            n, m, r = aten.native_layer_norm(v_BSGN, v_BSGN.shape[-1:], w_N, b_N, s.eps)
            mean_s.copy_(m)
            rstd_s.copy_(r)
        else:
            n = v_BSGN
            if a.norm == "rms":
                r = torch.linalg.vector_norm(n, dim=-1, keepdim=True, out=rstd_s)
                eps = r.new_full((), s.eps)
                torch.addcmul(eps, r, r, value=1 / n.shape[-1], out=r).rsqrt_()
                n = torch.mul(n, r, out=n if is_own else None)
                is_own = True
            if w_N is not None:
                n = torch.mul(n, w_N, out=n if is_own else None)
            if b_N is not None:
                n = n + b_N
        n = n.view(s.x_BSHd.shape)
        out, rotate_into = _own_rows(outs, s), rotations(s)
        if rotate_into is None:
            out.copy_(n)
        else:
            rotate_into(out, n)
    return [*outs, mean, rstd]


def backward(grads: Sequence[Tensor], *args: Any) -> list[Tensor]:
    """`fxopt::qk_norm_rope_backward`."""
    a, mean, rstd, needs = split_backward_arguments(args)
    sections = a.sections
    if loops.applies(a, sections, *grads):
        found = loops.backward(a, sections, grads, mean, rstd, needs)
    else:
        found = _backward(a, sections, grads, mean, rstd, needs)
    return [a.x[0].new_empty(0) if g is None else g for g in found]


def _backward(
    a: Arguments,
    sections: Sequence[Section],
    grads: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of all that is differentiable, None where it is not needed."""
    math, rotations = a.math, _rotations(a, is_transposed=True)
    found: list[Tensor | None] = [None] * len(needs)
    for i, (s, mean_s, rstd_s) in enumerate(_with_statistics(a, sections, mean, rstd)):
        needs_s = needs[i :: len(a.x)]
        if not any(needs_s):
            continue
        g, rotate_into = in_dtype(_own_rows(grads, s), math), rotations(s)
        if rotate_into is not None:
            rotated, g = g, g.new_empty(g.shape)
            rotate_into(g, rotated)
        else:
            # dx may not alias grad.
            g = g.clone(memory_format=torch.contiguous_format) if a.norm == "none" else g
            g = g.contiguous()
        needs_norm = [needs_s[0] or needs_s[1], *needs_s[2:]]
        found[i :: len(a.x)] = _section_backward(a, s, math, g, mean_s, rstd_s, needs_norm)
    return [
        in_dtype(g, t.dtype) if need and g is not None and t is not None else None
        for g, t, need in zip(found, a.differentiable, needs, strict=True)
    ]


def _own_rows(joined: Sequence[Tensor], s: Section) -> Tensor:
    """What belongs to a section of what is joined."""
    whole = joined[s.output]
    return whole if s.x_BSHd.shape[1] == s.num_all else whole[:, s.rows]


def _section_backward(
    a: Arguments,
    s: Section,
    math: torch.dtype,
    g: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of a section's (x, x_bias, weight, bias), given that of what is rotated."""
    v, is_own = _normed_values(a, s, math)
    g = grouped(g, a.across_heads)
    dv, dw, db = _norm_backward(g, v, is_own, *_affine(a, s, math), mean, rstd, a.norm, needs)
    if dv is None:
        return [None, None, dw, db]
    dx = dv.reshape(s.x_BSHd.shape).contiguous()
    return [dx, None if s.x_bias is None else dx.sum((0, 1)).flatten(), dw, db]


def _norm_backward(
    g: Tensor,
    v: Tensor,
    is_own: bool,
    w: Tensor | None,
    b: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (v, w, b), each [B, S, G, N] or [N], given g = d(norm(v) * w + b)."""
    if norm == "layer":
        return aten.native_layer_norm_backward(g, v, v.shape[-1:], mean, rstd, w, b, needs)
    needs_v, needs_w, needs_b = needs
    db = g.sum((0, 1, 2)) if needs_b else None
    if norm == "none":
        dw = (g * v).sum((0, 1, 2)) if needs_w else None
        return (g if w is None else g * w) if needs_v else None, dw, db
    xhat = torch.mul(v, rstd, out=v if is_own else None)
    product = g * xhat
    dw = product.sum((0, 1, 2)) if needs_w else None
    if not needs_v:
        return None, dw, db
    dot = product.sum(-1, keepdim=True) if w is None else (product @ w).unsqueeze(-1)
    dv = xhat.mul_(dot.div_(-v.shape[-1]))
    dv = dv.add_(g) if w is None else dv.addcmul_(g, w)
    return dv.mul_(rstd), dw, db


def _with_statistics(
    a: Arguments, sections: Sequence[Section], mean: Tensor, rstd: Tensor
) -> Iterator[tuple[Section, Tensor, Tensor]]:
    """Each section with its [B, S, G, 1] part of the statistics that the norm has."""
    start = 0
    for s in sections:
        batch, num_tokens, num_heads, _ = s.x_BSHd.shape
        shape = batch, num_tokens, 1 if a.across_heads else num_heads, 1
        stop = start + num_groups_of(a, s.x_BSHd)
        mean_s = mean[start:stop].view(shape) if a.norm == "layer" else mean
        rstd_s = rstd[start:stop].view(shape) if a.norm != "none" else rstd
        yield s, mean_s, rstd_s
        start = stop


def _normed_values(a: Arguments, s: Section, math: torch.dtype) -> tuple[Tensor, bool]:
    """x + x_bias as [B, S, G, N] in the math dtype, and whether it may be written."""
    v = in_dtype(s.x_BSHd, math)
    is_own = v is not s.x_BSHd
    if s.x_bias is not None:
        x_bias = in_dtype(s.x_bias, math).view(v.shape[2:])
        v, is_own = torch.add(v, x_bias, out=v if is_own else None), True
    return grouped(v, a.across_heads), is_own


def _affine(a: Arguments, s: Section, math: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What the normed values are multiplied by and shifted by, in the math dtype."""
    weight = None if s.weight is None else in_dtype(s.weight, math)
    if weight is not None and a.weight_offset:
        weight = weight + a.weight_offset
    return weight, None if s.bias is None else in_dtype(s.bias, math)


def _rotate_rows_into(out: Tensor, n: Tensor, rotate: RotateInto, rows: slice) -> None:
    for kept in (slice(0, rows.start), slice(rows.stop, None)):
        out[:, kept] = n[:, kept]
    rotate(out[:, rows], n[:, rows])


def _rotations(a: Arguments, is_transposed: bool) -> Callable[[Section], RotateInto | None]:
    """How a section is rotated, or its gradient; made once for queries and keys that are alike."""
    made: dict[tuple[int, ...], RotateInto] = {}

    def rotation(s: Section) -> RotateInto | None:
        if a.rotation == "none" or s.cos is None:
            return None
        key = (id(s.cos), id(s.sin), s.rows.start, s.rows.stop, s.num_all)
        if key not in made:
            tables = *math_tables(a, s), a.rotation, a.tables, is_transposed
            as_complex = turns(*tables)
            if as_complex is not None:
                made[key] = partial(turn_into, turns_BSHr=as_complex)
            else:
                cos, sin = signed(*tables)
                made[key] = partial(rotate_into, cos=cos, sin=sin, rotation=a.rotation)
            if a.rotated != "all":
                made[key] = partial(_rotate_rows_into, rotate=made[key], rows=rotated_rows(a, s))
        return made[key]

    return rotation
