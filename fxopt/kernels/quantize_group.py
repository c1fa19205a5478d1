"""quantize_rows and quantize_columns: the two copies of several matrices, one now and one later.

Weights of one autograd node, or an activation that is kept as it is: the forward casts the copy
that the products read and leaves the magnitudes for the other, so that the backward casts in one
pass. A launch takes all matrices of the group.

quantize_mixed: what a backward of linears casts at one time, in the launches of one of them:
gradients by their own magnitudes, and to the transposed copies what the forward left open. Formats
are those of each matrix. What counts or records runs apart.

For operands with one scale for a tensor or a row (`quantize.covers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from fxopt.kernels import quantize
from fxopt.kernels.counters import Slot
from fxopt.kernels.magnitude_parts import reductions_of
from fxopt.kernels.quantize import amax_for, fake_amax
from fxopt.kernels.registration import call_form, register
from fxopt.kernels.together import SHARED, Ask, Call, Shared, mix, parts, share_lists

NUM_RESULTS = 7  # of `quantize`
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


def launches_of_rows(*args: Any) -> int:
    """Where magnitudes are not known, their pass and reductions come first."""
    xs, *formats = args[:3]
    return 1 if _is_known(args) else 2 + sum(reductions_of([x], *formats) for x in xs)


class Matrix(NamedTuple):
    """One of them: its pieces, formats as `Operand` is written or "", and magnitudes or None."""

    pieces: Sequence[Tensor]
    rows: str
    columns: str
    wants_sum: bool
    amax_t: Tensor | None


def _matrices(*args: Any) -> list[Matrix]:
    pieces, num_pieces, *fields = args
    return [Matrix(*m) for m in zip(parts(pieces, num_pieces), *fields, strict=True)]


def _call(m: Matrix) -> tuple[Any, ...]:
    """Arguments of `native_pieces`."""
    lines = None, None, m.amax_t, None
    return m.pieces, m.rows or None, m.columns or None, None, m.wants_sum, *lines


def native_mixed(*args: Any) -> list[Tensor]:
    """What `quantize` returns, of each matrix.

    Args:
        pieces: of all matrices, side by side; of each its num_pieces.
        rows, columns: how each copy is quantized, as `Operand` is written, or "" for none.
        wants_sum: see `quantize`.
        amax_t: fp32, magnitudes that scales are taken from, as in `quantize_columns`; or None.
    """
    return [t for m in _matrices(*args) for t in quantize.native_pieces(*_call(m))]


def _fake_mixed(*args: Any) -> list[Tensor]:
    return [t for m in _matrices(*args) for t in quantize.fake_pieces(*_call(m))]


def triton_mixed(*args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_quantize_group

    if not all(x.numel() and quantize.can_cast(x) for x in args[0]):
        return native_mixed(*args)
    pieces, *_, wants_sum, amax_t = zip(*(matrices := _matrices(*args)), strict=True)
    formats = [quantize.operands(m.rows or None, m.columns or None) for m in matrices]
    slots = [Slot(known=known) for known in amax_t]
    made = triton_quantize_group.quantize(pieces, formats, wants_sum, slots)
    return [t for found in made for t in found]


def _measured(*args: Any) -> list[Tensor]:
    """What is read for its magnitudes first."""
    return [x for m in _matrices(*args) if m.amax_t is None for x in m.pieces]


def _launches_mixed(*args: Any) -> int:
    """Magnitudes that are not known and their reductions, casts, and sums of tiles that the first
    has not made."""
    adds_up = any(m.wants_sum and m.amax_t is not None for m in _matrices(*args))
    measured = [m for m in _matrices(*args) if m.amax_t is None]
    reductions = sum(reductions_of(m.pieces, m.rows, m.columns) for m in measured)
    return 1 + bool(measured) + reductions + adds_up


quantize_rows = register(
    "quantize_rows(Tensor[] xs, str rows, str? columns) "
    "-> (Tensor[] codes, Tensor[] scales, Tensor[] amax_t)",
    native=native_rows,
    fake=_fake_rows,
    triton=triton_rows,
    launches=launches_of_rows,
    # For the scale, then for the values.
    rereads=lambda args, _: [] if _is_known(args) else args[0],
    further="Tensor(a!)[]? counters, Tensor[]? known, Tensor(b!)[]? seen",
)
quantize_columns = register(
    "quantize_columns(Tensor[] xs, str columns, Tensor[] amax_t) "
    "-> (Tensor[] codes_t, Tensor[] scales_t)",
    native=native_columns,
    fake=_fake_columns,
    triton=triton_columns,
    further="Tensor(a!)[]? counters",
)
share_lists(quantize_rows)
share_lists(quantize_columns)
quantize_mixed = register(
    "quantize_mixed(Tensor[] pieces, int[] num_pieces, str[] rows, str[] columns, "
    "bool[] wants_sum, Tensor?[] amax_t) -> Tensor[]",
    native=native_mixed,
    fake=_fake_mixed,
    triton=triton_mixed,
    launches=_launches_mixed,
    rereads=lambda args, _: _measured(*args),
)


def _matrices_of(ask: Ask) -> list[Matrix]:
    if ask.op is quantize_columns:
        xs, columns, amax_t = ask.args
        return [Matrix([x], "", columns, False, a) for x, a in zip(xs, amax_t, strict=True)]
    x, rows, columns, _, wants_sum = ask.args
    pieces = [x] if isinstance(x, Tensor) else x
    slot = Slot(*ask.lines)
    return [Matrix(pieces, rows or "", columns or "", wants_sum, slot.known)]


def _results(ask: Ask, found: Sequence[Sequence[Tensor]]) -> Any:
    """What the ask's own op returns."""
    if ask.op is quantize_columns:
        return [f[3] for f in found], [f[4] for f in found]
    return found[0]


def _mixed(asks: Sequence[Ask]) -> list[Any]:
    each = [_matrices_of(ask) for ask in asks]
    every = [m for own in each for m in own]
    pieces, *fields = map(list, zip(*every, strict=True))
    sizes = [len(p) for p in pieces]
    found = iter(quantize_mixed([x for own in pieces for x in own], sizes, *fields))
    matrices = iter([list(islice(found, NUM_RESULTS)) for _ in every])
    return [_results(a, list(islice(matrices, len(m)))) for a, m in zip(asks, each, strict=True)]


def _apart(asks: Sequence[Ask]) -> list[Any]:
    return [call_form(ask.op, ask.lines, *ask.args) for ask in asks]


SHARED[quantize.quantize_pieces] = Shared(
    _apart, lambda args: () if quantize.fits(args[0][0], *args[1:]) else None
)


def _is_plain(lines: Call) -> bool:
    """Whether nothing is counted or recorded of a call; its magnitude may be known."""
    slot = Slot(*lines)
    return slot.rows is slot.columns is slot.seen is None


_BY_SLOT = quantize.quantize, quantize.quantize_pieces
mix(_BY_SLOT, _mixed, plain=_is_plain)
mix((quantize_columns,), _mixed)
