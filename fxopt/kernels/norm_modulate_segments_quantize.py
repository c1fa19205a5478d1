"""norm_modulate_segments whose result is FP8 codes, as `quantized_producers` are.

Shapes: B all dims before the tokens, S tokens, N rows of a table, K features, M = B * S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload

from fxopt.kernels import quantize
from fxopt.kernels import quantized_producers as plain
from fxopt.kernels.norm_modulate import norm_modulate, norm_modulate_backward
from fxopt.kernels.norm_modulate_segments import (
    norm_modulate_segments,
    norm_modulate_segments_backward,
    per_token,
)
from fxopt.kernels.registration import CAPABILITIES, opmath_of, register
from fxopt.kernels.together import Call, alone, register_together, share_with, where_it_fits

ARGUMENTS = plain.NORM_ARGUMENTS.replace(
    "str norm", "Tensor? index, bool shift_per_token, str norm"
)


def native(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As `native_norm`, with tables, `index` and `shift_per_token` of `norm_modulate_segments`."""
    residual, gate, weight, bias, scale, shift, x_bias, index, shift_per_token = args[:9]
    if index is not None:
        gate, scale, shift = per_token(gate, scale, shift, index, shift_per_token, x.dim())
    operands = x, residual, gate, weight, bias, scale, shift, x_bias
    return plain.native_norm(*operands, *args[9:])


def native_columns(h: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """As `native_norm_columns`, with `index` and `shift_per_token` behind the shift."""
    weight, bias, scale, shift, index, shift_per_token = args[:6]
    if index is not None:
        _, scale, shift = per_token(None, scale, shift, index, shift_per_token, h.dim())
    return plain.native_norm_columns(h, weight, bias, scale, shift, *args[6:])


def triton_norms(calls: Sequence[Call]) -> Sequence[Call]:
    from fxopt.kernels import triton_norm_modulate_quantize as kernels

    def has_rows(x: Tensor, *args: Any) -> bool:
        return plain.fits(x, opmath_of(x, *args[13:15]))

    def forward_of(calls: Sequence[Call]) -> Sequence[Call]:
        return kernels.forward_of(*_parted(calls, 8))

    return where_it_fits(calls, has_rows, forward_of, native)


def triton_columns_of_norms(calls: Sequence[Call]) -> Sequence[Call]:
    from fxopt.kernels import triton_norm_modulate_quantize as kernels

    def has_rows(h: Tensor, *args: Any) -> bool:
        return plain.fits(h, args[7].dtype)

    def columns_of(calls: Sequence[Call]) -> Sequence[Call]:
        return kernels.columns_of(*_parted(calls, 5))

    return where_it_fits(calls, has_rows, columns_of, native_columns)


triton, triton_columns = alone(triton_norms), alone(triton_columns_of_norms)


def _parted(calls: Sequence[Call], at: int) -> tuple[list[Call], list[Any]]:
    """The arguments of the plain op, and of each call the two at `at`: how tables are read."""
    plain_calls = [_plain(call, at) for call in calls]
    return plain_calls, [None if call[at] is None else call[at : at + 2] for call in calls]


def _plain(args: Sequence[Any], at: int) -> Call:
    return *args[:at], *args[at + 2 :]


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return plain.fake_norm(*_plain(args, 8))


def _fake_columns(*args: Any) -> tuple[Tensor, Tensor]:
    return plain.fake_norm_columns(*_plain(args, 5))


norm_modulate_segments_quantize = register(
    f"norm_modulate_segments_quantize({ARGUMENTS}, str rows, str? columns) -> "
    "(Tensor codes, Tensor scales, Tensor amax_t, Tensor h, Tensor mean, Tensor rstd)",
    native=native,
    fake=_fake,
    triton=triton,
    launches=lambda *args: plain.norm_launches(*_plain(args, 8)),
    rereads=lambda args, out: plain.norm_rereads(_plain(args, 8), out),
    further=plain.OF_NORM,
)
norm_modulate_segments_quantize_columns = register(
    "norm_modulate_segments_quantize_columns(Tensor h, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor? index, bool shift_per_token, Tensor mean, Tensor rstd, "
    "str norm, float eps, float weight_offset, float scale_offset, ScalarType dtype, "
    "str columns, Tensor amax_t) -> (Tensor codes_t, Tensor scales_t)",
    native=native_columns,
    fake=_fake_columns,
    triton=triton_columns,
    further=plain.OF_COLUMNS,
)
register_together(
    norm_modulate_segments_quantize,
    triton_norms,
    launches=lambda calls: plain.launches_of_norms([_plain(call, 8) for call in calls]),
    kind=lambda x, *_: x.shape[-1],
)
register_together(norm_modulate_segments_quantize_columns, triton_columns_of_norms)
# A stream that is modulated by segment and one that is not are one launch.
share_with(
    plain.norm_modulate_quantize,
    norm_modulate_segments_quantize,
    lambda args: (*args[:8], None, False, *args[8:]),
)
share_with(
    plain.norm_modulate_quantize_columns,
    norm_modulate_segments_quantize_columns,
    lambda args: (*args[:5], None, False, *args[5:]),
)
for _name in ("norm_modulate_segments_quantize", "norm_modulate_segments_quantize_together"):
    CAPABILITIES[_name] = quantize.CAST_CAPABILITY


class Reading(NamedTuple):
    """How the gate, scale and shift of a norm are read, and the ops that read them so.

    arguments: what these ops take behind the operands.
    """

    arguments: tuple[Any, ...]
    forward: OpOverload
    backward: OpOverload
    codes: OpOverload
    codes_t: OpOverload

    @property
    def shift_is_table(self) -> bool:
        return bool(self.arguments) and not self.arguments[1]


def reading(index: Tensor | None, shift_per_token: bool) -> Reading:
    """By an index, or as they are."""
    if index is None:
        ops = norm_modulate, norm_modulate_backward
        return Reading((), *ops, plain.norm_modulate_quantize, plain.norm_modulate_quantize_columns)
    ops = norm_modulate_segments, norm_modulate_segments_backward
    codes = norm_modulate_segments_quantize, norm_modulate_segments_quantize_columns
    return Reading((index, shift_per_token), *ops, *codes)
