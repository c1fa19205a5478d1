"""An activation and the weights that multiply it, cast in the same two launches.

Codes, scales and amax_t are those of `gated_activation_quantize` and `quantize_rows`, bit for bit.
What counts, records or knows its scale runs apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from fxopt.kernels.quantize import can_cast
from fxopt.kernels.quantize_group import Lists, launches_of_rows, quantize_rows, triton_rows
from fxopt.kernels.quantized_producers import (
    gated_activation_quantize,
    launches_of_activations,
    triton_activations,
)
from fxopt.kernels.registration import call_form, register
from fxopt.kernels.together import Ask

NUM_ACTIVATION_ARGUMENTS, NUM_ARGUMENTS = 7, 10
UNSEEN = None, None, None  # counters, a magnitude that is known, and one that is recorded
ROOMS = (
    "Tensor(a!)[]? gate_codes, Tensor(b!)[]? gate_scales, Tensor(c!)[]? up_codes, "
    "Tensor(d!)[]? up_scales"
)


def native(*args: Any) -> Lists:
    """Codes, scales and amax_t of each activation, then of each weight.

    Args:
        args: those of `gated_activation_quantize` for each stream, gate, up and beside as lists;
            then those of `quantize_rows`; then rooms of all streams.
    """
    found = [
        call_form(gated_activation_quantize, (*UNSEEN, *rooms), *call)
        for call, rooms in zip(_calls(args), _rooms(args), strict=True)
    ]
    found += zip(*quantize_rows(*args[NUM_ACTIVATION_ARGUMENTS:NUM_ARGUMENTS]), strict=True)
    codes, scales, amax_t = map(list, zip(*found, strict=True))
    return codes, scales, amax_t


def triton(*args: Any) -> Lists:
    from fxopt.kernels import triton_gated_activation_quantize as kernels

    each = zip(_calls(args), _rooms(args), strict=True)
    calls = [(*call, *UNSEEN, *rooms) for call, rooms in each]
    weights, *formats = args[NUM_ACTIVATION_ARGUMENTS:NUM_ARGUMENTS]
    if all(t.numel() and can_cast(t) for t in (*args[0], *weights)):
        found = kernels.forward_of(calls, weights, formats)
    else:
        found = [*triton_activations(calls), *zip(*triton_rows(weights, *formats), strict=True)]
    codes, scales, amax_t = map(list, zip(*found, strict=True))
    return codes, scales, amax_t


def _calls(args: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Arguments of each activation."""
    settings = args[3:NUM_ACTIVATION_ARGUMENTS]
    return [(*tensors, *settings) for tensors in zip(*args[:3], strict=True)]


def _rooms(args: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Of each activation: codes and scales of gate and up, None where there are none."""
    absent, fields = [None] * len(args[0]), args[NUM_ARGUMENTS:] or [None] * 4
    return list(zip(*(field or absent for field in fields), strict=True))


def _launches(*args: Any) -> int:
    """The two, and what else activations and weights take."""
    each = zip(_calls(args), _rooms(args), strict=True)
    of_activations = launches_of_activations([(*call, *UNSEEN, *rooms) for call, rooms in each])
    return of_activations + launches_of_rows(*args[NUM_ACTIVATION_ARGUMENTS:NUM_ARGUMENTS]) - 2


def _read(args: Sequence[Any]) -> list[Tensor]:
    lists = *args[:3], args[NUM_ACTIVATION_ARGUMENTS]
    return [t for tensors in lists for t in tensors if t is not None]


activation_with_weights = register(
    "gated_activation_quantize_with_weights(Tensor[] gate, Tensor?[] up, Tensor?[] beside, "
    "str activation, str packing, str rows, str? columns, Tensor[] weights, str weight_rows, "
    "str? weight_columns) -> (Tensor[] codes, Tensor[] scales, Tensor[] amax_t)",
    native=native,
    fake=native,
    triton=triton,
    launches=_launches,
    further=ROOMS,
    form="packing",
    # For the scale, then for the values.
    rereads=lambda args, _: _read(args),
)


def together(asks: Sequence[Ask]) -> list[Any] | None:
    """Activations of one kind with weights of one kind."""
    of_op = [ask.op is gated_activation_quantize for ask in asks]
    activations = [ask.args for ask, is_own in zip(asks, of_op, strict=True) if is_own]
    weights = [ask.args for ask, is_own in zip(asks, of_op, strict=True) if not is_own]
    kinds = {args[3:] for args in activations}, {args[1:] for args in weights}
    patterns = {
        tuple(room is None for room in ask.rooms)
        for ask, is_own in zip(asks, of_op, strict=True)
        if is_own
    }
    if [len(own) for own in (*kinds, patterns)] != [1, 1, 1]:
        return None
    (settings,), (formats,) = kinds
    tensors = map(list, zip(*(args[:3] for args in activations), strict=True))
    every = [w for args in weights for w in args[0]]
    rooms = [ask.rooms for ask in asks if ask.op is gated_activation_quantize]
    fields = [list(f) if f[0] is not None else None for f in zip(*rooms, strict=True)]
    given = *tensors, *settings, every, *formats
    found = zip(*call_form(activation_with_weights, fields, *given), strict=True)
    of_activations = iter([*islice(found, len(activations))])
    return [
        next(of_activations)
        if is_own
        else tuple(map(list, zip(*islice(found, len(ask.args[0])), strict=True)))
        for ask, is_own in zip(asks, of_op, strict=True)
    ]
