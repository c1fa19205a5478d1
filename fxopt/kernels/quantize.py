"""quantize: a tensor's rows and columns as operands of low-precision GEMMs, from one read.

Shapes: R rows (all leading dims of x), C features. The row-wise copy is [R, C padded], the
transposed one [C, R padded]; both are contracted over their last dim. e2m1 packs two to a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.counters import UNWATCHED, Slot, raise_to
from fxopt.kernels.formats import (
    FORMATS,
    Quantized,
    num_blocks,
    padded_columns,
    quantize_matrix,
    random_uniform,
)
from fxopt.kernels.magnitude_parts import reductions_of
from fxopt.kernels.registration import register
from fxopt.kernels.together import Ask, Call, alone, answer, register_together, where_it_fits
from fxopt.recipes import Operand

SCALE_DTYPES = {"e8m0": torch.float8_e8m0fnu, "two_level": torch.float8_e4m3fn}
# Draws of the two copies do not repeat each other.
ROWS, COLUMNS = 0, 1
# The first compute capability with units that cast to e4m3.
CAST_CAPABILITY = (8, 9)


class Pair(NamedTuple):
    """The two copies that `quantize` makes and the sum of x; what was not asked for is empty."""

    rows: Quantized
    columns: Quantized
    sum: Tensor


class Cast(NamedTuple):
    """A call of `fxopt::quantize`: a tensor and how its copies are quantized, None for no copy.

    beside: further columns of it.
    """

    x: Tensor
    rows: Operand | None
    columns: Operand | None
    seed: Tensor | None = None
    wants_sum: bool = False
    slot: Slot = UNWATCHED
    beside: Sequence[Tensor] = ()

    def ask(self) -> Ask:
        names = [None if o is None else str(o) for o in (self.rows, self.columns)]
        settings = *names, self.seed, self.wants_sum
        if self.beside:
            return Ask(quantize_pieces, ([self.x, *self.beside], *settings), self.slot)
        return Ask(quantize, (self.x, *settings), self.slot)

    def pair(self) -> Pair:
        """What the call returns."""
        return pair_of(answer([self.ask()])[0])


def pair_of(found: Sequence[Tensor]) -> Pair:
    """The results of such a call by name."""
    return Pair(Quantized(*found[:3]), Quantized(*found[3:6]), found[6])


def covers(operand: Operand | None) -> bool:
    """Whether the Triton kernels quantize like this: one scale for a tensor or for a row."""
    return operand is None or (operand.block in ("tensor", "row") and not operand.stochastic)


def can_cast(x: Tensor) -> bool:
    """Whether Triton compiles casts to FP8 for the device of `x`."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= CAST_CAPABILITY


def amax_for(y: Tensor, columns: str | None) -> Tensor:
    """What scales of the transposed copy come from: fp32 [1] or [K], NaN if not finite; or empty.

    Args:
        y: [..., K].
        columns: the operand of the transposed copy, or None.
    """
    if columns is None:
        return y.new_empty(0, dtype=torch.float32)
    y_MK = y.reshape(-1, y.shape[-1]).float()
    per_column = Operand.parse(columns).block == "row"
    if not y.numel():
        return y_MK.new_zeros(y.shape[-1] if per_column else 1)
    amax = y_MK.abs().amax(0 if per_column else (0, 1)).reshape(-1)
    return amax.masked_fill(~amax.isfinite(), float("nan"))


def fake_amax(x: Tensor, num_features: int, columns: str | None) -> Tensor:
    size = 0
    if columns is not None:
        size = num_features if Operand.parse(columns).block == "row" else 1
    return x.new_empty(size, dtype=torch.float32)


