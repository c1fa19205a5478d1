"""What a forward keeps of a call, beside its results, is kept as it was before the door."""

from __future__ import annotations

import functools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxopt
from fxopt.backends import left_behind
from tests.backends.toys import Block, captures, counting_graph_runs, reasons, stack, tokens

LOSSES: list[Tensor] = []
STATISTICS: dict[str, Tensor] = {}
WEIGHTS: dict[int, Tensor] = {}
BATCHES: list[list[Tensor]] = []
TABLES: dict[int, Tensor] = {}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    for kept in (LOSSES, STATISTICS, WEIGHTS, BATCHES, TABLES, KeepsInDeque.kept):
        kept.clear()


class KeepsLoss(Block):
    """As mixtures of experts keep the loss that balances them."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        LOSSES.append(self.up.weight.square().mean())
        return super().forward(x_BSC)


class KeepsConstant(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        LOSSES.append(x_BSC.detach().abs().mean())
        return super().forward(x_BSC)


class KeepsInDeque(Block):
    kept: ClassVar[deque[Tensor]] = deque()

    def forward(self, x_BSC: Tensor) -> Tensor:
        self.kept.append(x_BSC.mean())
        return super().forward(x_BSC)


class KeepsStatistic(Block):
    """It reads what the call before has left."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = super().forward(x_BSC)
        before = STATISTICS.get("mean", torch.zeros(()))
        STATISTICS["mean"] = 0.9 * before + 0.1 * x_BSC.detach().mean()
        return x_BSC


class KeepsWeight(Block):
    """As `parametrize.cached` does, for all calls in a context."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        if id(self) not in WEIGHTS:
            WEIGHTS[id(self)] = self.up.weight.tanh()
        return super().forward(x_BSC) + x_BSC @ WEIGHTS[id(self)].T @ self.down.weight.T


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class KeepsResultOfFunction(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        LOSSES.append(Doubled.apply(self.up.weight.mean()))
        return super().forward(x_BSC)


def train(model: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    """Losses and gradients of two steps, with all that was kept on the way."""
    found: list[Any] = []
    for batch in (2, 3):
        for kept in (LOSSES, WEIGHTS, KeepsInDeque.kept):
            kept.clear()
        model.zero_grad()
        y = (forward or model)(tokens(batch))
        losses = [*LOSSES, *KeepsInDeque.kept, *STATISTICS.values()]
        sum([y.square().mean(), *losses]).backward()
        found += [len(losses), y.detach(), *(p.grad for p in model.parameters())]
    return found


@pytest.mark.parametrize(
    "make",
    [KeepsLoss, KeepsConstant, KeepsInDeque, KeepsWeight, KeepsResultOfFunction],
    ids=lambda make: make.__name__,
)
def test_what_is_kept(make: type[Block]) -> None:
    model, expected = fxopt.optimize(stack(make)), train(stack(make))
    with counting_graph_runs() as runs:
        found = train(model)
    for f, e in zip(found, expected, strict=True):
        assert f == e if isinstance(e, int) else torch.equal(f, e)
    assert not runs
    assert reasons(model) == [left_behind.KEPT]


def test_what_is_kept_for_the_next_call_is_no_fake() -> None:
    model = fxopt.optimize(stack(KeepsStatistic))
    for _ in range(2):
        model(tokens())
    assert type(STATISTICS["mean"]) is Tensor
    assert reasons(model) == [left_behind.KEPT]


def test_weights_that_are_cached_in_a_context() -> None:
    def parametrized() -> nn.Module:
        model = stack()
        for block in model.blocks:
            parametrize.register_parametrization(block.up, "weight", nn.Tanh())
        return model

    eager, model = parametrized(), fxopt.optimize(parametrized())
    for each in (eager, model):
        with parametrize.cached():
            (each(tokens(2)).sum() + each(tokens(3)).sum()).backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Given(nn.Module):
    """A model that hands its blocks a list or dict to write into."""

    def __init__(self, make: type[Block], given: Callable[[], Any]) -> None:
        super().__init__()
        self.blocks, self.given = stack(make).blocks, given

    def forward(self, x: Tensor) -> Tensor:
        given = self.given()
        for block in self.blocks:
            x = block(x, given)
        LOSSES.extend(given.values() if isinstance(given, dict) else given)
        return x


class Appends(Block):
    def forward(self, x_BSC: Tensor, given: Any) -> Tensor:
        given.append(self.up.weight.square().mean())
        return super().forward(x_BSC)


class SetsItem(Block):
    def forward(self, x_BSC: Tensor, given: Any) -> Tensor:
        given["loss"] = given["loss"] + self.up.weight.square().mean()
        return super().forward(x_BSC)


@pytest.mark.parametrize(
    ("make", "given"), [(Appends, list), (SetsItem, lambda: {"loss": torch.zeros(())})]
)
def test_what_is_written_to_an_argument(make: type[Block], given: Callable[[], Any]) -> None:
    model, expected = fxopt.optimize(Given(make, given)), train(Given(make, given))
    for f, e in zip(train(model), expected, strict=True):
        assert f == e if isinstance(e, int) else torch.equal(f, e)
    assert reasons(model) == [left_behind.WRITTEN]


class AddsToObject(Block):
    def forward(self, x_BSC: Tensor, given: Any) -> Tensor:
        given.add(x_BSC)
        return super().forward(x_BSC)


def test_an_object_among_the_arguments_is_written_once() -> None:
    """As caches of keys and values are."""

    class Kept(list):
        def add(self, x: Tensor) -> None:
            self.append(x)

    model = fxopt.optimize(Given(AddsToObject, Kept))
    model(tokens())
    assert len(LOSSES) == 2


class BesideALoader(Block):
    """Another thread loads a batch meanwhile, with a parameter of its own."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        def load() -> None:
            BATCHES.append([torch.zeros(2), torch.ones(2, requires_grad=True) * 2])

        loader = threading.Thread(target=load)
        loader.start()
        loader.join()
        return super().forward(x_BSC)


