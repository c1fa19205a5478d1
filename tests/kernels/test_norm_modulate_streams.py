"""norm_modulate_streams: what norm_modulate gives for each stream, in one launch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxopt.kernels import norm_modulate_streams as op_module
from fxopt.kernels.gated_activation_linear import gated_activation_linear
from fxopt.kernels.native_norm_modulate import backward, forward
from fxopt.kernels.norm_modulate_linears import (
    norm_modulate_linears,
    norm_modulate_linears_streams,
)
from fxopt.kernels.norm_modulate_streams import (
    norm_modulate_streams,
    norm_modulate_streams_backward,
)
from fxopt.kernels.registration import LAUNCHES
from tests.kernels.test_norm_modulate import EPS, operands

# Gate, affine, scale and shift of each stream, its shape, and whether x has a bias.
IMAGE = ("sample", (False, False), "sample", "sample", (2, 7, 24), True)
TEXT = ("sample", (False, False), "sample", "sample", (2, 3, 24), False)
PLAIN = ("no residual", (True, False), "token", "shared", (1, 5, 24), False)
EMPTY = ("sample", (False, False), "sample", "sample", (2, 0, 24), False)
STREAMS = {
    "two alike": (IMAGE, IMAGE),
    "image and text": (IMAGE, TEXT),
    "other operands": (IMAGE, PLAIN, TEXT),
    "one has no rows": (EMPTY, IMAGE),
}


def made(
    streams: tuple, norm: str, dtype: torch.dtype = torch.float32
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Calls of `norm_modulate` and of its backward, one of each per stream."""
    calls, back = [], []
    for i, (gate, affine, scale, shift, shape, biased) in enumerate(streams):
        if norm == "none":
            affine, scale, shift = (False, False), None, None
        inputs = operands(gate, affine, scale, shift, dtype, shape, biased)
        call = (*inputs, norm, EPS * (i + 1), 1.0, float(i), dtype, dtype)
        _, h, mean, rstd = forward(*call)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        grad_y = None if norm == "none" else grad
        grad_h = None if gate == "no residual" else grad.flip(1)
        saved = (inputs[0] if gate == "no residual" else h, inputs[0], *inputs[2:], mean, rstd)
        rest = (norm, 1.0, float(i), dtype, [True] * 8, norm != "none")
        calls.append(call)
        back.append((grad_y, grad_h, *saved, *rest))
    return calls, back