def native(
    x: Tensor,
    rows: str | None,
    columns: str | None,
    seed: Tensor | None,
    wants_sum: bool,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
    known: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """codes = round(x * factor), scale = 1 / factor by block, of x [R, C] and of its transpose.

    Args:
        x: [..., C], floating point, any strides; taken as fp32.
        rows, columns: how the copy and the transposed copy are quantized, as `Operand` is
            written; None for no copy.
        seed: int64, one element, where an operand rounds stochastically.
        wants_sum: also return sum [C], that of x's rows in x's dtype: a bias's gradient, where x
            is that of the output.
        counters, counters_t: lines of the two copies as in `counters`, added to, or None.
        known: fp32 [1], or the magnitude of each block, that scales are taken from; None for x's.
        seen: int32 [1], raised to the bits of x's largest magnitude, or None.

    Numerics: exact emulation: codes and scales are those of the hardware's formats, rounded once
    from fp32. A block of zeros has scale 1; one that holds a NaN or Inf becomes NaN. By a `known`
    magnitude what is larger saturates, and NaN and Inf become NaN by themselves.
    """
    raise_to(seen, x)
    x_RC = x.reshape(-1, x.shape[-1])
    empty = x.new_empty(0, dtype=torch.float32)
    found: list[Tensor] = []
    for matrix, name, stream, line in (
        (x_RC, rows, ROWS, counters),
        (x_RC.t(), columns, COLUMNS, counters_t),
    ):
        if name is None:
            found += [empty.clone() for _ in range(3)]
            continue
        operand, uniform = Operand.parse(name), None
        if operand.stochastic:
            assert seed is not None, "stochastic rounding takes a seed"
            shape = torch.Size((matrix.shape[0], padded_columns(operand, matrix.shape[1])))
            uniform = random_uniform(seed, shape, stream)
        quantized = quantize_matrix(matrix, operand, uniform, line, known)
        found += [t.contiguous() for t in quantized]
    found.append(x_RC.sum(0) if wants_sum else x.new_empty(0))
    return tuple(found)


def triton_together(calls: Sequence[Call]) -> Sequence[Sequence[Tensor]]:
    """The op on the arguments of each call, in one launch; operands are those of the first."""
    from fxopt.kernels import triton_quantize_group

    def is_cast(x: Tensor, *args: Any) -> bool:
        return x.numel() > 0 and can_cast(x) and fits(x, *args)

    def cast(calls: Sequence[Call]) -> Sequence[Sequence[Tensor]]:
        xs, rows, columns, _, wants_sum, *lines = zip(*calls, strict=True)
        slots = [Slot(*line) for line in zip(*lines, strict=True)] or [UNWATCHED] * len(xs)
        formats = [operands(rows[0], columns[0])] * len(xs)
        return triton_quantize_group.quantize([[x] for x in xs], formats, wants_sum, slots)

    return where_it_fits(calls, is_cast, cast, native)


triton = alone(triton_together)


def native_pieces(xs: Sequence[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """The same of [x_0 | x_1 | ...], of as many rows each and one dtype."""
    return native(_joined(xs), *args)


def triton_pieces(
    xs: Sequence[Tensor],
    rows: str | None,
    columns: str | None,
    seed: Tensor | None,
    wants_sum: bool,
    *line: Tensor | None,
) -> tuple[Tensor, ...]:
    from fxopt.kernels import triton_quantize_group

    if not all(x.numel() and can_cast(x) for x in xs) or not fits(xs[0], rows, columns):
        return native_pieces(xs, rows, columns, seed, wants_sum, *line)
    formats, slots = [operands(rows, columns)], [Slot(*line) if line else UNWATCHED]
    return triton_quantize_group.quantize([xs], formats, [wants_sum], slots)[0]


def fake_pieces(xs: Sequence[Tensor], *args: Any) -> tuple[Tensor, ...]:
    return fake(_joined(xs), *args)


def _joined(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(xs), -1)


def fits(x: Tensor, rows: str | None, columns: str | None, *_: Any) -> bool:
    """Whether the Triton kernels cast like this."""
    return all(map(covers, operands(rows, columns)))


def operands(rows: str | None, columns: str | None) -> tuple[Operand | None, Operand | None]:
    by_row, by_column = (None if n is None else Operand.parse(n) for n in (rows, columns))
    return by_row, by_column


def fake(
    x: Tensor,
    rows: str | None,
    columns: str | None,
    seed: Tensor | None,
    wants_sum: bool,
    counters: Tensor | None = None,
    counters_t: Tensor | None = None,
    known: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, ...]:
    num_features = x.shape[-1]
    num_rows = x.numel() // num_features
    found: list[Tensor] = []
    for size, name in (((num_rows, num_features), rows), ((num_features, num_rows), columns)):
        found += fake_matrix(x, *size, name)
    found.append(x.new_empty(num_features if wants_sum else 0))
    return tuple(found)


def fake_matrix(x: Tensor, num_rows: int, num_columns: int, name: str | None) -> list[Tensor]:
    """Codes, scales and tensor scale of a matrix of this size, without values."""
    if name is None:
        return [x.new_empty(0, dtype=torch.float32) for _ in range(3)]
    operand = Operand.parse(name)
    width = padded_columns(operand, num_columns)
    packed = width // 2 if operand.format == "e2m1" else width
    two_levels = (1, 1) if operand.scale == "two_level" else (0,)
    return [
        x.new_empty((num_rows, packed), dtype=FORMATS[operand.format].dtype),
        x.new_empty(
            num_blocks(operand.block, num_rows, width),
            dtype=SCALE_DTYPES.get(operand.scale, torch.float32),
        ),
        x.new_empty(two_levels, dtype=torch.float32),
    ]


def _is_known(args: Sequence[Any]) -> bool:
    """Whether scales are known beforehand, so that one pass does."""
    return len(args) > 7 and args[7] is not None


def _launches(*args: Any) -> int:
    """Without scales their pass comes first; with them, sums of the tiles' sums come last."""
    return _launches_together([args])


def _launches_together(calls: Sequence[Call]) -> int:
    """As the call that launches most, and all reductions of magnitudes."""
    measured = [call for call in calls if not _is_known(call)]
    num_passes = 2 if measured or any(call[4] for call in calls) else 1
    pieces = [[c[0]] if isinstance(c[0], Tensor) else c[0] for c in measured]
    each = zip(pieces, measured, strict=True)
    return num_passes + sum(reductions_of(own, *call[1:3]) for own, call in each)


LINES = "Tensor(a!)? counters, Tensor(b!)? counters_t, Tensor? known, Tensor(c!)? seen"
quantize = register(
    "quantize(Tensor x, str? rows, str? columns, Tensor? seed, bool wants_sum) "
    "-> (Tensor codes, Tensor scales, Tensor tensor_scale, "
    "Tensor codes_t, Tensor scales_t, Tensor tensor_scale_t, Tensor sum)",
    native=native,
    fake=fake,
    triton=triton,
    launches=_launches,
    # For the scale, then for the values.
    rereads=lambda args, _: [] if _is_known(args) else args[:1],
    further=LINES,
)
# The copies of one matrix that lies in pieces, as the gradient of an output does that is split.
quantize_pieces = register(
    "quantize_pieces(Tensor[] xs, str? rows, str? columns, Tensor? seed, bool wants_sum) "
    "-> (Tensor codes, Tensor scales, Tensor tensor_scale, "
    "Tensor codes_t, Tensor scales_t, Tensor tensor_scale_t, Tensor sum)",
    native=native_pieces,
    fake=fake_pieces,
    triton=triton_pieces,
    launches=_launches,
    rereads=lambda args, _: [] if _is_known(args) else args[0],
    further=LINES,
)
quantize_together = register_together(
    quantize,
    triton_together,
    launches=_launches_together,
    kind=lambda *args: () if fits(*args) else None,
)
