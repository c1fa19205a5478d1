"""Native providers called past the dispatcher: the same results, and never where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels import registration
from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.qk_norm_rope import qk_norm_rope
from fxopt.kernels.registration import (
    below_autograd,
    direct,
    each_directly,
    ops,
    without_autograd,
)

FP32 = torch.float32


class Ops(TorchDispatchMode):
    """Keeps the names of all ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Does nothing."""


def normed(x: Tensor) -> tuple[Any, ...]:
    scale = torch.ones(2, 1, 8)
    return x, None, None, None, None, scale, scale + 1, None, "layer", 1e-6, 0.0, 1.0, FP32, FP32


def test_plain_tensors_on_a_cpu_go_past_the_dispatcher():
    args = normed(torch.randn(2, 3, 8))
    assert direct(norm_modulate, args) is registration.NATIVE[norm_modulate]
    assert direct(norm_modulate, normed(torch.nn.Parameter(args[0]))) is not None


@pytest.mark.parametrize(
    "within", [Ops, Functions, lambda: profile(activities=[ProfilerActivity.CPU])]
)
def test_modes_and_profiles_see_the_op(within: Callable[[], AbstractContextManager[Any]]):
    args = normed(torch.randn(2, 3, 8))
    expected = below_autograd(norm_modulate, *args)
    with within():
        assert direct(norm_modulate, args) is None
        assert each_directly(norm_modulate, [args]) is None
        found = below_autograd(norm_modulate, *args)
    assert all(map(torch.equal, expected, found))


def test_a_dispatch_mode_sees_ops_of_nodes_each_way():
    with Ops() as ops:
        x = torch.randn(2, 3, 8, requires_grad=True)
        gated_activation(x, None, "silu", "none").sum().backward()
    assert "fxopt::gated_activation" in ops.names
    assert "fxopt::gated_activation_backward" in ops.names


def test_a_profile_names_the_op():
    x = torch.randn(2, 3, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        gated_activation(x, None, "silu", "none").sum().backward()
    names = {event.key for event in found.key_averages()}
    assert {"fxopt::gated_activation", "fxopt::gated_activation_backward"} <= names


def test_transforms_see_the_op():
    asked = []

    def function(x: Tensor) -> Tensor:
        asked.append(direct(norm_modulate, normed(x)))
        return x.sum()

    x = torch.randn(4, 2, 3, 8)
    torch.func.vmap(function)(x)
    torch.func.grad(function)(x[0])
    torch.func.functionalize(function)(x[0])
    assert asked == [None] * 3


def test_traces_see_the_op():
    asked = []

    def function(x: Tensor) -> Tensor:
        asked.append(direct(norm_modulate, normed(x)))
        return x * 2

    torch.jit.trace(function, torch.randn(2, 3, 8), check_trace=False)
    make_fx(function)(torch.randn(2, 3, 8))
    make_fx(function, tracing_mode="fake")(torch.randn(2, 3, 8))
    assert asked == [None] * 3


def test_an_op_is_called_as_a_function_where_nothing_comes_between(
    monkeypatch: pytest.MonkeyPatch,
):
    names = ["norm_modulate", "qk_norm_rope", "gated_activation_linear", "linears"]
    assert not set(names) - set(vars(ops))
    x = torch.randn(2, 3, 8)
    args = x, None, "silu", "none", None, None, torch.randn(4, 8), None
    expected = torch.ops.fxopt.gated_activation_linear(*args)
    asked = list[Any]()
    monkeypatch.setattr(registration, "_are_only_handed_on", lambda args: asked.append(args))
    with Ops() as seen:
        ops.gated_activation_linear(*args)
    assert asked[0] == args
    assert "fxopt::gated_activation" in seen.names
    monkeypatch.setattr(registration, "_are_only_handed_on", lambda args: True)
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)
    assert torch.equal(ops.gated_activation_linear(*args), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.as_subclass(Subclass),
        lambda x: x.to("meta"),
        lambda x: torch._subclasses.FakeTensorMode().from_tensor(x),
    ],
    ids=["subclass", "device", "fake"],
)
def test_other_tensors_are_dispatched(change: Callable[[Tensor], Tensor]):
    args = normed(torch.randn(2, 3, 8))
    assert direct(norm_modulate, (change(args[0]), *args[1:])) is None
    assert direct(norm_modulate, (*args[:5], change(args[5]), *args[6:])) is None
    assert direct(qk_norm_rope, ([args[0], change(args[0])],)) is None


def test_a_symbolic_number_is_dispatched():
    env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    assert direct(norm_modulate, (torch.randn(2), 3)) is not None
    assert direct(norm_modulate, (torch.randn(2), env.create_unbacked_symint())) is None


def norms(tensors: list[Tensor]) -> list[Tensor]:
    x, other, weight = tensors
    none, settings = [None, None], ("layer", [1e-6, 1e-5], [0.0] * 2, [1.0] * 2, FP32, FP32)
    scales = [x[:, :1], other[:, :1]]
    given = [x, other], none, none, none, none, scales, none, none, *settings
    outs, hs = ops.norm_modulate_linears_streams(
        *given, [weight, weight], none, [1, 1], [0, 0, 8, 0, 0, 8], [1, 1]
    )
    return [*outs, *hs]


def activations(tensors: list[Tensor]) -> list[Tensor]:
    x, other, weight = tensors
    none, biases = [None, None], [weight[0], weight[1]]
    gates = [x, other]
    return list(
        ops.gated_activation_linear_streams(
            gates, none, "gelu_tanh", "none", none, biases, [weight, weight], none
        )
    )


def rotations(tensors: list[Tensor]) -> list[Tensor]:
    x, other, weight = tensors
    cos, sin = torch.rand(2, 3, 1, 2).repeat_interleave(2, -1).unbind()
    heads, none = [t.unflatten(-1, (2, 4)) for t in (x, other)], [None, None]
    fields = heads, [weight[0], None], [weight[1, :4], None], none, [cos, cos], [sin, sin]
    outs = ops.qk_norm_rope(
        *fields, [1, 1], "rms", [1e-6, 1e-6], 0.0, False, "interleaved", "channels", "all", FP32
    )
    return outs[:2]


@pytest.mark.parametrize("run", [norms, activations, rotations])
def test_both_ways_give_the_same_bits(
    run: Callable[[list[Tensor]], list[Tensor]], monkeypatch: pytest.MonkeyPatch
):
    def found() -> list[Tensor]:
        torch.manual_seed(0)
        tensors = [torch.randn(s, requires_grad=True) for s in ((2, 3, 8), (2, 3, 8), (8, 8))]
        outs = run(tensors)
        grads = torch.autograd.grad(outs, tensors, [torch.randn_like(out) for out in outs])
        return [*outs, *grads]

    directly = found()
    monkeypatch.setattr(registration, "_are_only_handed_on", lambda args: False)
    assert all(map(torch.equal, directly, found()))


def test_what_an_op_returns_without_autograd_has_no_history():
    x = torch.randn(2, 3, 8, requires_grad=True)
    backward = torch.ops.fxopt.gated_activation_backward.default
    found = without_autograd(backward, x.detach(), x, None, "silu", "none", True)
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("grad", [False, True])
def test_a_tangent_is_refused_and_not_dropped(grad: bool):
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(2, 8), torch.ones(2, 8))
        with pytest.raises(NotImplementedError, match="jvp"):
            gated_activation(x, None, "silu", "none")
