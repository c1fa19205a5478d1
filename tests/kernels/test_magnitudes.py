"""Magnitudes of gradients that the node before leaves: the bits of a pass that finds them, or that
pass itself wherever anything came between."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxopt.kernels import norm_modulate_linears as norm_modulate_linears  # defines its op
from fxopt.kernels import quantized_linears as quantizing
from fxopt.kernels.gated_activation_quantized_linear import gated_activation_quantized_linear
from fxopt.kernels.magnitudes import Inbox
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_quantized_linears import (
    norm_modulate_quantized_linears,
    norm_modulate_quantized_linears_streams,
)
from fxopt.kernels.qk_norm_rope import qk_norm_rope
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.recipes import RECIPES
from fxopt.schedule import at_step
from tests.kernels.interpreted import TRITON, Interpreted
from tests.kernels.test_norm_modulate_quantized_linears import leaf

B, S, K = 2, 37, 64  # rows of two tiles
RECIPE = RECIPES["fp8_tensorwise"].key
DELAYED = replace(RECIPES["fp8_tensorwise"], name="delayed", history=2).key
BF16 = torch.bfloat16
SETTINGS = 1e-6, 0.0, 1.0, BF16, BF16
Between = Callable[[Tensor], Tensor]
Model = Callable[..., Sequence[Tensor]]


def same(y: Tensor) -> Tensor:
    return y


def inputs(*shape: int) -> list[Tensor]:
    """x, a weight and a bias."""
    return [leaf(0, B, S, K), leaf(1, *shape), leaf(2, shape[0])]


def projected(leaves: Sequence[Tensor], recipe: str) -> Tensor:
    x, weight, bias = leaves[:3]
    return quantized_linears(x, [weight], [bias], recipe, False)[0]


def gated(leaves: list[Tensor], recipe: str = RECIPE, between: Between = same) -> Sequence[Tensor]:
    """A linear, and the gated residual and norm behind it."""
    if not leaves:
        leaves += [*inputs(K, K), leaf(3, B, S, K), leaf(4, B, 1, K), leaf(5, B, 1, K)]
    residual, gate, scale = leaves[3:]
    y = between(projected(leaves, recipe))
    residual = residual[:, : y.shape[1]]
    modulation = None, None, scale, None, None
    return norm_modulate(y, residual, gate, *modulation, "layer", *SETTINGS)[:2]


def added(leaves: list[Tensor], recipe: str = RECIPE, between: Between = same) -> Sequence[Tensor]:
    """The same without a gate: the gradient is also that of the residual."""
    if not leaves:
        leaves += [*inputs(K, K), leaf(3, B, S, K), leaf(4, K)]
    residual, weight = leaves[3:]
    operands = between(projected(leaves, recipe)), residual, None, weight, *[None] * 4
    return norm_modulate(*operands, "rms", *SETTINGS)[:2]


def mlp(leaves: list[Tensor], recipe: str = RECIPE, between: Between = same) -> Sequence[Tensor]:
    """norm, linear, activation, linear, norm."""
    if not leaves:
        leaves += [*inputs(96, K), leaf(3, K, 96), leaf(4, K), leaf(5, B, S, K), leaf(6, B, 1, K)]
    x, weight, bias, last, last_bias, residual, gate = leaves
    operands = x, *[None] * 7, "layer", *SETTINGS
    (y,), _ = norm_modulate_quantized_linears(*operands, [weight], [bias], recipe)
    packed = between(y), None, "gelu_tanh", "none", None
    z = gated_activation_quantized_linear(*packed, last, last_bias, recipe)
    operands = z, residual, gate, *[None] * 5
    outs, h = norm_modulate_quantized_linears(*operands, "rms", *SETTINGS, [weight], [None], recipe)
    return *outs, h


def swiglu(
    leaves: list[Tensor], recipe: str = RECIPE, between: Between = same, packing: str = "none"
) -> Sequence[Tensor]:
    """Both halves of a gated activation, from two linears or from one."""
    if not leaves:
        leaves += [*inputs(96, K), leaf(3, K, 96 if packing == "none" else 48)]
        leaves += [leaf(4, 96, K)] * (packing == "none")
    x, weight, bias, last, *of_up = leaves
    first, *second = quantized_linears(
        x, [weight, *of_up], [bias, *(None for _ in of_up)], recipe, False
    )
    given = between(first), second[0] if second else None, "silu", packing, None, last, None, recipe
    return (gated_activation_quantized_linear(*given),)


def heads(leaves: list[Tensor], recipe: str = RECIPE, between: Between = same) -> Sequence[Tensor]:
    """Queries, keys and values, the first two normed; values come from no op of ours."""
    if not leaves:
        leaves += [*inputs(K, K), leaf(3, K, K), leaf(4, K, K), leaf(5, 16), leaf(6, 16)]
    x, *weights = leaves[0], leaves[1], leaves[3], leaves[4]
    q, k, v = quantized_linears(x, weights, [leaves[2], None, None], recipe, False)
    q, k = (t.view(B, S, 4, 16) for t in (between(q), k))
    none = [None, None]
    tensors = [q, k], none, leaves[5:], none, none, none
    settings = [1, 1], "rms", [1e-6, 1e-6], 0.0, False, "none", "channels", "all", BF16
    return *qk_norm_rope(*tensors, *settings)[:2], v * 2


def streams(
    leaves: list[Tensor], recipe: str = RECIPE, between: Between = same
) -> Sequence[Tensor]:
    """Two streams as one node, gated by one node behind it."""
    if not leaves:
        leaves += [leaf(0, B, S, K), leaf(1, B, 5, K), leaf(2, K, K), leaf(3, K, K), leaf(4, K)]
        leaves += [leaf(5, B, S, K), leaf(6, B, 5, K), leaf(7, B, 1, K)]
    *xs, first, second, bias, image, text, gate = leaves
    none, numbers = [None, None], [[n, n] for n in SETTINGS[:3]]
    given = xs, *[none] * 7, "layer", *numbers, BF16, BF16, [first, second], [bias, None], [1, 1]
    outs, _ = norm_modulate_quantized_linears_streams(*given, recipe)
    operands = [between(outs[0]), outs[1]], [image, text], [gate, gate], *[none] * 5
    given = *operands, "none", *numbers, BF16, BF16, [], [], [0, 0], [], [0, 0]
    return torch.ops.fxopt.norm_modulate_linears_streams(*given)[1]


# And how many gradients are measured where they are made.
MODELS: dict[str, tuple[Model, int]] = {
    "gated": (gated, 1),
    "added": (added, 1),
    "mlp": (mlp, 2),
    "swiglu": (swiglu, 2),
    "swiglu packed": (partial(swiglu, packing="gate_up"), 1),
    "heads": (heads, 2),
    "streams": (streams, 2),
}


class Handed:
    """Counts what is handed on; or, if not `is_on`, has all of it measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_on: bool) -> None:
        self.count, take = 0, Inbox.take

        def counted(inbox: Inbox, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
            found = take(inbox, grads)
            self.count += sum(amax is not None for amax in found)
            return found if is_on else [None] * len(found)

        monkeypatch.setattr(Inbox, "take", counted)


def gradients(run: Callable[[list[Tensor]], Sequence[Tensor]], num: int = 1) -> list[Tensor]:
    """Of all leaves, after `num` backwards."""
    leaves: list[Tensor] = []
    outs = run(leaves)
    grads = [leaf(20 + i, *out.shape).detach() for i, out in enumerate(outs)]
    for i in range(num):
        torch.autograd.backward(outs, grads, retain_graph=i + 1 < num)
    assert all(t.grad is not None for t in leaves)
    return [t.grad for t in leaves if t.grad is not None]


def handed(
    run: Callable[[list[Tensor]], Sequence[Tensor]], interprets: bool = False, num: int = 1
) -> int:
    """How many magnitudes are handed on; the gradients are those without, bit for bit."""
    found = []
    for is_on in (True, False):
        with pytest.MonkeyPatch.context() as patch, Interpreted(interprets):
            counted = Handed(patch, is_on)
            found.append((gradients(run, num), counted.count))
    (grads, count), (expected, _) = found
    for grad, other in zip(grads, expected, strict=True):
        assert torch.equal(grad.view(torch.int16), other.view(torch.int16))
    return count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_gradients_are_the_same(provider: str, name: str) -> None:
    model, count = MODELS[name]
    assert handed(model, provider == "triton") == count


def test_a_second_backward() -> None:
    assert handed(gated, num=2) == 2


@pytest.mark.parametrize(
    "provider, value",
    [("native", math.nan), ("native", math.inf), ("native", 0.0), ("triton", math.inf)],
)
def test_special_values(provider: str, value: float) -> None:
    def filled(leaves: list[Tensor]) -> Sequence[Tensor]:
        if not leaves:
            gated(leaves)
            with torch.no_grad():
                leaves[4].fill_(value)
        return gated(leaves)

    assert handed(filled, provider == "triton") == 1


class Passed(torch.autograd.Function):
    """Writes to what it is given in a way that PyTorch does not count, and hands that on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad.data.mul_(3)
        return grad


def hooked(y: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
    y.register_hook(hook)
    return y


def tripled(grad: Tensor) -> None:
    grad.mul_(3)


BETWEEN: dict[str, Between] = {
    "replaced by a hook": lambda y: hooked(y, lambda grad: grad * 3),
    "written by a hook": lambda y: hooked(y, tripled),
    "a slice": lambda y: y[:, 3:],
    "another node": Passed.apply,
    "a copy": lambda y: y.float().to(BF16),
    "transposed": lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_comes_between_is_measured(name: str) -> None:
    assert handed(partial(gated, between=BETWEEN[name])) == 0


@pytest.mark.parametrize("comes_first", [False, True])
def test_a_sum_is_measured(comes_first: bool) -> None:
    def run(leaves: list[Tensor]) -> Sequence[Tensor]:
        others: list[Tensor] = []

        def used_again(y: Tensor) -> Tensor:
            others.append(y * 3 if comes_first else y)
            return y

        outs = gated(leaves, between=used_again)
        return [*outs, others[0] if comes_first else others[0] * 3]

    assert handed(run) == 0


def test_a_view_is_handed_on() -> None:
    def seen(y: Tensor) -> Tensor:
        return hooked(y.view(B * S, K).unsqueeze(0), lambda grad: None).view(B, S, K)

    assert handed(partial(gated, between=seen)) == 1


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8", DELAYED])
def test_other_scales_want_no_magnitude(recipe: str) -> None:
    key = RECIPES[recipe].key if recipe in RECIPES else recipe
    with pytest.MonkeyPatch.context() as patch, at_step(0):
        counted = Handed(patch, True)
        gradients(partial(gated, recipe=key))
        assert counted.count == 0


def test_a_backward_that_fails_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[weakref.ref[Any]] = []

    def fail(ctx: Any, *_: Any) -> None:
        contexts.append(weakref.ref(ctx))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(quantizing, "gradients", fail)
    gc.collect()
    gc.disable()  # who tries again with less needs the memory at once
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            gradients(gated)
        assert [ref() for ref in contexts] == [None]
    finally:
        gc.enable()


BACKWARDS: dict[str, tuple[Model, tuple[str, ...]]] = {
    "gated": (gated, ("norm_modulate_backward_packed",)),
    "mlp": (mlp, ("norm_modulate_backward_packed", "gated_activation_quantize_backward_counting")),
    "heads": (heads, ("qk_norm_rope_backward_packed",)),
    "streams": (streams, ("norm_modulate_streams_backward_packed",)),
}


class Recorded(TorchDispatchMode):
    """The ops that leave magnitudes, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.removeprefix("fxopt::")
        if any(name in names for _, names in BACKWARDS.values()):
            self.calls[name] = op, tree_map_only(Tensor, torch.clone, args)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BACKWARDS)
def test_ops_leave_the_magnitudes_of_what_they_write(name: str) -> None:
    model, names = BACKWARDS[name]
    with Recorded() as mode:
        gradients(model)
    assert sorted(mode.calls) == sorted(names)
    for op, args in mode.calls.values():
        is_seen = [a.alias_info is not None for a in op._schema.arguments]
        for run in (op, TRITON[op]):
            own = tree_map_only(Tensor, torch.clone, args)
            found = [t.float().abs().max() for t in tree_leaves(run(*own)) if t.numel()]
            seen = [t for t in tree_leaves([*compress(own, is_seen)]) if t is not None]
            assert seen and all(t.view(torch.float32) in found for t in seen)
        # Its other checks multiply and compare outputs, which FP8 tensors cannot do. Gradients of
        # queries and keys are one buffer by some providers.
        checks = ("test_autograd_registration", *["test_faketensor"] * (name != "heads"))
        torch.library.opcheck(op, args, test_utils=checks)
