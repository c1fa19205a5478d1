"""`fxopt::gated_activation_streams`: several `fxopt::gated_activation` in one launch each way.

What is a tensor there is a list here with one entry per stream. Activation, packing, dtype and the
number of features are common to all. Autograd is that of `gated_activation_linear_streams`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import gated_activation as op
from fxopt.kernels import native_gated_activation as native
from fxopt.kernels.registration import below_autograd, each_directly, register
from fxopt.kernels.together import share

Call = tuple[Any, ...]  # arguments of `gated_activation` or its backward, for one stream


def launch(calls: Sequence[Call]) -> list[Tensor]:
    """y of each call of `gated_activation`."""
    each = each_directly(op.gated_activation, calls)
    if each is not None:
        return each
    if len(calls) == 1:
        return [below_autograd(op.gated_activation, *calls[0])]
    gate, up, activation, packing, bias = zip(*calls, strict=True)
    found: list[Tensor] = below_autograd(
        gated_activation_streams, gate, up, bias, activation[0], packing[0]
    )
    return found


def launch_backward(calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """(dgate, dup, y, dbias) of each call of `gated_activation_backward`."""
    each = each_directly(op.gated_activation_backward, calls)
    if each is not None:
        return each
    if len(calls) < 2:
        return [op.gated_activation_backward(*call) for call in calls]
    *tensors, activation, packing, recompute, bias, needs_bias = zip(*calls, strict=True)
    settings = activation[0], packing[0]
    found = gated_activation_streams_backward(*tensors, bias, *settings, recompute, needs_bias)
    return [tuple(found[i : i + 4]) for i in range(0, len(found), 4)]


def _calls(args: Sequence[Any]) -> list[Call]:
    *tensors, activation, packing = args
    _require_one_kind(tensors[0])
    each = zip(*tensors, strict=True)
    return [(gate, up, activation, packing, bias) for gate, up, bias in each]


def _backward_calls(args: Sequence[Any]) -> list[Call]:
    *tensors, activation, packing, recompute, needs_bias = args
    _require_one_kind(tensors[1])
    each = zip(*tensors, recompute, needs_bias, strict=True)
    return [
        (grad, gate, up, activation, packing, again, bias, needs)
        for grad, gate, up, bias, again, needs in each
    ]


def _kind(gate: Tensor) -> tuple[int, torch.dtype]:
    return gate.shape[-1], gate.dtype


def _require_one_kind(gates: Iterable[Tensor]) -> None:
    kinds = [_kind(gate) for gate in gates]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"gated_activation_streams takes streams of one width and dtype, but theirs are "
            f"{kinds}: call gated_activation for each"
        )


def _fake(*args: Any) -> list[Tensor]:
    return [native.output(*call) for call in _calls(args)]


def _fake_backward(*args: Any) -> list[Tensor]:
    return [t for call in _backward_calls(args) for t in native.outputs_backward(*call)]


def _native(*args: Any) -> list[Tensor]:
    return [native.native(*call) for call in _calls(args)]


def _native_backward(*args: Any) -> list[Tensor]:
    return [t for call in _backward_calls(args) for t in native.native_backward(*call)]


def _triton(*args: Any) -> list[Tensor]:
    return op.triton_forward_of(_calls(args))


def _triton_backward(*args: Any) -> list[Tensor]:
    return [t for results in op.triton_backward_of(_backward_calls(args)) for t in results]


gated_activation_streams = register(
    "gated_activation_streams(Tensor[] gate, Tensor?[] up, Tensor?[] gate_bias, str activation, "
    "str packing) -> Tensor[]",
    native=_native,
    fake=_fake,
    triton=_triton,
)
# (dgate, dup, y, dbias) of each stream
gated_activation_streams_backward = register(
    "gated_activation_streams_backward(Tensor[] grad, Tensor[] gate, Tensor?[] up, "
    "Tensor?[] gate_bias, str activation, str packing, bool[] recompute, bool[] needs_bias) "
    "-> Tensor[]",
    native=_native_backward,
    fake=_fake_backward,
    triton=_triton_backward,
    launches=op.launches_backward,
)
share(op.gated_activation, launch, lambda gate, _, *args: (_kind(gate), *args[:2]))
share(
    op.gated_activation_backward,
    launch_backward,
    lambda grad, gate, _, *args: (_kind(gate), *args[:2]),
)
