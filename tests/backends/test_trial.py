"""The trial finds graphs that are not the module, and leaves no trace of having run either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxopt.backends import trial
from fxopt.backends.calls import Call
from tests.backends.toys import CHANNELS, stack, tokens


@pytest.fixture
def module() -> nn.Module:
    return stack(num_blocks=1).blocks[0]


def verdict(module: nn.Module, graph: Callable, *inputs: Tensor) -> str | None:
    call = Call.of(inputs, {})
    with trial.aside():
        return trial.compare(module, module.forward, graph, call, [True] * len(inputs))


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


FAULTS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "scaled": lambda m, x: m(x) * 1.001,
    "shifted": lambda m, x: m(x) + 1e-2,
    "another dtype": lambda m, x: m(x).double(),
    "another shape": lambda m, x: m(x)[None],
    "another number of outputs": lambda m, x: (m(x), x),
    "nothing": lambda m, x: None,
    "one element": lambda m, x: m(x).index_fill(0, torch.tensor([0]), 0.0),
    "nan": lambda m, x: m(x) * torch.nan,
    "detached": lambda m, x: m(x).detach(),
    "input detached": lambda m, x: m(x.detach()),
    "backward negated": lambda m, x: Negated.apply(m(x)),
    "gradient of one weight lost": lambda m, x: (
        m(x) + (m.up.weight.detach() - m.up.weight).sum() * m.up.weight.detach().sum()
    ),
    "input written": lambda m, x: m(x.add_(1) - 1),
    "fails": lambda m, x: m(x[..., :3]),
}


class CrossAttention(nn.Module):
    """Its scores are large, and the gradient of the keys' bias is rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        with torch.no_grad():
            self.q.weight.mul_(8)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.heads(x, context)
        return (q @ k.mT / 4).softmax(-1) @ v

    def fused(self, x: Tensor, context: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x, context))

    def heads(self, x: Tensor, context: Tensor) -> list[Tensor]:
        of = (self.q, x), (self.k, context), (self.v, context)
        return [f(t).unflatten(-1, (2, 16)).transpose(1, 2) for f, t in of]


def test_a_gradient_that_is_rounding_may_be_another() -> None:
    torch.manual_seed(0)
    module = CrossAttention().bfloat16()
    inputs = tokens(4, 64, torch.bfloat16), tokens(4, 8, torch.bfloat16)
    assert verdict(module, module.fused, *inputs) is None

    def with_another_gradient(x: Tensor, context: Tensor) -> Tensor:
        return module.fused(x, context) - 0.1 * (module.q.weight - module.q.weight.detach()).sum()

    assert verdict(module, with_another_gradient, *inputs)


class Edge(torch.autograd.Function):
    """Its gradient is Inf unless its input is 1 exactly, as of half precision at its end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = torch.where(x == 1, 1.0, torch.inf)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.factor


def test_rounding_that_overflows_hides_no_fault() -> None:
    class Overflows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Edge.apply(x)

    module = Overflows()
    assert verdict(module, module.forward, torch.ones(4)) is None
    assert verdict(module, lambda x: -Edge.apply(x) + 2 * x.detach(), torch.ones(4))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(module: nn.Module, name: str) -> None:
    why_not = verdict(module, lambda x: FAULTS[name](module, x), tokens())
    assert why_not is not None
    assert why_not.startswith("the graph")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_is_no_fault(module: nn.Module, dtype: torch.dtype) -> None:
    module.to(dtype)
    x = tokens(dtype=dtype)
    assert verdict(module, module.forward, x) is None
    assert verdict(module, module.forward, x.expand(2, 6, CHANNELS).transpose(0, 1)) is None
    # Rounded elsewhere, as a fused kernel does.
    assert verdict(module, lambda x: module(x * 3 / 3), x) is None


def test_dropout_draws_the_same(module: nn.Module) -> None:
    module.dropout.p = 0.5
    assert verdict(module, module.forward, tokens()) is None


def test_nothing_remains(module: nn.Module) -> None:
    module.register_buffer("count", torch.zeros(()))
    x = tokens().requires_grad_()
    values = x.detach().clone()
    seen: list[Tensor] = []
    module.up.weight.register_hook(seen.append)

    def counting(x: Tensor) -> Tensor:
        module.count.add_(1)
        return module(x)

    state = torch.random.get_rng_state()
    call = Call.of((x,), {})
    with trial.aside():
        assert trial.compare(module, counting, counting, call, [True]) is None
    assert module.count == 0
    assert x.grad is None
    assert torch.equal(x, values)
    assert all(p.grad is None for p in module.parameters())
    assert not seen
    assert torch.equal(torch.random.get_rng_state(), state)


def test_buffers_that_only_one_of_them_writes(module: nn.Module) -> None:
    module.register_buffer("count", torch.zeros(()))

    def counting(x: Tensor) -> Tensor:
        module.count.add_(1)
        return module(x)

    assert verdict(module, counting, tokens()) == "the graph gives another result than the module"


def test_a_backward_within_a_checkpoint_recomputes_nothing(module: nn.Module) -> None:
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        assert verdict(module, module.forward, x.detach()) is None
        return module(x)

    out = checkpoint(forward, tokens().requires_grad_(), use_reentrant=False)
    assert calls == [1]
    out.sum().backward()
    assert calls == [1, 1]


def test_autocast_keeps_no_weight_of_the_trial(module: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), trial.aside():
            call = Call.of((tokens(),), {})
            assert trial.compare(module, module.forward, module.forward, call, [True]) is None
        assert torch.is_autocast_cache_enabled()
        module(tokens()).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_generators_of_devices_are_left_alone(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those of the current device are put back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    assert verdict(module, module.forward, tokens()) is None
