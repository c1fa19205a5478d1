"""gated_activation: an MLP's activation, alone or times the `up` half, as one op.

    y = act(gate)          y = act(gate) * up          gate, up: halves of gate + gate_bias

The Triton provider rounds once. The native one rounds as the eager ops it calls: in 16 bits and
without a bias, also between the activation and the product.

Shape legend: F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from fxopt.kernels.native_gated_activation import (
    halves,
    native,
    native_backward,
    output,
    outputs_backward,
    require_one,
    split_backward,
)
from fxopt.kernels.registration import below_autograd, opmath_of, register, without_autograd
from fxopt.kernels.saving import packed, unpacked
from fxopt.kernels.sharding import Arguments, rows


def reference(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Activation of `gate`, times `up` where there is one: `y = act(gate) * up`.

    Args:
        gate: [..., F], or [..., 2F] holding both halves; any strides, floating point.
        up: [..., F] in gate's dtype, or None for `act(gate)` and for packed halves.
        activation: "gelu_tanh", "gelu_erf", "silu", "sigmoid" or "relu".
        packing: "none"; "gate_up" for gate = [g, u], "up_gate" for gate = [u, g] on the last dim.
        gate_bias: [F] or [2F], added to gate first; None with `up`.

    Returns y [..., F] in gate's dtype, rounded once from fp32 (fp64 for fp64).

    Raises:
        ValueError: both `up` and `gate_bias`.
    """
    require_one(up, gate_bias)
    opmath = opmath_of(gate)
    dtype, gate = gate.dtype, gate.to(opmath)
    gate, up = halves(gate if gate_bias is None else gate + gate_bias, up, packing)
    y = _REFERENCES[activation](gate)
    return (y if up is None else y * up.to(opmath)).to(dtype)


_REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}


def triton_forward(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    gate_bias: Tensor | None = None,
) -> Tensor:
    return triton_forward_of([(gate, up, activation, packing, gate_bias)])[0]


def triton_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    recompute: bool,
    gate_bias: Tensor | None = None,
    needs_bias: bool = False,
) -> tuple[Tensor, ...]:
    call = grad, gate, up, activation, packing, recompute, gate_bias, needs_bias
    return triton_backward_of([call])[0]


def triton_forward_of(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """The op on the arguments of each call, in one launch; they share all but rows."""
    from fxopt.kernels import triton_gated_activation

    outs = [output(*call) for call in calls]
    streams = [
        (*halves(gate, up, packing), *_halves_of(bias, packing), y)
        for (gate, up, _, packing, bias), y in zip(calls, outs, strict=True)
    ]
    triton_gated_activation.forward(streams, calls[0][2])
    return outs


def triton_backward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """The backward on the arguments of each call, in one launch, or two where a bias has one."""
    from fxopt.kernels import triton_gated_activation

    found: list[tuple[Tensor, ...]] = []
    streams = []
    for call in calls:
        grad, gate, up, _, packing, recompute, bias, needs_bias = call
        outputs = outputs_backward(*call)
        inputs, grads, y = split_backward(gate, up, packing, outputs, recompute)
        biases = _halves_of(bias, packing)
        dbiases = _halves_of(outputs[3] if needs_bias else None, packing)
        streams.append((grad, *inputs, *biases, *grads, y, *dbiases))
        found.append(outputs)
    triton_gated_activation.backward(streams, calls[0][3])
    return found


def _halves_of(bias: Tensor | None, packing: str) -> tuple[Tensor | None, Tensor | None]:
    """Of a bias, if there is one, what belongs to gate and to up."""
    return (None, None) if bias is None else halves(bias, None, packing)


def launches_backward(*args: Any) -> int:
    """A second one adds up gradients of biases; the last argument is which are needed."""
    needs_bias = args[7:]
    return 1 + any(tree_leaves(needs_bias))


class GatedActivation(torch.autograd.Function):
    """Autograd of `fxopt::gated_activation`; saves gate, up and bias, never the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        packing: str,
        gate_bias: Tensor | None = None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*packed(ctx, (gate, up)), gate_bias)
        ctx.settings = settings = activation, packing
        return below_autograd(gated_activation, gate, up, *settings, gate_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_gate, needs_up, _, _, *needs_bias = ctx.needs_input_grad
        absent = (None,) * len(needs_bias)
        if grad is None:
            return None, None, None, None, *absent
        gate, up, bias = unpacked(ctx, ctx.saved_tensors)
        args = *ctx.settings, False, bias, any(needs_bias)
        dgate, dup, _, dbias = without_autograd(gated_activation_backward, grad, gate, up, *args)
        of_bias = (dbias,) if any(needs_bias) else absent
        return dgate if needs_gate else None, dup if needs_up else None, None, None, *of_bias


def _is_elementwise(arguments: Arguments) -> bool:
    """Whether features stand alone: a shard of packed halves is not two halves, nor of a bias."""
    return arguments["packing"] == "none" and arguments.get("gate_bias") is None


_OPERANDS = ("gate_bias",)
gated_activation = register(
    "gated_activation(Tensor gate, Tensor? up, str activation, str packing, "
    "Tensor? gate_bias=None) -> Tensor",
    native=native,
    fake=output,
    triton=triton_forward,
    function=GatedActivation,
    sharding=rows("gate", "up", operands=_OPERANDS, outputs=[None], is_elementwise=_is_elementwise),
    reference=reference,
)
gated_activation_backward = register(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor? up, str activation, str packing, "
    "bool recompute, Tensor? gate_bias=None, bool needs_bias=False) "
    "-> (Tensor dgate, Tensor dup, Tensor y, Tensor dbias)",
    native=native_backward,
    fake=outputs_backward,
    triton=triton_backward,
    launches=launches_backward,
    sharding=rows(
        *("gate", "up", "grad"),
        operands=_OPERANDS,
        outputs=[None, None, None, "gate_bias"],
        is_elementwise=_is_elementwise,
    ),
)
