"""`fxopt::norm_modulate_streams`: several `fxopt::norm_modulate` at once, of text and image say.

What is a tensor or a number there is a list here with one entry per stream. Norm, dtypes and the
number of features are common to all; rows and operands differ as they like. Autograd is that of
`norm_modulate_linears_streams`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.native_norm_modulate import leave_magnitude, outputs
from fxopt.kernels.norm_modulate import (
    NUM_ARGUMENTS,
    NUM_BACKWARD_ARGUMENTS,
    decoded,
    fake_one_backward,
    fill_rooms,
    native_backward,
    native_forward,
    norm_modulate,
    norm_modulate_backward,
)
from fxopt.kernels.quantize import can_cast
from fxopt.kernels.registration import (
    LAUNCHES,
    below_autograd,
    call_form,
    each_directly,
    opmath_of,
    register,
)
from fxopt.kernels.together import by_call, share

Call = tuple[Any, ...]  # arguments of `norm_modulate` or its backward, for one stream
NUM_OPERANDS = 8


def launch(calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """(y, h, mean, rstd) of each call of `norm_modulate`, or all of its second form."""
    each = each_directly(norm_modulate, calls)
    if each is not None:
        return each
    # Behind the arguments of each stands where it leaves codes, of the same in all.
    rooms = [
        list(r) if r[0] is not None else None
        for r in zip(*(c[NUM_ARGUMENTS:] for c in calls), strict=True)
    ]
    calls = [call[:NUM_ARGUMENTS] for call in calls]
    if len(calls) == 1:
        own = [None if room is None else room[0] for room in rooms]
        return [below_autograd(call_form, norm_modulate, own, *calls[0])]
    *tensors, norm, eps, weight_offset, scale_offset, h_dtype, dtype = zip(*calls, strict=True)
    settings = (norm[0], eps, weight_offset, scale_offset, h_dtype[0], dtype[0])
    given = call_form, norm_modulate_streams, rooms, *tensors, *settings
    return by_call(below_autograd(*given), 4)


def launch_backward(calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """What `norm_modulate_backward` returns for each call, which may be of its second form."""
    each = each_directly(norm_modulate_backward, calls)
    if each is not None:
        return each
    # Behind the arguments of each stand the same of all: scales, and where a magnitude is left.
    each_further = [call[NUM_BACKWARD_ARGUMENTS:] for call in calls]
    calls = [call[:NUM_BACKWARD_ARGUMENTS] for call in calls]
    if len(calls) < 2:
        pairs = zip(calls, each_further, strict=True)
        return [call_form(norm_modulate_backward, own, *call) for call, own in pairs]
    further = [
        None if all(t is None for t in field) else list(field)
        for field in zip(*each_further, strict=True)
    ]
    *tensors, norm, weight_offset, scale_offset, dtype, needs, recompute = zip(*calls, strict=True)
    settings = (norm[0], weight_offset, scale_offset, dtype[0])
    every_need = [need for of_stream in needs for need in of_stream]
    given = *tensors, *settings, every_need, recompute
    return by_call(call_form(norm_modulate_streams_backward, further, *given), 9)


def calls_of(args: Sequence[Any], num_fields: int = NUM_OPERANDS) -> list[Call]:
    """Arguments of `norm_modulate` for each stream, from those of all."""
    end = num_fields + 6
    tensors, (norm, *constants, h_dtype, dtype) = args[:num_fields], args[num_fields:end]
    _require_one_width(tensors[0])
    each = zip(zip(*tensors, strict=True), zip(*constants, strict=True), strict=True)
    return _followed([(*t, norm, *c, h_dtype, dtype) for t, c in each], args[end:])


def backward_calls_of(args: Sequence[Any], num_fields: int = 12) -> list[Call]:
    """Arguments of `norm_modulate_backward` for each stream, from those of all."""
    end = num_fields + 6
    tensors, (norm, *offsets, dtype, needs, recompute) = args[:num_fields], args[num_fields:end]
    _require_one_width(tensors[2])
    of_stream = [needs[i : i + NUM_OPERANDS] for i in range(0, len(needs), NUM_OPERANDS)]
    last = zip(of_stream, recompute, strict=True)
    each = zip(zip(*tensors, strict=True), zip(*offsets, strict=True), last, strict=True)
    calls = [(*t, norm, *o, dtype, *needed) for t, o, needed in each]
    return _followed(calls, args[end:])


def _followed(calls: Sequence[Call], fields: Sequence[Any]) -> list[Call]:
    """Each call and its own of what stands behind the arguments of all."""
    lists = [[None] * len(calls) if field is None else field for field in fields]
    return [(*call, *(own[i] for own in lists)) for i, call in enumerate(calls)]


def _require_one_width(inputs: Iterable[Tensor]) -> None:
    widths = [t.shape[-1] for t in inputs]
    if any(width != widths[0] for width in widths):
        raise ValueError(
            f"norm_modulate_streams takes streams of one width, but theirs are {widths}: "
            "call norm_modulate for each"
        )


def fake(call: Call) -> tuple[Tensor, ...]:
    """The outputs of one call."""
    x, residual, norm, (h_dtype, dtype) = call[0], call[1], call[8], call[12:14]
    return outputs(x, residual, norm, h_dtype, dtype)


def fake_backward(call: Call) -> tuple[Tensor, ...]:
    """Those of one call of the backward."""
    return fake_one_backward(*call)


def _fake(*args: Any) -> list[Tensor]:
    return [t for call in calls_of(args) for t in fake(call)]


def _fake_backward(*args: Any) -> list[Tensor]:
    return [t for call in backward_calls_of(args) for t in fake_backward(call)]


def _launches_backward(*args: Any) -> int:
    """As the call that launches most."""
    return max(LAUNCHES["fxopt::norm_modulate_backward"](*call) for call in backward_calls_of(args))


def _native(*args: Any) -> list[Tensor]:
    return [t for call in calls_of(args) for t in native_forward(*call)]


def _native_backward(*args: Any) -> list[Tensor]:
    return [t for call in backward_calls_of(args) for t in native_backward(*call)]


def _triton(*args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_norm_modulate

    if any(opmath_of(x, *args[12:14]) == torch.float64 for x in args[0]):
        return _native(*args)
    calls, casts = calls_of(args), can_cast(args[0][0])
    given = calls if casts else [call[:NUM_ARGUMENTS] for call in calls]
    found = triton_norm_modulate.forward_of(given)
    for call, results in zip(calls, found, strict=True):
        fill_rooms(call if not casts else call[:NUM_ARGUMENTS], results)
    return [t for results in found for t in results]


def _triton_backward(*args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_norm_modulate

    if any(rstd.dtype == torch.float64 for rstd in args[11]):
        return _native_backward(*args)
    calls, casts = backward_calls_of(args), can_cast(args[2][0])
    calls = calls if casts else [decoded(call) for call in calls]
    found = triton_norm_modulate.backward_of(calls)
    for call, results in zip(backward_calls_of(args), found, strict=True):
        if not casts:
            leave_magnitude(results, call[4], *call[NUM_BACKWARD_ARGUMENTS + 2 :])
    return [t for results in found for t in results]


OPERANDS = (
    "Tensor?[] gate, Tensor?[] weight, Tensor?[] bias, Tensor?[] scale, Tensor?[] shift, "
    "Tensor?[] x_bias"
)
# (y, h, mean, rstd) of each stream
norm_modulate_streams = register(
    f"norm_modulate_streams(Tensor[] x, Tensor?[] residual, {OPERANDS}, str norm, float[] eps, "
    "float[] weight_offset, float[] scale_offset, ScalarType h_dtype, ScalarType dtype) "
    "-> Tensor[]",
    native=_native,
    fake=_fake,
    triton=_triton,
    further="Tensor(a!)[]? h_codes, Tensor(b!)[]? h_scales, Tensor(c!)[]? x_codes, "
    "Tensor(d!)[]? x_scales",
    form="packing",
)
# (dh, dx, dgate, dweight, dbias, dscale, dshift, dx_bias, y) of each stream
norm_modulate_streams_backward = register(
    "norm_modulate_streams_backward(Tensor?[] grad_y, Tensor?[] grad_h, Tensor[] h, Tensor?[] x, "
    f"{OPERANDS}, Tensor[] mean, Tensor[] rstd, str norm, float[] weight_offset, "
    "float[] scale_offset, ScalarType dtype, bool[] needs, bool[] recompute) -> Tensor[]",
    native=_native_backward,
    fake=_fake_backward,
    triton=_triton_backward,
    launches=_launches_backward,
    further="Tensor?[]? h_scales, Tensor?[]? x_scales, Tensor(a!)[]? seen",
    form="packed",
)
share(norm_modulate, launch, lambda x, *args: (x.shape[-1], args[7], *args[-2:]))
share(
    norm_modulate_backward,
    launch_backward,
    lambda _, grad_h, h, *args: (h.shape[-1], args[9], args[12]),
)
