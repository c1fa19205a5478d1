"""gated_activation: an MLP's activation, alone or times the `up` half, as one op.

    y = act(gate)          y = act(gate) * up

The Triton provider rounds once. The native one rounds as the eager ops it calls: in 16 bits, also
between the activation and the product.

Shape legend: N rows (all leading dims), F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.registration import below_autograd, opmath_of, register
from fxopt.kernels.sharding import Arguments, rows

aten = torch.ops.aten

# Elements per core of one step of the native provider: its fp32 temporaries stay in L2.
BLOCK = 1 << 16

# gelu_tanh(x) = x * (1 + tanh(x * q)) / 2, where q = GELU_LINEAR + GELU_CUBIC * x**2.
GELU_LINEAR = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


def reference(gate: Tensor, up: Tensor | None, activation: str, packing: str) -> Tensor:
    """Activation of `gate`, times `up` where there is one: `y = act(gate) * up`.

    Args:
        gate: [..., F], or [..., 2F] holding both halves; any strides, floating point.
        up: [..., F] in gate's dtype, or None for `act(gate)` and for packed halves.
        activation: "gelu_tanh", "gelu_erf", "silu", "sigmoid" or "relu".
        packing: "none"; "gate_up" for gate = [g, u], "up_gate" for gate = [u, g] on the last dim.

    Returns y [..., F] in gate's dtype, rounded once from fp32 (fp64 for fp64).
    """
    gate, up = halves(gate, up, packing)
    opmath = opmath_of(gate)
    y = _REFERENCES[activation](gate.to(opmath))
    return (y if up is None else y * up.to(opmath)).to(gate.dtype)


def native(gate: Tensor, up: Tensor | None, activation: str, packing: str) -> Tensor:
    gate, up = halves(gate, up, packing)
    value = _ACTIVATIONS[activation].forward(gate)
    return (value if up is None else value * up).contiguous()


def native_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, packing: str, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = outputs_backward(grad, gate, up, activation, packing, recompute)
    (gate, up), (dgate, dup), y = _split_backward(gate, up, packing, outputs, recompute)
    backward = _ACTIVATIONS[activation].backward
    if up is None:
        backward(grad, gate, dgate, y)
    else:
        assert dup is not None
        value = dup if y is None else y
        backward(torch.mul(grad, up, out=dgate), gate, dgate, value)
        torch.mul(grad, value, out=dup)
        if y is not None:
            y.mul_(up)
    return outputs


class _Activation(NamedTuple):
    """`forward(x)` is f(x); `backward(grad, x, dx, y)` writes grad * f'(x) to dx and, unless it is
    None, f(x) to y. dx may be a view with strided rows; y is contiguous."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor | None], Any]


def _of_aten(forward: torch._ops.OpOverloadPacket, backward: Callable[..., Any]) -> _Activation:
    def write_backward(grad: Tensor, x: Tensor, dx: Tensor, y: Tensor | None) -> None:
        backward(grad, x, grad_input=dx)
        if y is not None:
            forward.out(x, out=y)

    return _Activation(forward, write_backward)