def joined(calls: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Arguments of `norm_modulate_streams`, from those of each call."""
    *tensors, norm, eps, weight_offset, scale_offset, h_dtype, dtype = zip(*calls, strict=True)
    numbers = map(list, (eps, weight_offset, scale_offset))
    return (*map(list, tensors), norm[0], *numbers, h_dtype[0], dtype[0])


def joined_backward(calls: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    *tensors, norm, weight_offset, scale_offset, dtype, needs, again = zip(*calls, strict=True)
    settings = (norm[0], list(weight_offset), list(scale_offset), dtype[0])
    return (*map(list, tensors), *settings, [n for need in needs for n in need], list(again))


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("name", STREAMS)
def test_native_is_that_of_each_stream(name: str, norm: str):
    streams = [s for s in STREAMS[name] if norm != "none" or s is not PLAIN]
    calls, back = made(streams, norm)
    expected = [t for call in calls for t in forward(*call)]
    torch.testing.assert_close(norm_modulate_streams(*joined(calls)), expected, rtol=0, atol=0)
    expected = [t for call in back for t in backward(*call)]
    found = norm_modulate_streams_backward(*joined_backward(back))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("name", STREAMS)
def test_triton_is_that_of_each_stream(name: str, norm: str):
    provider = pytest.importorskip("fxopt.kernels.triton_norm_modulate", reason="needs Triton")
    streams = [s for s in STREAMS[name] if norm != "none" or s is not PLAIN]
    calls, back = made(streams, norm)
    # The same kernel on the same rows. In the backward a stream has fewer programs than alone, so
    # the sums over rows associate otherwise: a few ulp of fp32.
    torch.testing.assert_close(
        provider.forward_of(calls), [provider.forward(*c) for c in calls], rtol=0, atol=0
    )
    torch.testing.assert_close(
        provider.backward_of(back), [provider.backward(*c) for c in back], rtol=1e-5, atol=1e-5
    )


def test_triton_launches_once_for_all(monkeypatch: pytest.MonkeyPatch):
    provider = pytest.importorskip("fxopt.kernels.triton_norm_modulate", reason="needs Triton")
    calls, back = made(STREAMS["image and text"], "layer")
    launched = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(grid)
            return self.kernel[grid]

    for module, name in (
        (provider.kernels, "forward_kernel"),
        (provider.kernels, "backward_kernel"),
        (provider.sums, "reduce_kernel"),
    ):
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    provider.forward_of(calls)
    assert len(launched) == 1
    provider.backward_of(back)
    count = LAUNCHES["fxopt::norm_modulate_streams_backward"]
    assert len(launched) == 1 + count(*joined_backward(back)) == 3


def test_streams_of_other_widths_are_refused():
    calls, back = made((IMAGE, (*IMAGE[:4], (2, 3, 8), False)), "layer")
    with pytest.raises(ValueError, match=r"one width, but theirs are \[24, 8\]"):
        norm_modulate_streams(*joined(calls))
    with pytest.raises(ValueError, match="call norm_modulate for each"):
        norm_modulate_streams_backward(*joined_backward(back))


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_opcheck(norm: str):
    calls, back = made((IMAGE, TEXT), norm)
    torch.library.opcheck(norm_modulate_streams, joined(calls))
    torch.library.opcheck(norm_modulate_streams_backward, joined_backward(back))


def with_linears(calls: list[tuple[Any, ...]], weights: list[Tensor]) -> tuple[Any, ...]:
    """Arguments of the composite: two linears on the first stream, none on the second."""
    return (*joined(calls), weights, [None] * 2, [2, 0], [0, 0, 24, 1, 0, 8, 1, 8, 24], [3, 0])


def test_a_norm_that_no_gradient_reaches_is_left_out():
    """What comes back for one stream launches nothing for the other."""
    calls, _ = made((IMAGE, TEXT), "layer", torch.float64)
    leaves = [[None if t is None else t.requires_grad_() for t in c[:8]] for c in calls]
    weights = [torch.randn(24, 24, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    outs, hs = norm_modulate_linears_streams(*with_linears(calls, weights))
    assert [tuple(out.shape) for out in outs] == [(2, 7, 24), (2, 7, 8), (2, 7, 16)]
    assert [tuple(h.shape) for h in hs] == [(2, 7, 24), (2, 3, 24)]
    with mock.patch.object(
        op_module, "norm_modulate_backward", wraps=op_module.norm_modulate_backward
    ) as alone:
        (hs[1] * 2).sum().backward()
    alone.assert_called_once()
    assert all(t.grad is None for t in (*leaves[0], *weights) if t is not None)
    x, residual, gate = leaves[1][:3]
    # fp64 against the derivative by hand.
    torch.testing.assert_close(residual.grad, torch.full_like(residual, 2.0))
    torch.testing.assert_close(x.grad, (2 * gate).expand_as(x))
    torch.testing.assert_close(gate.grad, 2 * x.detach().sum(1, keepdim=True))


def test_a_node_that_no_gradient_reaches_gives_none():
    """The norm before a stream that is dropped: autograd calls its node all the same."""
    calls, _ = made((IMAGE, TEXT), "layer", torch.float64)
    text, weight = calls[1][0].requires_grad_(), torch.randn(24, 24, dtype=torch.float64)
    weight.requires_grad_()
    settings = ("layer", EPS, 1.0, 1.0, torch.float64, torch.float64)
    (x,), _ = norm_modulate_linears(text, *[None] * 7, *settings, [weight], [None], [0, 0, 24])
    x = gated_activation_linear(x, None, "silu", "none", None, None, weight, None)
    calls[1] = (x, *calls[1][1:])
    calls[0][0].requires_grad_()
    outs, _ = norm_modulate_linears_streams(*with_linears(calls, [weight, weight]))
    grads = torch.autograd.grad(outs[0].sum(), [calls[0][0], text], allow_unused=True)
    assert grads[0] is not None and grads[1] is None


def test_nothing_is_kept_and_computed_for_a_stream_that_is_frozen():
    calls, _ = made((IMAGE, TEXT), "layer")
    calls[1][0].requires_grad_()
    weights, kept = [torch.randn(24, 24) for _ in range(2)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs, hs = norm_modulate_linears_streams(*with_linears(calls, weights))
    assert not any(t.requires_grad for t in (*outs, hs[0])) and hs[1].requires_grad
    assert not [t for t in kept if t.shape == calls[0][0].shape]
    with FlopCounterMode(display=False) as counter:
        sum(t.sum() for t in (*outs, *hs)).backward()
    assert counter.get_total_flops() == 0  # only the stream without linears trains
    assert calls[1][0].grad is not None


def test_an_output_has_a_gradient_if_something_in_it_is_trained():
    """Not because another output of the node has one."""
    x, weights = torch.randn(2, 3, 24), [torch.randn(24, 24) for _ in range(2)]
    bias, scale = torch.randn(24), torch.randn(2, 1, 24)
    settings = ("layer", EPS, 1.0, 1.0, torch.float32, torch.float32)

    def trained() -> list[bool]:
        operands = x, None, None, None, None, scale, None, None
        pieces = [0, 0, 8, 1, 0, 24, 0, 8, 24]
        outs, h = norm_modulate_linears(*operands, *settings, weights, [None, bias], pieces)
        return [t.requires_grad for t in (*outs, h)]

    assert trained() == [False] * 4
    for leaf, expected in (
        (weights[0], [True, False, True, False]),
        (bias, [False, True, False, False]),
        (scale, [True, True, True, False]),
        (x, [True] * 4),
    ):
        leaf.requires_grad_()
        assert trained() == expected
        leaf.requires_grad_(False)


def test_a_frozen_gate_keeps_no_branch():
    """The gradient of a bf16 branch beside an fp32 residual is bf16 all the same."""
    gate = torch.ones(2, 1, 24)
    x, residual = torch.randn(2, 3, 24).bfloat16(), torch.randn(2, 3, 24)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operands = (x.requires_grad_(), residual.requires_grad_(), gate, *[None] * 5)
        settings = ("none", 0.0, 0.0, 0.0, torch.float32, torch.float32)
        outs, h = norm_modulate_linears(*operands, *settings, [], [], [])
    assert not outs and not [t for t in kept if t.shape == x.shape]
    h.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, torch.ones_like(x))


def test_the_composite_under_a_tracer():
    calls, _ = made((IMAGE, TEXT), "layer")
    weights = [torch.randn(24, 24, requires_grad=True) for _ in range(2)]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = with_linears(calls, weights)
    torch.library.opcheck(norm_modulate_linears_streams, arguments, test_utils=checks)
