"""One capture: which calls its graph is for, what it reads, and what it leaves behind."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxopt.backends import unseen
from fxopt.backends.calls import Call
from fxopt.backends.capture import CannotCapture, Plan, capture, captures, state_of
from fxopt.backends.exported import optimize, rewrite_block
from fxopt.backends.rewritten import Bound
from fxopt.backends.state import report
from fxopt.passes.rules import CATALOGUE
from tests.backends.toys import CHANNELS, Block, stack, tokens


def captured(module: nn.Module, *args: object, **kwargs: object) -> Plan:
    return capture(module, module.forward, args, kwargs, CATALOGUE)


def plan_accepts(plan: Plan, *args: object, **kwargs: object) -> bool:
    return plan.accepts(Call.of(args, kwargs))


def test_sizes_are_free_and_channels_are_not() -> None:
    plan = captured(Block(), tokens())
    for batch, num_tokens in [(2, 6), (1, 6), (1, 1), (5, 5), (32, 4096)]:
        assert plan_accepts(plan, torch.empty(batch, num_tokens, CHANNELS))
    assert not plan_accepts(plan, torch.empty(2, 6, 2 * CHANNELS))
    assert not plan_accepts(plan, torch.empty(0, 6, CHANNELS))
    assert not plan_accepts(plan, torch.empty(6, CHANNELS))


class Subclass(Tensor):
    """May compute something else."""


def test_kinds_of_calls_are_told_apart() -> None:
    plan = captured(Block(), tokens())
    assert not plan_accepts(plan, tokens(dtype=torch.bfloat16))
    assert not plan_accepts(plan, tokens().to("meta"))
    assert not plan_accepts(plan, x_BSC=tokens())
    assert not plan_accepts(plan, tokens(), None)
    assert not plan_accepts(plan, [tokens()])
    assert not plan_accepts(plan, 1)
    assert not plan_accepts(plan, tokens().as_subclass(Subclass))
    assert plan_accepts(plan, nn.Parameter(tokens()))
    with torch.autocast("cpu", torch.bfloat16):
        assert not plan_accepts(plan, tokens())
        in_autocast = captured(Block(), tokens())
        assert plan_accepts(in_autocast, tokens())
    with torch.autocast("cpu", torch.float16):
        assert not plan_accepts(in_autocast, tokens())
    assert not plan_accepts(in_autocast, tokens())
    with torch.no_grad():
        assert plan_accepts(plan, tokens())


class Numbers(Block):
    def forward(self, x_BSC: Tensor, gain: object = 1, mode: str | None = None) -> Tensor:
        return super().forward(x_BSC) * float(gain)


@pytest.mark.parametrize(
    ("captured_with", "others"),
    [
        (1, [2, 1.0, True, None, "1"]),
        (0.5, [0.25, 1]),
        (True, [False, 1]),
    ],
)
def test_numbers_are_constants(captured_with: object, others: list) -> None:
    plan = captured(Numbers(), tokens(), captured_with, mode="a")
    assert plan_accepts(plan, tokens(), captured_with, mode="a")
    assert not plan_accepts(plan, tokens(), captured_with, mode="b")
    assert not any(plan_accepts(plan, tokens(), other, mode="a") for other in others)


class Passing(Numbers):
    def forward(self, x_BSC: Tensor, **kwargs: object) -> Tensor:
        return super().forward(x_BSC, **kwargs)


def test_arguments_that_are_only_passed_on() -> None:
    plan = captured(Passing(), tokens(), gain=0.5, mode="a")
    assert plan_accepts(plan, tokens(num_tokens=9), gain=0.5, mode="a")
    assert not plan_accepts(plan, tokens(), gain=0.5, mode="b")
    assert not plan_accepts(plan, tokens())


class Checkpointing(Block):
    """As the layers of transformers do it."""

    def __call__(self, *args: object) -> Tensor:
        return checkpoint(super().__call__, *args, use_reentrant=False)


def test_a_call_that_checkpoints_goes_around_the_graph() -> None:
    block = Checkpointing()
    plan = captured(block, tokens())
    assert plan.fits(block) and type(block) is Checkpointing
    assert plan.outcome.applied


def test_equal_sizes_of_two_inputs() -> None:
    class Added(Block):
        def forward(self, x_BSC: Tensor, y_BSC: Tensor) -> Tensor:
            return super().forward(x_BSC) + y_BSC

    plan = captured(Added(), tokens(), tokens())
    assert plan_accepts(plan, tokens(3, 4), tokens(3, 4))
    assert not plan_accepts(plan, tokens(3, 4), tokens(3, 5))
    assert not plan_accepts(plan, tokens(3, 4), tokens(1, 4))  # broadcasting is another graph
    broadcast = captured(Added(), tokens(2), tokens(1))
    assert plan_accepts(broadcast, tokens(3), tokens(1))
    assert not plan_accepts(broadcast, tokens(3), tokens(3))


def test_sizes_that_derive_from_sizes() -> None:
    class Halves(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            first, second = x_BSC.chunk(2, 1)
            return super().forward(first + second)

    plan = captured(Halves(), tokens(2, 6))
    assert plan_accepts(plan, tokens(3, 8))
    assert not plan_accepts(plan, tokens(3, 7))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_is_captured_for_all(batch: int) -> None:
    plan = captured(Block(), tokens(batch))
    assert all(plan_accepts(plan, tokens(b)) for b in (1, 2, 3))


def test_the_general_plan_comes_first() -> None:
    module = Block()
    plans = list(captures(module, module.forward, Call.of((tokens(1),), {}), CATALOGUE))
    assert [plan_accepts(p, tokens(3)) for p in plans] == [True, False]
    assert [plan_accepts(p, tokens(1)) for p in plans] == [True, True]


def test_state_of_tells_dtypes_shapes_and_ties() -> None:
    def tie(m: nn.Module) -> None:
        m.attn.to_q.weight = m.attn.to_k.weight

    def untype(m: nn.Module) -> None:
        m.up.weight = nn.Parameter(m.up.weight.detach().as_subclass(type("Special", (Tensor,), {})))

    changes: list[Callable] = [
        lambda m: m.up.double(),
        lambda m: setattr(m.up, "bias", None),
        lambda m: setattr(m.up, "weight", nn.Parameter(torch.ones(48, 1))),
        lambda m: m.register_buffer("new", torch.ones(1)),
        lambda m: setattr(m, "down", nn.Identity()),
        tie,
        untype,
    ]
    assert state_of(Block()) == state_of(Block())
    for change in changes:
        module = Block()
        change(module)
        assert state_of(module) != state_of(Block())


def test_a_capture_leaves_the_module_alone() -> None:
    module = stack(num_blocks=1).blocks[0]
    module.kept, module.listed = {"a": [1]}, [1, 2]
    module.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    values = copy.deepcopy(module.state_dict())
    held = {name: dict(vars(m)) for name, m in module.named_modules()}
    state, level = torch.random.get_rng_state(), logging.root.manager.disable
    with torch.no_grad():
        captured(module, tokens())
        assert not torch.is_grad_enabled()
    for name, m in module.named_modules():
        assert vars(m).keys() == held[name].keys()
        assert all(vars(m)[key] is value for key, value in held[name].items()), name
    assert all(torch.equal(v, values[name]) for name, v in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert logging.root.manager.disable == level


def test_pytorch_is_left_as_it_was() -> None:
    names = [
        (torch, "is_grad_enabled"),
        (torch.autograd.Function, "apply"),
        (torch.autograd.function._SingleLevelFunction, "apply"),
        (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
        (nn.Module, "__setattr__"),
        (nn.Module, "__getattribute__"),
    ]
    before = [vars(owner).get(name) for owner, name in names]
    captured(Block(), tokens())
    with pytest.raises(CannotCapture):
        captured(Block(), tokens()[..., :3])
    assert [vars(owner).get(name) for owner, name in names] == before


def test_only_the_loggers_of_torch_are_silent(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    class Speaks(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            for name in ("mine", "torchmine", "torch.export", "torch._dynamo"):
                logging.getLogger(name).error("said")
            print("printed", file=sys.stderr)
            return super().forward(x_BSC)

    level = logging.getLogger("torch._dynamo").level
    captured(Speaks(), tokens())
    assert [r.name for r in caplog.records if r.message == "said"] == ["mine", "torchmine"]
    assert capsys.readouterr().err == "printed\n"
    assert logging.getLogger("torch._dynamo").level == level


def test_reasons_name_the_input() -> None:
    with pytest.raises(CannotCapture, match="an input is a slice"):
        captured(Numbers(), tokens(), slice(3))
    with pytest.raises(CannotCapture, match="without a tensor"):
        captured(Block(), 1)
    with pytest.raises(CannotCapture, match=r"torch\.export: RuntimeError"):
        captured(Block(), tokens()[..., :3])
    with pytest.raises(CannotCapture, match="too many positional"):
        captured(Block(), tokens(), tokens())


def test_a_failed_capture_tells_what_it_read() -> None:
    class Failing(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            if self.flag:
                return super().forward(x_BSC)
            raise ValueError("no flag")

    with pytest.raises(CannotCapture, match="no flag") as caught:
        captured(Failing(), tokens())
    assert set(caught.value.reads.values) == {("", "flag")}


def test_asking_torch_is_no_question_of_the_model() -> None:
    """PyTorch's own Python looks at grad mode and requires_grad as well."""

    class Torch(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            with torch.no_grad():
                gain = x_BSC.abs().amax()
            return F.multi_head_attention_forward(
                *[x_BSC] * 3,
                CHANNELS,
                2,
                torch.cat([f.weight for f in (self.attn.to_q, self.attn.to_k, self.attn.to_v)]),
                None,
                None,
                None,
                False,
                0.0,
                self.attn.to_out.weight,
                None,
            )[0].mul(gain)

    assert not captured(Torch(), tokens()).needs_grad_mode


def test_refusing_restores_on_errors() -> None:
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    with pytest.raises(KeyError), unseen.refusing(Block()):
        raise KeyError
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter


def test_rewrite_block_on_meta() -> None:
    with torch.device("meta"):
        module, x = Block(), torch.empty(2, 6, CHANNELS)
    rewritten = rewrite_block(module, (x,), {})
    assert rewritten(x).shape == x.shape
    assert rewritten.report.count("gated_activation") == 1
    assert {a.block_class for a in rewritten.report.applied} == {"Block"}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


class Meets(Block):
    """Waits for another thread while it is captured."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        THREADS.wait(timeout=10)
        THREADS.wait(timeout=10)
        return super().forward(x_BSC)


THREADS = threading.Barrier(2)


def test_other_threads_go_on_as_they_are() -> None:
    found = []

    def work() -> None:
        THREADS.wait(timeout=10)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            found.append(Doubled.apply(torch.ones(3, requires_grad=True)))
        THREADS.wait(timeout=10)

    thread = threading.Thread(target=work)
    thread.start()
    captured(Meets(), tokens())
    thread.join()
    (y,) = found
    assert torch.equal(*torch.autograd.grad(y.sum(), y), torch.ones(3)) and y.grad_fn is not None


def test_a_graph_runs_while_another_thread_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says in all threads then that it compiles."""
    model, ran = optimize(stack()), []
    model(tokens())
    run = Bound.run
    monkeypatch.setattr(Bound, "run", lambda *args: ran.append(None) or run(*args))

    def work() -> None:
        THREADS.wait(timeout=10)
        model(tokens())
        THREADS.wait(timeout=10)

    thread = threading.Thread(target=work)
    thread.start()
    captured(Meets(), tokens())
    thread.join()
    assert len(ran) == len(model.blocks)


def test_threads_capture_one_after_the_other() -> None:
    def work() -> None:
        try:
            model = optimize(stack())
            model(tokens())
            counts.append(report(model).count("norm_modulate"))
        except Exception as error:
            counts.append(error)

    counts: list[object] = []
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(count, int) and count for count in counts), counts
