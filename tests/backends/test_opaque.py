"""Autograd functions and custom ops inside a block: graphs hold them as a whole."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.backends import opaque
from tests.backends.toys import (
    Block,
    assert_like_eager,
    captures,
    counting_graph_runs,
    reasons,
    stack,
    tokens,
)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Scaled(torch.autograd.Function):
    """x * factor / size, and what it was scaled by; its backward is twice what it should be."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: float, size: int, unused: None
    ) -> tuple[Tensor, None, Tensor]:
        ctx.by = factor / size
        return x * ctx.by, None, x.new_full((1,), ctx.by)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        return 2 * ctx.by * grad, None, None, None


@torch.library.custom_op("fxopt_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, grad: -grad)


class Reverses(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        return Reversed.apply(super().forward(x_BSC))


class Scales(Block):
    factor = 3.0

    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC, _, by_1 = Scaled.apply(super().forward(x_BSC), self.factor, x_BSC.shape[1], None)
        return x_BSC + by_1


class CallsAnOp(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        return x_BSC + doubled(super().forward(x_BSC))


def opened(make: type[Block]) -> nn.Module:
    return fxopt.optimize(stack(make))


@pytest.mark.parametrize("make", [Reverses, Scales, CallsAnOp])
def test_a_function_keeps_its_backward(make: type[Block]) -> None:
    model, eager = opened(make), stack(make)
    with counting_graph_runs() as runs:
        assert_like_eager(model, eager)
        assert_like_eager(model, eager, {"x": tokens(3, 5)})
    assert runs
    assert not reasons(model)
    assert captures(model) == 1
    assert fxopt.report(model).count("norm_modulate") == 2


def test_numbers_are_constants_of_their_block() -> None:
    model, eager = opened(Scales), stack(Scales)
    for each in (model, eager):
        each.blocks[0].factor = 5.0
    assert_like_eager(model, eager)
    assert captures(model) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model, eager = opened(Reverses), stack(Reverses)
    with mode(), counting_graph_runs() as runs:
        torch.testing.assert_close(model(tokens()), eager(tokens()))
    assert runs


def test_in_a_checkpoint() -> None:
    gradients = []
    for model in (opened(Reverses), stack(Reverses)):
        x = tokens().requires_grad_()
        checkpoint(model, x, use_reentrant=False).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_a_call_is_one_op_however_often_it_is_captured() -> None:
    opened(Reverses)(tokens())
    num_ops = opaque._op.cache_info().currsize
    opened(Reverses)(tokens())
    assert opaque._op.cache_info().currsize == num_ops


def test_a_call_whose_op_is_forgotten_gets_another() -> None:
    opened(Reverses)(tokens())
    opaque._op.cache_clear()
    model = opened(Reverses)
    model(tokens())
    assert not reasons(model)


class Multiplied(torch.autograd.Function):
    dtypes: ClassVar[list[tuple[torch.dtype, torch.dtype]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x @ x.mT
        ctx.save_for_backward(x)
        Multiplied.dtypes.append((x.dtype, out.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad + grad.mT).to(x.dtype) @ x


class Multiplies(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = super().forward(x_BSC)
        return x_BSC + Multiplied.apply(x_BSC).mean(-1, keepdim=True)


def test_its_ops_are_cast_as_where_it_was_called() -> None:
    for model in (stack(Multiplies), opened(Multiplies)):
        Multiplied.dtypes.clear()
        for _ in range(2):  # the first is checked against the module's own forward
            with torch.autocast("cpu", torch.bfloat16):
                model(tokens()).sum().backward()
        assert set(Multiplied.dtypes) == {(torch.float32, torch.bfloat16)}
    assert not reasons(model)


class Object:
    pass


class GivenAnObject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Object) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ReturnsItsInput(Reversed):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


class Writes(Reversed):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)


class Counts(Reversed):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, int]:
        return x.clone(), 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
        return -grad


REFUSED = {
    "is given a Object": lambda x: GivenAnObject.apply(x, Object()),
    "returns its input": ReturnsItsInput.apply,
    "writes to its input": Writes.apply,
    "returns more than tensors": lambda x: Counts.apply(x)[0],
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_graph_cannot_hold(why: str) -> None:
    class Calls(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            return REFUSED[why](super().forward(x_BSC))

    model = opened(Calls)
    assert_like_eager(model, stack(Calls))
    (reason,) = reasons(model)
    assert reason.startswith("it calls ")
    assert reason.endswith(f".apply, which {why}")


class SometimesNone(torch.autograd.Function):
    has_second = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return x.clone(), 7 * x if SometimesNone.has_second else None, 3 * x

    @staticmethod
    def backward(ctx: Any, a: Tensor, _: Any, b: Tensor) -> Tensor:
        return a + 3 * b


def test_other_results_than_the_captured_ones_are_not_mistaken_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Calls(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            first, _, third = SometimesNone.apply(super().forward(x_BSC))
            return first + third

    model = opened(Calls)
    assert_like_eager(model, stack(Calls))
    monkeypatch.setattr(SometimesNone, "has_second", True)
    with pytest.raises(opaque.CannotHold, match="other things than when it was captured"):
        model(tokens())


class Closes(Block):
    """Its function reads a parameter that it is not given."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        weight_C = self.norm1.weight

        class TimesWeight(Reversed):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * weight_C

        return TimesWeight.apply(super().forward(x_BSC))


def test_a_function_that_reads_beside_its_arguments_is_left_alone() -> None:
    model = opened(Closes)
    assert_like_eager(model, stack(Closes))
    assert reasons(model) == [
        "the graph computes with a tensor that was there in its capture alone"
    ]
