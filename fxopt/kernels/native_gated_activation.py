"""Native provider of `fxopt::gated_activation`: a loop, or ATen, block by block on a CPU.

Shape legend: N rows (all leading dims), F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxopt.kernels import cpp_gated_activation as loops
from fxopt.kernels import saving
from fxopt.kernels.registration import opmath_of

aten = torch.ops.aten

# Elements per core of one step of the native provider: its fp32 temporaries stay in caches. Of a
# quarter as many the calls take longer, of four times as many the temporaries go through memory.
BLOCK = 1 << 18

# gelu_tanh(x) = x * sigmoid(x * q), where q = GELU_LINEAR + GELU_CUBIC * x**2.
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


def native(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    gate_bias: Tensor | None = None,
) -> Tensor:
    require_one(up, gate_bias)
    if loops.applies(activation, packing, gate, up, gate_bias):
        y = output(gate, up, activation, packing, gate_bias)
        loops.forward(*halves(gate, up, packing), gate_bias, activation, y)
        return y
    if _takes_bias(gate, gate_bias, activation, packing):
        return _gelu_tanh(gate, gate_bias)
    if gate_bias is not None:
        y = native(_biased(gate, gate_bias), None, activation, packing)
        return y.to(gate.dtype)
    gate, up = halves(gate, up, packing)
    value = _ACTIVATIONS[activation].forward(gate)
    return (value if up is None else value * up).contiguous()


def native_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    recompute: bool,
    gate_bias: Tensor | None = None,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_one(up, gate_bias)
    args = activation, packing, recompute
    if loops.applies(activation, packing, gate, up, gate_bias, grad):
        outputs = outputs_backward(grad, gate, up, *args, gate_bias, needs_bias)
        inputs, grads, y = split_backward(gate, up, packing, outputs, recompute)
        dbias = outputs[3] if needs_bias else None
        loops.backward((grad, *inputs), gate_bias, activation, grads, y, dbias)
        return outputs
    if _takes_bias(gate, gate_bias, activation, packing):
        dgate, dup, value, dbias = outputs_backward(grad, gate, None, *args)
        _gelu_tanh_backward(grad, gate, dgate, value if recompute else None, gate_bias)
        if needs_bias:
            dbias = dgate.reshape(-1, dgate.shape[-1]).sum(0)
        return dgate, dup, value, dbias
    if gate_bias is not None:
        x = _biased(gate, gate_bias)
        dgate, dup, value, dbias = native_backward(grad.to(x.dtype), x, None, *args)
        if needs_bias:
            dbias = dgate.sum_to_size(gate_bias.shape).to(gate_bias.dtype)
        return dgate.to(gate.dtype), dup.to(gate.dtype), value.to(gate.dtype), dbias
    outputs = outputs_backward(grad, gate, up, *args)
    (x, u), (dx, du), y = split_backward(gate, up, packing, outputs, recompute)
    backward = _ACTIVATIONS[activation].backward
    if u is None:
        backward(grad, x, dx, y)
    else:
        assert du is not None
        value = du if y is None else y
        backward(torch.mul(grad, u, out=dx), x, dx, value)
        torch.mul(grad, value, out=du)
        if y is not None:
            y.mul_(u)
    return outputs


def _takes_bias(gate: Tensor, bias: Tensor | None, activation: str, packing: str) -> bool:
    """Whether the bias can be added block by block: where no sum is rounded."""
    if bias is None or activation != "gelu_tanh" or packing != "none":
        return False
    return gate.dtype == bias.dtype == opmath_of(gate)


def _biased(gate: Tensor, bias: Tensor) -> Tensor:
    opmath = opmath_of(gate)
    return gate.to(opmath) + bias.to(opmath)


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


# Not by aten.gelu, whose tanh takes four times as long as aten.sigmoid (torch 2.13, fp32, x86), nor
# by aten.tanh, which takes six times as long where MKL does not run its kernels for Intel.
def _gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    is_opmath = x.dtype == opmath_of(x)
    linear = x.new_full((), GELU_LINEAR, dtype=opmath_of(x))
    own_x, own_cdf = bias is not None or not is_opmath, not is_opmath
    for x_block, y_block, scratch in _blocks(x, y, scratch=(own_x, own_cdf)):
        x_opmath, cdf = scratch[0], y_block if is_opmath else scratch[1]
        if bias is not None:
            x = torch.add(x_block, bias, out=x_opmath)
        else:
            x = x_block if is_opmath else x_opmath.copy_(x_block)
        torch.addcmul(linear, x, x, value=GELU_CUBIC, out=cdf).mul_(x).sigmoid_()
        _mul_rounded(cdf, x, y_block)
    return y


def _gelu_tanh_backward(
    grad: Tensor, x: Tensor, dx: Tensor, y: Tensor | None, bias: Tensor | None = None
) -> None:
    is_opmath = x.dtype == opmath_of(x)
    linear = x.new_full((), GELU_LINEAR, dtype=opmath_of(x))
    slope_linear = -2 * linear
    own_x, own_grad = bias is not None or not is_opmath, not is_opmath
    own_cdf, own_tail = y is None or not _is_room(y), dx is grad or not _is_room(dx)
    own = own_x, own_grad, own_cdf, own_tail, True
    for grad_block, x_block, dx_block, y_block, scratch in _blocks(grad, x, dx, y, scratch=own):
        x_opmath, grad_opmath, cdf, tail, q = scratch
        cdf, tail = cdf if own_cdf else y_block, tail if own_tail else dx_block
        if bias is not None:
            x, grad = torch.add(x_block, bias, out=x_opmath), grad_block
        elif is_opmath:
            x, grad = x_block, grad_block
        else:
            x, grad = x_opmath.copy_(x_block), grad_opmath.copy_(grad_block)
        torch.addcmul(linear, x, x, value=GELU_CUBIC, out=q)
        torch.mul(x, q, out=cdf)
        torch.neg(cdf, out=tail).sigmoid_()  # 1 - cdf, which would lose bits
        cdf.sigmoid_()
        # f' = cdf + x cdf (1 - cdf) (xq)', where (xq)' = 3q - 2 GELU_LINEAR.
        tail.mul_(cdf).mul_(x)
        torch.add(slope_linear, q, alpha=3, out=q)
        torch.addcmul(cdf, tail, q, out=tail)
        if y_block is not None:
            _mul_rounded(cdf, x, y_block)
        _mul_rounded(tail, grad, dx_block)


def _is_room(out: Tensor) -> bool:
    """Whether what comes before an output can be written in its place: where nothing is rounded to
    it, and rows are not strided, of which ATen computes some functions by another code."""
    return out.dtype == opmath_of(out) and out.is_contiguous()


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


def halves(gate: Tensor, up: Tensor | None, packing: str) -> tuple[Tensor, Tensor | None]:
    """What is activated and what it is multiplied by, unpacked."""
    if packing == "none":
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if packing == "gate_up" else (second, first)


def packs_apart(
    gate: Tensor, up: Tensor | None, beside: Tensor | None, packing: str, rooms: Sequence[Any]
) -> bool:
    """Whether codes of gate and up are wanted and tiles of [beside | activation] are no blocks of
    these."""
    if all(room is None for room in rooms):
        return False
    starts = [0 if beside is None else beside.shape[-1]]
    starts += [gate.shape[-1] // 2] if packing != "none" else []
    return any(start % saving.BLOCK for start in starts)


def require_one(up: Tensor | None, gate_bias: Tensor | None) -> None:
    """Raise ValueError for a bias beside an `up` of its own."""
    if up is not None and gate_bias is not None:
        raise ValueError(
            "gated_activation takes gate_bias where gate is all it reads, but up is "
            f"{list(up.shape)}: add the biases of gate and up before it"
        )


def split_backward(
    gate: Tensor,
    up: Tensor | None,
    packing: str,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    recompute: bool,
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None], Tensor | None]:
    """(gate, up), (dgate, dup) and y, unpacked; None for those that there are not."""
    dgate, dup, y, _ = outputs
    return (
        halves(gate, up, packing),
        halves(dgate, None if up is None else dup, packing),
        y if recompute else None,
    )


def _blocks(*tensors: Tensor | None, scratch: Sequence[bool]) -> Iterator[tuple[Any, ...]]:
    """Blocks of rows of [..., F] tensors (None stays None), then opmath scratch of their shape,
    None where none is wanted."""
    like = cast(Tensor, tensors[0])
    num_features = max(like.shape[-1], 1)
    step = max(like.numel() // num_features, 1)
    if like.device.type == "cpu":
        step = min(step, max(BLOCK * torch.get_num_threads() // num_features, 1))
    opmath = opmath_of(like)
    rooms = [
        like.new_empty(step, num_features, dtype=opmath) if is_own else None for is_own in scratch
    ]
    blocks_NF = [
        repeat(None) if t is None else t.reshape(-1, num_features).unsafe_split(step)
        for t in tensors
    ]
    for blocks in zip(*blocks_NF, strict=False):
        num_rows = len(blocks[0])
        yield *blocks, [r if r is None or num_rows == step else r[:num_rows] for r in rooms]


def output(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Uninitialised y."""
    require_one(up, gate_bias)
    num_halves = 1 if packing == "none" else 2
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // num_halves)


def outputs_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    recompute: bool,
    gate_bias: Tensor | None = None,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dgate, dup, y and dbias; those that there are not have 0 elements."""
    require_one(up, gate_bias)
    dbias = gate.new_empty(0)
    if gate_bias is not None and needs_bias:
        dbias = torch.empty_like(gate_bias)
    return (
        gate.new_empty(gate.shape),
        gate.new_empty(0 if up is None else up.shape),
        gate.new_empty(grad.shape if recompute else 0),
        dbias,
    )
