"""`fxopt::gated_activation_streams`: several `fxopt::gated_activation` in one launch each way.

What is a tensor there is a list here with one entry per stream. Activation, packing, dtype and the
number of features are common to all. Autograd is that of `gated_activation_linear_streams`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fxopt.kernels import gated_activation as op
from fxopt.kernels.registration import below_autograd, register

Call = tuple[Any, ...]  # arguments of `gated_activation` or its backward, for one stream


def launch(calls: Sequence[Call]) -> list[Tensor]:
    """y of each call of `gated_activation`."""
    if len(calls) == 1:
        return [below_autograd(op.gated_activation, *calls[0])]
    gate, up, activation, packing = zip(*calls, strict=True)
    found: list[Tensor] = below_autograd(
        gated_activation_streams, gate, up, activation[0], packing[0]
    )
    return found


def launch_backward(calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """(dgate, dup, y) of each call of `gated_activation_backward`."""
    if len(calls) == 1:
        return [op.gated_activation_backward(*calls[0])]
    *tensors, activation, packing, recompute = zip(*calls, strict=True)
    found = gated_activation_streams_backward(*tensors, activation[0], packing[0], recompute)
    return [tuple(found[i : i + 3]) for i in range(0, len(found), 3)]


def _calls(args: Sequence[Any]) -> list[Call]:
    gates, ups, *settings = args
    _require_one_kind(gates)
    return [(gate, up, *settings) for gate, up in zip(gates, ups, strict=True)]


def _backward_calls(args: Sequence[Any]) -> list[Call]:
    *tensors, activation, packing, recompute = args
    _require_one_kind(tensors[1])
    each = zip(zip(*tensors, strict=True), recompute, strict=True)
    return [(*t, activation, packing, again) for t, again in each]


def _require_one_kind(gates: Iterable[Tensor]) -> None:
    kinds = [(t.shape[-1], t.dtype) for t in gates]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"gated_activation_streams takes streams of one width and dtype, but theirs are "
            f"{kinds}: call gated_activation for each"
        )


def _fake(*args: Any) -> list[Tensor]:
    return [op.output(*call) for call in _calls(args)]


def _fake_backward(*args: Any) -> list[Tensor]:
    return [t for call in _backward_calls(args) for t in op.outputs_backward(*call)]


def _native(*args: Any) -> list[Tensor]:
    return [op.native(*call) for call in _calls(args)]


def _native_backward(*args: Any) -> list[Tensor]:
    return [t for call in _backward_calls(args) for t in op.native_backward(*call)]


def _triton(*args: Any) -> list[Tensor]:
    return op.triton_forward_of(_calls(args))


def _triton_backward(*args: Any) -> list[Tensor]:
    return [t for results in op.triton_backward_of(_backward_calls(args)) for t in results]


gated_activation_streams = register(
    "gated_activation_streams(Tensor[] gate, Tensor?[] up, str activation, str packing) "
    "-> Tensor[]",
    native=_native,
    fake=_fake,
    triton=_triton,
)
# (dgate, dup, y) of each stream
gated_activation_streams_backward = register(
    "gated_activation_streams_backward(Tensor[] grad, Tensor[] gate, Tensor?[] up, "
    "str activation, str packing, bool[] recompute) -> Tensor[]",
    native=_native_backward,
    fake=_fake_backward,
    triton=_triton_backward,
)