def test_what_another_thread_keeps_is_left_to_it() -> None:
    model = fxopt.optimize(stack(BesideALoader, 1))
    model(tokens())
    assert [len(batch) for batch in BATCHES] == [2] * len(BATCHES)


class CachesTable(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        if 0 not in TABLES:
            TABLES[0] = torch.linspace(0, 1, x_BSC.shape[-1])
        return super().forward(x_BSC + TABLES[0])


def test_a_cache_of_constants_is_no_reason() -> None:
    model, eager = fxopt.optimize(stack(CachesTable, 1)), stack(CachesTable, 1)
    # 1e-4: fp32 rounding.
    torch.testing.assert_close(model(tokens()), eager(tokens()), rtol=1e-4, atol=1e-4)
    assert type(TABLES[0]) is Tensor
    assert captures(model) == 1


class Every:
    """As caches of diffusers: skips every other call, by a state of its own."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, inner: Callable[..., Tensor], x: Tensor) -> Tensor:
        self.num_calls += 1
        return inner(x) if self.num_calls % 2 else x


@pytest.mark.parametrize("inside", [False, True])
def test_forwards_that_are_wrapped_by_hooks_with_a_state(inside: bool) -> None:
    model, eager = stack(), stack()
    for each in (model, eager):
        for block in each.blocks:
            wrapped = block.attn if inside else block
            wrapped.forward = functools.partial(Every(), wrapped.forward)
    fxopt.optimize(model)
    for _ in range(4):
        assert torch.equal(model(tokens()), eager(tokens()))
    assert reasons(model) == [left_behind.WRAPPED]


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: np.random.default_rng(0), lambda g, x: g.random()),
        (
            lambda: torch.Generator().manual_seed(0),
            lambda g, x: torch.rand((*x.shape[:1], 1, 1), generator=g),
        ),
    ],
    ids=["numpy", "torch"],
)
def test_generators_of_a_block_go_on_as_in_eager(make: Callable, draw: Callable) -> None:
    class Scales(Block):
        def __init__(self, layer_idx: int = 0) -> None:
            super().__init__(layer_idx)
            self.generator = make()

        def forward(self, x_BSC: Tensor) -> Tensor:
            return super().forward(x_BSC) * draw(self.generator, x_BSC)

    model, eager = fxopt.optimize(stack(Scales, 1)), stack(Scales, 1)
    for _ in range(3):
        # 1e-4: fp32 rounding.
        torch.testing.assert_close(model(tokens()), eager(tokens()), rtol=1e-4, atol=1e-4)


def test_a_generator_without_a_state() -> None:
    model = stack(Block, 1)
    model.blocks[0].generator = random.SystemRandom()
    fxopt.optimize(model)(tokens())
    assert captures(model) == 1


class WritesToParameters(Block):
    """As layers of forced unit norm do."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.mul_(0.5)
        self.down.weight.data.mul_(0.5)
        return super().forward(x_BSC)


def test_a_parameter_is_written_once_a_call() -> None:
    model, eager = fxopt.optimize(stack(WritesToParameters, 1)), stack(WritesToParameters, 1)
    for _ in range(2):
        model(tokens())
        eager(tokens())
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.equal(p, q)


class TakesSizes(Block):
    """BEiT's are told how many patches there are, and write nothing."""

    def forward(self, x_BSC: Tensor, sizes: torch.Size) -> Tensor:
        return super().forward(x_BSC) * sizes[0]


def test_sizes_are_no_list_that_is_written() -> None:
    model = fxopt.optimize(nn.ModuleDict({"blocks": nn.ModuleList([TakesSizes()])}))
    model["blocks"][0](tokens(), tokens().shape[1:])
    assert captures(model) == 1
