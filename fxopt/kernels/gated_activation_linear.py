"""An activation and the linear on it, as one autograd node for one or more streams.

The activations of the streams, text and image say, are one launch each way. What an activation
makes is not kept: see `fxopt.kernels.linears`.

Shapes: T tokens (all leading dims), N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.gated_activation_streams import launch, launch_backward
from fxopt.kernels.linears import flat, without_autocast
from fxopt.kernels.registration import register_composite
from fxopt.kernels.saving import packed, unpacked


class GatedActivationLinear(torch.autograd.Function):
    """For each stream [beside | act(gate) * up] -> linear: only what that is made of is kept."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[str, str], *tensors: Tensor | None) -> Any:
        """`tensors` are gate, up, beside, gate_bias, weight and bias of each stream."""
        streams = _grouped(tensors, 6)
        ys = launch([(gate, up, *settings, bias) for gate, up, _, bias, *_ in streams])
        trains = [any(needed) for needed in _grouped(ctx.needs_input_grad[1:], 6)]
        activations = [
            t if trains[i] else None for i, stream in enumerate(streams) for t in stream[:2]
        ]
        others = [t for stream in streams for t in stream[2:5]]
        ctx.save_for_backward(*packed(ctx, activations), *others)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        outs = tuple(
            _product(y, beside, weight, bias)
            for y, (_, _, beside, _, weight, bias) in zip(ys, streams, strict=True)
        )
        ctx.mark_non_differentiable(*(out for i, out in enumerate(outs) if not trains[i]))
        return outs

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved, needs = unpacked(ctx, ctx.saved_tensors), _grouped(ctx.needs_input_grad[1:], 6)
        activations, others = _grouped(saved[: 2 * len(needs)], 2), saved[2 * len(needs) :]
        streams = [[*a, *o] for a, o in zip(activations, _grouped(others, 3), strict=True)]
        d_inputs: list[Any] = [
            None if g is None else (flat(g) @ weight).view(*gate.shape[:-1], weight.shape[1])
            for g, (gate, *_, weight) in zip(grads, streams, strict=True)
        ]
        calls = [
            (d[..., _width(beside) :], gate, up, *ctx.settings, needed[4], bias, needed[3])
            for d, (gate, up, beside, bias, _), needed in zip(d_inputs, streams, needs, strict=True)
            if d is not None
        ]
        found = iter(launch_backward(calls))
        results: list[Tensor | None] = []
        for grad, d_input, (_, _, beside, _, weight), needed in zip(
            grads, d_inputs, streams, needs, strict=True
        ):
            if grad is None:
                results += [None] * 6
                continue
            dgate, dup, y, dgate_bias = next(found)
            each = (
                dgate,
                dup,
                d_input[..., : _width(beside)],
                dgate_bias,
                _weight_gradient(flat(grad), y, beside, weight) if needed[4] else None,
                flat(grad).sum(0) if needed[5] else None,
            )
            results += [t if need else None for t, need in zip(each, needed, strict=True)]
        return None, *results


def _grouped(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _width(beside: Tensor | None) -> int:
    return 0 if beside is None else beside.shape[-1]


def _product(y: Tensor, beside: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear on [beside | y]."""
    if beside is None:
        return F.linear(y, weight, bias)
    # Two products into one output instead of a copy of both operands into one input. The first
    # writes where it is told: a checkpoint may keep what a product returns, as it was.
    width = beside.shape[-1]
    out = y.new_empty(*y.shape[:-1], weight.shape[0])
    out_TN, first = flat(out), (flat(beside), weight[:, :width].t())
    if bias is None:
        torch.mm(*first, out=out_TN)
    else:
        torch.addmm(bias, *first, out=out_TN)
    out_TN.addmm_(flat(y), weight[:, width:].t())
    return out


def _weight_gradient(grad_TN: Tensor, y: Tensor, beside: Tensor | None, weight: Tensor) -> Tensor:
    dweight, width = torch.empty_like(weight), _width(beside)
    torch.mm(grad_TN.t(), flat(y), out=dweight[:, width:])
    if beside is not None:
        torch.mm(grad_TN.t(), flat(beside), out=dweight[:, :width])
    return dweight


def _gated_activation_linear(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    packing: str,
    beside: Tensor | None,
    gate_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    settings = (activation, packing)
    (out,) = GatedActivationLinear.apply(settings, gate, up, beside, gate_bias, weight, bias)
    return out


def _gated_activation_linear_streams(
    gates: Sequence[Tensor],
    ups: Sequence[Tensor | None],
    activation: str,
    packing: str,
    *others: Sequence[Tensor | None],
) -> list[Tensor]:
    tensors = (t for stream in zip(gates, ups, *others, strict=True) for t in stream)
    return list(GatedActivationLinear.apply((activation, packing), *tensors))


gated_activation_linear = register_composite(
    "gated_activation_linear(Tensor gate, Tensor? up, str activation, str packing, "
    "Tensor? beside, Tensor? gate_bias, Tensor weight, Tensor? bias) -> Tensor",
    _gated_activation_linear,
)
gated_activation_linear_streams = register_composite(
    "gated_activation_linear_streams(Tensor[] gate, Tensor?[] up, str activation, str packing, "
    "Tensor?[] beside, Tensor?[] gate_bias, Tensor[] weight, Tensor?[] bias) -> Tensor[]",
    _gated_activation_linear_streams,
)
