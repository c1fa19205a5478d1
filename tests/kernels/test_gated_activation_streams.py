"""gated_activation_streams: what gated_activation gives for each stream, in one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxopt.kernels import gated_activation as op
from fxopt.kernels.gated_activation_linear import gated_activation_linear_streams
from fxopt.kernels.gated_activation_streams import (
    gated_activation_streams,
    gated_activation_streams_backward,
)

SHAPES = ((2, 7, 24), (2, 3, 24), (0, 24))
PACKINGS = ("none", "up", "gate_up")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def made(form: str, activation: str = "gelu_tanh") -> tuple[list[Any], list[Any]]:
    """Calls of `gated_activation` and of its backward, one of each per stream.

    The first stream has a bias where there can be one.
    """
    packing = "none" if form == "up" else form
    calls, back = [], []
    for shape in SHAPES:
        gate = draw(*shape[:-1], 48 if form == "gate_up" else 24)
        up = draw(*shape).flip(-1) if form == "up" else None
        bias = draw(gate.shape[-1]) if form != "up" and not calls else None
        calls.append((gate, up, activation, packing, bias))
        settings = activation, packing, True, bias, bias is not None
        back.append((draw(*shape).neg(), gate, up, *settings))
    return calls, back


def joined(calls: list[Any]) -> tuple[Any, ...]:
    gates, ups, activation, packing, biases = zip(*calls, strict=True)
    return list(gates), list(ups), list(biases), activation[0], packing[0]


def joined_backward(calls: list[Any]) -> tuple[Any, ...]:
    *tensors, activation, packing, recompute, biases, needs = zip(*calls, strict=True)
    tensors = [*tensors, biases]
    return (*map(list, tensors), activation[0], packing[0], list(recompute), list(needs))


@pytest.mark.parametrize("provider", ["native", "triton"])
@pytest.mark.parametrize("form", PACKINGS)
def test_each_stream_is_as_alone(provider: str, form: str):
    calls, back = made(form)
    forward, backward = op.native, op.native_backward
    found, found_back = (
        gated_activation_streams(*joined(calls)),
        gated_activation_streams_backward(*joined_backward(back)),
    )
    if provider == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        forward, backward = op.triton_forward, op.triton_backward
        found = op.triton_forward_of(calls)
        found_back = [t for results in op.triton_backward_of(back) for t in results]
    # The same arithmetic on the same elements.
    expected = [forward(*call) for call in calls]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected = [t for call in back for t in backward(*call)]
    torch.testing.assert_close(found_back, expected, rtol=0, atol=0)


def test_streams_of_other_kinds_are_refused():
    for other in (draw(2, 8), draw(2, 24).half()):
        with pytest.raises(ValueError, match="call gated_activation for each"):
            gated_activation_streams([draw(2, 24), other], [None] * 2, [None] * 2, "silu", "none")


@pytest.mark.parametrize("form", PACKINGS)
def test_opcheck(form: str):
    calls, back = made(form)
    torch.library.opcheck(gated_activation_streams, joined(calls[:2]))
    torch.library.opcheck(gated_activation_streams_backward, joined_backward(back[:2]))


@pytest.mark.parametrize("which", [slice(None), slice(0, 1), slice(1, 2)])
def test_with_linears(which: slice):
    """fp64 against the plain composition: the same sums in another order."""
    gates = [draw(2, 5, 8, dtype=torch.float64), draw(2, 3, 8, dtype=torch.float64)]
    weights = [draw(4, 12, dtype=torch.float64), draw(4, 8, dtype=torch.float64)]
    beside, bias = draw(2, 5, 4, dtype=torch.float64), draw(4, dtype=torch.float64)
    gate_bias = draw(8, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*gates, *weights, beside, bias, gate_bias)]
    biases = [None, gate_bias], weights, [None, bias]
    found = gated_activation_linear_streams(
        gates, [None, None], "gelu_erf", "none", [beside, None], *biases
    )
    expected = [
        F.linear(torch.cat([beside, F.gelu(gates[0])], -1), weights[0]),
        F.linear(F.gelu(gates[1] + gate_bias), weights[1], bias),
    ]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (
        torch.autograd.grad(
            outs[which], leaves, [torch.ones_like(t) for t in outs[which]], allow_unused=True
        )
        for outs in (found, expected)
    )
    assert [g is None for g in grads] == [g is None for g in expected_grads]
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_nothing_is_computed_for_a_stream_that_is_frozen():
    gates, weights = [draw(2, 5, 8), draw(2, 3, 8).requires_grad_()], [draw(4, 8), draw(4, 8)]
    absent = [None, None]
    with FlopCounterMode(display=False) as counter:
        outs = gated_activation_linear_streams(
            gates, absent, "gelu_erf", "none", absent, absent, weights, absent
        )
        forward = counter.get_total_flops()
        assert [out.requires_grad for out in outs] == [False, True]
        (outs[0].sum() + outs[1].sum()).backward()
    assert counter.get_total_flops() - forward == 2 * 2 * 3 * 8 * 4
    assert gates[1].grad is not None
