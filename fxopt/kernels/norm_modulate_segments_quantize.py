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

ARGUMENTS = plain.NORM_ARGUMENTS.replace("str norm", "Tensor index, bool shift_per_token, str norm")


def native(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As `native_norm`, with tables, `index` and `shift_per_token` of `norm_modulate_segments`."""
    residual, gate, weight, bias, scale, shift, x_bias, index, shift_per_token = args[:9]
    gate, scale, shift = per_token(gate, scale, shift, index, shift_per_token, x.dim())
    operands = x, residual, gate, weight, bias, scale, shift, x_bias
    return plain.native_norm(*operands, *args[9:])


def native_columns(h: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """As `native_norm_columns`, with `index` and `shift_per_token` behind the shift."""
    weight, bias, scale, shift, index, shift_per_token = args[:6]
    _, scale, shift = per_token(None, scale, shift, index, shift_per_token, h.dim())
    return plain.native_norm_columns(h, weight, bias, scale, shift, *args[6:])


def triton(*args: Any) -> tuple[Tensor, ...]:
    from fxopt.kernels import triton_norm_modulate_quantize as kernels

    call, reading = _parted(args, 8)
    if not plain.fits(args[0], opmath_of(args[0], *call[12:14])):
        return native(*args)
    return kernels.forward_of([call], [reading])[0]


def triton_columns(*args: Any) -> tuple[Tensor, Tensor]:
    from fxopt.kernels import triton_norm_modulate_quantize as kernels

    call, reading = _parted(args, 5)
    if not plain.fits(args[0], call[6].dtype):
        return native_columns(*args)
    return kernels.columns_of([call], [reading])[0]


def _parted(args: Sequence[Any], at: int) -> tuple[tuple[Any, ...], Any]:
    """The arguments of the plain op, and the two at `at` that say how tables are read."""
    return (*args[:at], *args[at + 2 :]), (args[at], args[at + 1])


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return plain.fake_norm(*_parted(args, 8)[0])


def _fake_columns(*args: Any) -> tuple[Tensor, Tensor]:
    return plain.fake_norm_columns(*_parted(args, 5)[0])


norm_modulate_segments_quantize = register(
    f"norm_modulate_segments_quantize({ARGUMENTS}, str rows, str? columns) -> "
    "(Tensor codes, Tensor scales, Tensor amax_t, Tensor h, Tensor mean, Tensor rstd)",
    native=native,
    fake=_fake,
    triton=triton,
    launches=lambda *args: plain.norm_launches(*_parted(args, 8)[0]),
    rereads=lambda args, out: plain.norm_rereads(_parted(args, 8)[0], out),
    counters=plain.OF_INPUT,
)
norm_modulate_segments_quantize_columns = register(
    "norm_modulate_segments_quantize_columns(Tensor h, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor index, bool shift_per_token, Tensor mean, Tensor rstd, "
    "str norm, float eps, float weight_offset, float scale_offset, ScalarType dtype, "
    "str columns, Tensor amax_t) -> (Tensor codes_t, Tensor scales_t)",
    native=native_columns,
    fake=_fake_columns,
    triton=triton_columns,
    counters=plain.COUNTERS,
)
CAPABILITIES["norm_modulate_segments_quantize"] = quantize.CAST_CAPABILITY


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