# Not aten.gelu, whose inlined tanh takes five times as long as aten.tanh (torch 2.13, fp32, x86)
# and which the backward would call twice when it also recomputes the activation.
def _gelu_tanh(x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    linear, half = (x.new_full((), c, dtype=opmath_of(x)) for c in (GELU_LINEAR, 0.5))
    for x_block, y_block, (cdf, x_opmath) in _blocks(x, y, num_scratch=2):
        x = x_block if x_block.dtype == cdf.dtype else x_opmath.copy_(x_block)
        torch.addcmul(linear, x, x, value=GELU_CUBIC, out=cdf).mul_(x).tanh_()
        torch.add(half, cdf, alpha=0.5, out=cdf)
        _mul_rounded(cdf, x, y_block)
    return y


def _gelu_tanh_backward(grad: Tensor, x: Tensor, dx: Tensor, y: Tensor | None) -> None:
    linear, half = (x.new_full((), c, dtype=opmath_of(x)) for c in (GELU_LINEAR, 0.5))
    slope_linear = -2 * linear
    for grad_block, x_block, dx_block, y_block, scratch in _blocks(grad, x, dx, y, num_scratch=5):
        q, cdf, tail, x, grad = scratch
        if x_block.dtype == q.dtype:
            x, grad = x_block, grad_block
        else:
            x.copy_(x_block)
            grad.copy_(grad_block)
        torch.addcmul(linear, x, x, value=GELU_CUBIC, out=q)
        torch.mul(x, q, out=cdf).tanh_()
        # f' = cdf + x (1 - tanh**2) (xq)' / 2, where (xq)' = 3q - 2 GELU_LINEAR.
        aten.tanh_backward.grad_input(x, cdf, grad_input=tail)
        torch.add(half, cdf, alpha=0.5, out=cdf)
        torch.add(slope_linear, q, alpha=3, out=q)
        torch.addcmul(cdf, tail, q, value=0.5, out=tail)
        if y_block is not None:
            _mul_rounded(cdf, x, y_block)
        _mul_rounded(tail, grad, dx_block)


def _mul_rounded(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a * b into out, rounded to its dtype; overwrites a."""
    if out.dtype == a.dtype:
        torch.mul(a, b, out=out)
    else:
        out.copy_(a.mul_(b))


def _sigmoid_backward(grad: Tensor, x: Tensor, dx: Tensor, y: Tensor | None) -> None:
    sigmoid = torch.sigmoid(x) if y is None else torch.sigmoid(x, out=y)
    aten.sigmoid_backward.grad_input(grad, sigmoid, grad_input=dx)


def _relu_backward(grad: Tensor, x: Tensor, *, grad_input: Tensor) -> None:
    aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input)


_ACTIVATIONS = {
    "gelu_tanh": _Activation(_gelu_tanh, _gelu_tanh_backward),
    "gelu_erf": _of_aten(aten.gelu, aten.gelu_backward.grad_input),
    "silu": _of_aten(aten.silu, aten.silu_backward.grad_input),
    "sigmoid": _Activation(torch.sigmoid, _sigmoid_backward),
    "relu": _of_aten(aten.relu, _relu_backward),
}

_REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}


def halves(gate: Tensor, up: Tensor | None, packing: str) -> tuple[Tensor, Tensor | None]:
    """What is activated and what it is multiplied by, unpacked."""
    if packing == "none":
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if packing == "gate_up" else (second, first)


def _split_backward(
    gate: Tensor,
    up: Tensor | None,
    packing: str,
    outputs: tuple[Tensor, Tensor, Tensor],
    recompute: bool,
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None], Tensor | None]:
    dgate, dup, y = outputs
    return (
        halves(gate, up, packing),
        halves(dgate, None if up is None else dup, packing),
        y if recompute else None,
    )


def _blocks(*tensors: Tensor | None, num_scratch: int) -> Iterator[tuple[Any, ...]]:
    """Blocks of rows of [..., F] tensors (None stays None), then opmath scratch of their shape."""
    like = cast(Tensor, tensors[0])
    num_features = max(like.shape[-1], 1)
    step = max(like.numel() // num_features, 1)
    if like.device.type == "cpu":
        step = min(step, max(BLOCK * torch.get_num_threads() // num_features, 1))
    scratch = like.new_empty(num_scratch, step, num_features, dtype=opmath_of(like)).unbind()
    blocks_NF = [
        repeat(None) if t is None else t.reshape(-1, num_features).split(step) for t in tensors
    ]
    for blocks in zip(*blocks_NF, strict=False):
        num_rows = len(blocks[0])
        yield *blocks, [s if num_rows == step else s[:num_rows] for s in scratch]


def output(gate: Tensor, up: Tensor | None, activation: str, packing: str) -> Tensor:
    """Uninitialised y."""
    num_halves = 1 if packing == "none" else 2
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // num_halves)


def outputs_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, packing: str, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dgate, dup and y; those that there are not have 0 elements."""
    return (
        gate.new_empty(gate.shape),
        gate.new_empty(0 if up is None else up.shape),
        gate.new_empty(grad.shape if recompute else 0),
    )


def triton_forward(*args: Any) -> Tensor:
    return triton_forward_of([args])[0]


def triton_backward(*args: Any) -> tuple[Tensor, ...]:
    return triton_backward_of([args])[0]


def triton_forward_of(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """The op on the arguments of each call, in one launch; they share all but rows."""
    from fxopt.kernels import triton_gated_activation

    outs = [output(*call) for call in calls]
    streams = [
        (*halves(gate, up, packing), y)
        for (gate, up, _, packing), y in zip(calls, outs, strict=True)
    ]
    triton_gated_activation.forward(streams, calls[0][2])
    return outs


def triton_backward_of(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """The backward on the arguments of each call, in one launch."""
    from fxopt.kernels import triton_gated_activation

    found: list[tuple[Tensor, ...]] = []
    streams = []
    for grad, gate, up, activation, packing, recompute in calls:
        outputs = outputs_backward(grad, gate, up, activation, packing, recompute)
        inputs, grads, y = _split_backward(gate, up, packing, outputs, recompute)
        streams.append((grad, *inputs, *grads, y))
        found.append(outputs)
    triton_gated_activation.backward(streams, calls[0][3])
    return found


class GatedActivation(torch.autograd.Function):
    """Autograd of `fxopt::gated_activation`; saves gate and up, never the activation."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str, packing: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.packing = activation, packing
        return below_autograd(gated_activation, gate, up, activation, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        gate, up = ctx.saved_tensors
        dgate, dup, _ = gated_activation_backward(
            grad, gate, up, ctx.activation, ctx.packing, False
        )
        needs_gate, needs_up = ctx.needs_input_grad[:2]
        return dgate if needs_gate else None, dup if needs_up else None, None, None


def _is_elementwise(arguments: Arguments) -> bool:
    """Whether features stand alone: a shard of packed halves is not two halves."""
    return arguments["packing"] == "none"


gated_activation = register(
    "gated_activation(Tensor gate, Tensor? up, str activation, str packing) -> Tensor",
    native=native,
    fake=output,
    triton=triton_forward,
    function=GatedActivation,
    sharding=rows("gate", "up", outputs=[None], is_elementwise=_is_elementwise),
    reference=reference,
)
gated_activation_backward = register(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor? up, str activation, str packing,"
    " bool recompute) -> (Tensor dgate, Tensor dup, Tensor y)",
    native=native_backward,
    fake=outputs_backward,
    triton=triton_backward,
    sharding=rows("gate", "up", "grad", outputs=[None] * 3, is_elementwise=_is_elementwise),
)
