"""One model called by several threads: a capture in one of them shows in no other."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backends.reads import Reads, recording
from fxopt.backends.rewritten import RewrittenForward
from fxopt.backends.turns import Turns
from tests.backends.toys import Block, captures, counting_graph_runs, reasons, stack, tokens

# Long enough for another thread to come to where it waits, or would go on by mistake.
A_WHILE = 0.3
LIMIT = 60
BEGAN = threading.Event()


class Slow(Block):
    """Lets others begin while it is captured or runs."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        BEGAN.set()
        threading.Event().wait(A_WHILE / 4)
        return super().forward(x_BSC)


class Unseen(Slow):
    """Cannot be captured."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        out = super().forward(x_BSC)
        self.last = x_BSC.shape
        return out


@contextlib.contextmanager
def thread() -> Iterator[Callable[..., Future[Any]]]:
    """Starts a call in another thread."""
    pool = ThreadPoolExecutor(8)
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a deadlock fails, and does not hang


def step(model: nn.Module) -> list[Tensor]:
    x = tokens().requires_grad_()
    out = model(x)
    weights = (block.up.weight for block in model.blocks)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *weights])]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("num_threads", [2, 5])
def test_a_first_call_from_several_threads(num_threads: int) -> None:
    model = fxopt.optimize(stack(Slow))
    BEGAN.clear()
    with thread() as start, counting_graph_runs() as runs:
        first = start(step, model)
        assert BEGAN.wait(LIMIT)
        others = [start(step, model) for _ in range(num_threads - 1)]
        found = [call.result(LIMIT) for call in (first, *others)]
        num_runs = len(runs)
    assert num_runs == num_threads * len(model.blocks) + 1  # the check of the capture
    for result in found:
        assert_equal(result, step(model))
    assert captures(model) == 1 and not reasons(model)
    assert fxopt.report(model).count("norm_modulate") == len(model.blocks)


def test_another_kind_of_call_waits_for_those_that_run() -> None:
    """A forward of the block's own would read the fake parameters of a capture."""
    model = fxopt.optimize(stack(Unseen))
    expected = step(model)
    BEGAN.clear()
    with thread() as start:
        training = start(step, model)
        assert BEGAN.wait(LIMIT)
        with torch.no_grad():
            validation = start(lambda: model(tokens(dtype=torch.float64).float()))
        assert_equal(training.result(LIMIT), expected)
        assert torch.equal(validation.result(LIMIT), expected[0])


def test_validation_while_training_begins() -> None:
    def validate() -> Tensor:
        with torch.no_grad():
            return model(tokens())

    model = fxopt.optimize(stack(Slow))
    BEGAN.clear()
    with thread() as start:
        training = start(step, model)
        assert BEGAN.wait(LIMIT)
        found = start(validate).result(LIMIT)
        assert_equal(training.result(LIMIT), step(model))
    assert torch.equal(found, step(model)[0])
    assert captures(model) == 1 and not reasons(model)


def test_what_cannot_be_captured_says_so_once() -> None:
    model, eager = fxopt.optimize(stack(Unseen)), stack(Unseen)
    BEGAN.clear()
    with thread() as start:
        first = start(step, model)
        assert BEGAN.wait(LIMIT)
        calls = [first, *(start(step, model) for _ in range(4))]
        for call in calls:
            assert_equal(call.result(LIMIT), step(eager))
    (reason,) = reasons(model)
    assert "sets the attribute 'last'" in reason
    refusals = model._fxopt_doors[0].blocks[0].captures.refusals
    assert len(refusals) == 1


def test_a_call_that_fails_holds_nobody_up() -> None:
    model = fxopt.optimize(stack(Slow))
    BEGAN.clear()
    with thread() as start:
        failing = start(model, tokens()[..., :-1])
        assert BEGAN.wait(LIMIT)
        others = [start(step, model) for _ in range(3)]
        with pytest.raises(RuntimeError):
            failing.result(LIMIT)
        for call in others:
            assert_equal(call.result(LIMIT), step(model))


class Twice(Block):
    """Calls itself."""

    def forward(self, x_BSC: Tensor, depth: int = 1) -> Tensor:
        return super().forward(self(x_BSC, depth - 1) if depth else x_BSC)


def test_a_block_that_calls_itself() -> None:
    model, eager = fxopt.optimize(stack(Twice)), stack(Twice)
    with thread() as start:
        for call in [start(step, model) for _ in range(3)]:
            for found, expected in zip(call.result(LIMIT), step(eager), strict=True):
                # Roundings of fused ops, through four blocks and their backward.
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_hooks_of_a_block_run_while_it_is_captured() -> None:
    model, called = fxopt.optimize(stack(Slow, num_blocks=1)), []
    model.blocks[0].register_forward_hook(lambda *_: called.append(threading.get_ident()))
    BEGAN.clear()
    with thread() as start:
        first = start(step, model)
        assert BEGAN.wait(LIMIT)
        start(step, model).result(LIMIT)
        first.result(LIMIT)
    assert len(called) == len(set(called)) == 2


class Made(Slow):
    """Made by its class's own `__new__`, as FSDP2's modules are."""

    def __new__(cls, layer_idx: int) -> Made:
        return super().__new__(cls)


def test_the_stand_in_of_a_capture_is_not_made_anew() -> None:
    model = fxopt.optimize(stack(Made))
    model(tokens())
    assert captures(model) == 1 and not reasons(model)


def test_two_inside_of_calls_do_not_wait_for_each_other() -> None:
    blocks, meet, begun = (Turns(), Turns()), threading.Barrier(2), []

    def nested(index: int) -> None:
        with blocks[index].beside():
            meet.wait(LIMIT)
            with blocks[1 - index].alone() as begins:
                begun.append(begins)
            meet.wait(LIMIT)

    with thread() as start:
        for call in [start(nested, 0), start(nested, 1)]:
            call.result(LIMIT)
    assert begun == [False, False]


def test_recorders_leave_in_any_order() -> None:
    first, second, entered = Block(), Block(), threading.Event()

    def record() -> Reads:
        with recording(first) as reads:
            entered.set()
            left.wait(LIMIT)
            assert first.flag is False and second.flag is False
        return reads

    left = threading.Event()
    with thread() as start:
        with recording(second) as reads:
            other = start(record)
            assert entered.wait(LIMIT)
            assert first.flag is False
        left.set()
        assert list(other.result(LIMIT).values) == [("", "flag")]
    assert not reads.values
    assert "__getattribute__" not in vars(nn.Module)


@pytest.mark.parametrize("door", [fxopt.optimize, fxopt.swap])
def test_replicas_of_data_parallel_read_their_own_tensors(
    door: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas on other devices; here copies on the same one, each times its number."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Tensor], devices: list[int], detach: bool) -> list[list[Tensor]]:
        return [[t * (1 + d) for t in tensors] for d in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    model, eager = door(stack()), stack()
    model(tokens())
    with thread() as start:
        calls = [start(r, tokens()) for r in replicate.replicate(model, [0, 1])]
        found = [call.result(LIMIT) for call in calls]
    for result, replica in zip(found, replicate.replicate(eager, [0, 1]), strict=True):
        assert torch.equal(result, replica(tokens()))
    assert any("nn.DataParallel" in w for d in fxopt.report(model).declined for w in d.reasons)
    before = {name for m in stack().modules() for name in vars(m)}
    assert {name for m in fxopt.restore(model).modules() for name in vars(m)} == before
    assert not isinstance(model.blocks[0].forward, RewrittenForward)
