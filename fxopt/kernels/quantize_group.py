"""quantize_rows and quantize_columns: the two copies of several matrices, one now and one later.

Weights of one autograd node, or an activation that is kept as it is: the forward casts the copy
that the products read and leaves the magnitudes for the other, so that the backward casts in one
pass. A launch takes all matrices of the group.

For operands with one scale for a tensor or a row (`quantize.covers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxopt.kernels import quantize
from fxopt.kernels.counters import Slot
from fxopt.kernels.quantized_producers import amax_for, fake_amax
from fxopt.kernels.registration import register
from fxopt.kernels.together import share_lists

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def native_rows(
    xs: list[Tensor],
    rows: str,
    columns: str | None,
    counters: list[Tensor] | None = None,
    known: list[Tensor] | None = None,
    seen: list[Tensor] | None = None,
) -> Lists:
    """Codes, scales and amax_t of each x [..., C].

    Args:
        xs: any strides, one dtype.
        rows: how each is quantized, as `Operand` is written.
        columns: how `quantize_columns` will quantize the transposed; None for never.
        counters: a line for each x, as in `counters`, added to, or None.
        known, seen: of each x, as in `quantize`, or None.

    Returns codes [R, C padded], scales [R or 1, 1] and amax_t (see `amax_for`) of each.
    """
    pairs = [
        quantize.native(x, rows, None, None, False, line, None, *more)[:2]
        for x, line, *more in zip(xs, *(each(xs, t) for t in (counters, known, seen)), strict=True)
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs], [amax_for(x, columns) for x in xs]


def native_columns(
    xs: list[Tensor], columns: str, amax_t: list[Tensor], counters: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """codes_t [C, R padded] and scales_t [C or 1, 1] of each x, by the magnitudes found before."""
    pairs = [
        quantize.native(x, None, columns, None, False, None, line, amax)[3:5]
        for x, line, amax in zip(xs, each(xs, counters), amax_t, strict=True)
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def each(xs: Sequence[Tensor], tensors: list[Tensor] | None) -> Sequence[Tensor | None]:
    """What there is for each x."""
    return tensors or [None] * len(xs)


def _fake_rows(xs: list[Tensor], rows: str, columns: str | None, *_: Any) -> Lists:
    sizes = [(x.numel() // x.shape[-1], x.shape[-1]) for x in xs]
    fakes = [quantize.fake_matrix(x, *s, rows) for x, s in zip(xs, sizes, strict=True)]
    amax_t = [fake_amax(x, x.shape[-1], columns) for x in xs]
    return [f[0] for f in fakes], [f[1] for f in fakes], amax_t


def _fake_columns(
    xs: list[Tensor], columns: str, amax_t: list[Tensor], counters: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    sizes = [(x.shape[-1], x.numel() // x.shape[-1]) for x in xs]
    fakes = [quantize.fake_matrix(x, *s, columns) for x, s in zip(xs, sizes, strict=True)]
    return [f[0] for f in fakes], [f[1] for f in fakes]


def triton_rows(
    xs: list[Tensor],
    rows: str,
    columns: str | None,
    counters: list[Tensor] | None = None,
    known: list[Tensor] | None = None,
    seen: list[Tensor] | None = None,
) -> Lists:
    from fxopt.kernels import triton_quantize_group

    if not all(x.numel() and quantize.can_cast(x) for x in xs):
        return native_rows(xs, rows, columns, counters, known, seen)
    given = zip(*(each(xs, t) for t in (counters, known, seen)), strict=True)
    slots = [Slot(line, None, *more) for line, *more in given]
    return triton_quantize_group.rows(xs, rows, columns, slots)


def triton_columns(
    xs: list[Tensor], columns: str, amax_t: list[Tensor], counters: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    from fxopt.kernels import triton_quantize_group

    if not all(x.numel() and quantize.can_cast(x) for x in xs):
        return native_columns(xs, columns, amax_t, counters)
    return triton_quantize_group.columns(xs, columns, amax_t, each(xs, counters))


def _is_known(args: Sequence[Any]) -> bool:
    return len(args) > 4 and bool(args[4])


quantize_rows = register(
    "quantize_rows(Tensor[] xs, str rows, str? columns) "
    "-> (Tensor[] codes, Tensor[] scales, Tensor[] amax_t)",
    native=native_rows,
    fake=_fake_rows,
    triton=triton_rows,
    launches=lambda *args: 1 if _is_known(args) else 2,
    # For the scale, then for the values.
    rereads=lambda args, _: [] if _is_known(args) else args[0],
    counters="Tensor(a!)[]? counters, Tensor[]? known, Tensor(b!)[]? seen",
)
quantize_columns = register(
    "quantize_columns(Tensor[] xs, str columns, Tensor[] amax_t) "
    "-> (Tensor[] codes_t, Tensor[] scales_t)",
    native=native_columns,
    fake=_fake_columns,
    triton=triton_columns,
    counters="Tensor(a!)[]? counters",
)
share_lists(quantize_rows)
share_lists(quantize_columns)
