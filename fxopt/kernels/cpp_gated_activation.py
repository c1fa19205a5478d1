"""Loops of `fxopt::gated_activation` for a CPU: where they apply, and their arguments.

Shape legend: F features.
"""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels.cpp import ABSENT, Loop, Triple, have_shape, is_plain, pointer

ACTIVATIONS = {"gelu_tanh": 0, "silu": 1}
FORWARD = Loop("gated_activation", "3q3q3q2q")
BACKWARD = Loop("gated_activation_backward", "3q3q3q3q3q3q3q")


def applies(
    activation: str,
    packing: str,
    gate: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    grad: Tensor | None = None,
) -> bool:
    """Whether the loops are for these: of biases, that of a gate alone."""
    if activation not in ACTIVATIONS or not is_plain(gate, up, bias, grad):
        return False
    is_packed = packing != "none"
    if bias is not None and (is_packed or not bias.is_contiguous()):
        return False
    num_features = gate.shape[-1] // 2 if is_packed else gate.shape[-1]
    shape = (*gate.shape[:-1], num_features)
    return have_shape(shape, up, grad) and have_shape(shape[-1:], bias)


def forward(
    gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str, y: Tensor
) -> None:
    """Write y = act(gate + bias) * up, [..., F] each."""
    gate, up = _uniform(gate), None if up is None else _uniform(up)
    settings = *_sizes(y), ACTIVATIONS[activation]
    FORWARD(*settings, *_rows(gate), *_rows(up), pointer(bias), pointer(y))


def backward(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    activation: str,
    grads: tuple[Tensor, Tensor | None],
    y: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Write the gradients of gate, up and bias, and y if there is room for it.

    inputs: grad, gate and up. grads: of gate and up, with rows at one stride.
    """
    kept = [None if t is None else _uniform(t) for t in inputs]
    rows = [field for t in (*kept, *grads) for field in _rows(t)]
    settings = *_sizes(inputs[0]), ACTIVATIONS[activation]
    BACKWARD(*settings, *rows, pointer(bias), pointer(y), pointer(dbias))


def _sizes(t: Tensor) -> tuple[int, int]:
    num_features = t.shape[-1]
    return t.numel() // max(num_features, 1), num_features


def _uniform(t: Tensor) -> Tensor:
    """`t`, or a copy if its rows are not at one stride."""
    if t.is_contiguous():
        return t
    shape, stride = t.shape, t.stride()
    whole = all(stride[i] == stride[i + 1] * shape[i + 1] for i in range(t.dim() - 2))
    return t if whole and stride[-1] == 1 else t.contiguous()


def _rows(t: Tensor | None) -> Triple:
    if t is None:
        return ABSENT
    return t.data_ptr(), 0, t.stride(-2) if t.dim() > 1 else 0
