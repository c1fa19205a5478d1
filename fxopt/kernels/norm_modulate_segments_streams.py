"""`fxopt::norm_modulate_segments_streams`: several streams at once, of which some have no index.

An index that is None stands for a call of `fxopt::norm_modulate`. Lists and autograd are as in
`norm_modulate_streams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import native_norm_modulate as native
from fxopt.kernels import norm_modulate_segments as by_segment
from fxopt.kernels import norm_modulate_streams as plain
from fxopt.kernels.norm_modulate import norm_modulate, norm_modulate_backward
from fxopt.kernels.norm_modulate_segments import (
    norm_modulate_segments,
    norm_modulate_segments_backward,
)
from fxopt.kernels.norm_modulate_streams import Call
from fxopt.kernels.registration import LAUNCHES, below_autograd, opmath_of, register
from fxopt.kernels.together import by_call, share, share_with

NUM_FIELDS, NUM_FIELDS_BACKWARD = 10, 14  # lists of tensors, and shift_per_token


def launch(calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """(y, h, mean, rstd) of each call of `norm_modulate_segments`; an index may be None."""
    if all(call[8] is None for call in calls):
        return plain.launch([_plain(call, 8) for call in calls])
    if len(calls) == 1:
        return [below_autograd(norm_modulate_segments, *calls[0])]
    *fields, norm, eps, weight_offset, scale_offset, h_dtype, dtype = zip(*calls, strict=True)
    settings = (norm[0], eps, weight_offset, scale_offset, h_dtype[0], dtype[0])
    return by_call(below_autograd(norm_modulate_segments_streams, *fields, *settings), 4)


def launch_backward(calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """What `norm_modulate_segments_backward` returns for each call; an index may be None."""
    if all(call[10] is None for call in calls):
        return plain.launch_backward([_plain(call, 10) for call in calls])
    if len(calls) == 1:
        return [norm_modulate_segments_backward(*calls[0])]
    *fields, norm, weight_offset, scale_offset, dtype, needs, recompute = zip(*calls, strict=True)
    settings = (norm[0], weight_offset, scale_offset, dtype[0])
    every_need = [need for of_stream in needs for need in of_stream]
    given = *fields, *settings, every_need, recompute
    return by_call(norm_modulate_segments_streams_backward(*given), 9)


def _plain(call: Call, at: int) -> Call:
    """The arguments of the plain op."""
    return *call[:at], *call[at + 2 :]


def _calls(args: Sequence[Any]) -> list[Call]:
    return plain.calls_of(args, NUM_FIELDS)


def _backward_calls(args: Sequence[Any]) -> list[Call]:
    return plain.backward_calls_of(args, NUM_FIELDS_BACKWARD)


def _fake(*args: Any) -> list[Tensor]:
    return [t for call in _calls(args) for t in plain.fake(_plain(call, 8))]


def _fake_backward(*args: Any) -> list[Tensor]:
    return [t for call in _backward_calls(args) for t in plain.fake_backward(_plain(call, 10))]


def _launches_backward(*args: Any) -> int:
    """As the call that launches most; each index puts its tokens in order."""
    calls = _backward_calls(args)
    num_indices = sum(call[10] is not None for call in calls)
    name = "fxopt::norm_modulate_backward"
    return num_indices + max(LAUNCHES[name](*_plain(call, 10)) for call in calls)


def _native(*args: Any) -> list[Tensor]:
    return [t for call in _calls(args) for t in _native_alone(*call)]


def _native_alone(*call: Any) -> tuple[Tensor, ...]:
    if call[8] is None:
        return native.forward(*_plain(call, 8))
    return by_segment.native_forward(*call)


def _native_backward(*args: Any) -> list[Tensor]:
    return [t for call in _backward_calls(args) for t in _native_backward_alone(*call)]


def _native_backward_alone(*call: Any) -> tuple[Tensor, ...]:
    if call[10] is None:
        return native.backward(*_plain(call, 10))
    return by_segment.native_backward(*call)


def _triton(*args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_norm_modulate_segments as provider

    if any(opmath_of(x, *args[-2:]) == torch.float64 for x in args[0]):
        return _native(*args)
    return [t for results in provider.forward_of(_calls(args)) for t in results]


def _triton_backward(*args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_norm_modulate_segments as provider

    if any(rstd.dtype == torch.float64 for rstd in args[13]):
        return _native_backward(*args)
    return [t for results in provider.backward_of(_backward_calls(args)) for t in results]


_READING = "Tensor?[] index, bool[] shift_per_token"
# (y, h, mean, rstd) of each stream
norm_modulate_segments_streams = register(
    f"norm_modulate_segments_streams(Tensor[] x, Tensor?[] residual, {plain.OPERANDS}, {_READING}, "
    "str norm, float[] eps, float[] weight_offset, float[] scale_offset, ScalarType h_dtype, "
    "ScalarType dtype) -> Tensor[]",
    native=_native,
    fake=_fake,
    triton=_triton,
)
# (dh, dx, dgate, dweight, dbias, dscale, dshift, dx_bias, y) of each stream
norm_modulate_segments_streams_backward = register(
    "norm_modulate_segments_streams_backward(Tensor?[] grad_y, Tensor?[] grad_h, Tensor[] h, "
    f"Tensor?[] x, {plain.OPERANDS}, {_READING}, Tensor[] mean, Tensor[] rstd, str norm, "
    "float[] weight_offset, float[] scale_offset, ScalarType dtype, bool[] needs, "
    "bool[] recompute) -> Tensor[]",
    native=_native_backward,
    fake=_fake_backward,
    triton=_triton_backward,
    launches=_launches_backward,
)
share(norm_modulate_segments, launch, lambda x, *args: (x.shape[-1], args[9], *args[-2:]))
share(
    norm_modulate_segments_backward,
    launch_backward,
    lambda _, grad_h, h, *args: (h.shape[-1], args[11], args[14]),
)
share_with(norm_modulate, norm_modulate_segments, lambda args: (*args[:8], None, False, *args[8:]))
share_with(
    norm_modulate_backward,
    norm_modulate_segments_backward,
    lambda args: (*args[:10], None, False, *args[10:]),
)
