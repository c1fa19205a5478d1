"""Models that checkpoint their blocks by a switch of their own, under both eager doors.

transformers' wrapper of a layer's forward decides at every call; diffusers' models call the
checkpoint around the block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxopt
from tests.backends.swapping import COUNTS
from tests.families import FAMILIES, Inputs, loss, outputs
from tests.numerics import Judge, run

DOORS = [fxopt.optimize, fxopt.swap]
NAMES = ["llama-sdpa", "qwen3-sdpa", "ltx"]
NUM_CALLS = 2  # of qk_norm_rope in a forward without a cross-attention: two blocks


def switch_on(model: nn.Module, use_reentrant: bool = False) -> None:
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant)
        )
    else:
        options = {"use_reentrant": use_reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def switch_off(model: nn.Module) -> None:
    if hasattr(model, "disable_gradient_checkpointing"):
        model.disable_gradient_checkpointing()
    else:
        model.gradient_checkpointing_disable()


class Calls(TorchDispatchMode):
    """How often `qk_norm_rope` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.fxopt.qk_norm_rope.default
        return func(*args, **(kwargs or {}))


def num_calls(model: nn.Module, inputs: Inputs) -> int:
    """In a forward and its backward. Autograd's thread has the modes of the one that calls it."""
    with Calls() as calls:
        loss(model, inputs).backward()
    model.zero_grad()
    return calls.count


def kept(model: nn.Module, inputs: Inputs) -> int:
    """Bytes that a forward keeps for its backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = outputs(model, inputs)
    assert found[0].requires_grad
    return sum(sizes.values())


@pytest.fixture(params=DOORS, ids=lambda door: door.__name__)
def door(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return request.param


@pytest.mark.parametrize(
    ("name", "when", "use_reentrant"),
    [
        *((name, "before", False) for name in NAMES),
        *(
            (NAMES[0], *way)
            for way in (("after", False), ("after a call", False), ("before", True))
        ),
    ],
)
def test_accuracy_and_what_fires(door, name: str, when: str, use_reentrant: bool) -> None:
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs(2, 0, torch.float32)
    judge = Judge(model, inputs)
    if when == "before":
        switch_on(model, use_reentrant)
    door(model)
    if when != "before":
        if when == "after a call":
            run(model, inputs)
        switch_on(model, use_reentrant)
    judge(model, name)
    counts = fxopt.report(model).counts()
    names = ("qk_norm_rope", "norm_modulate", "gated_activation", "merge_linears")
    assert {n: counts[n] for n in names} == {n: COUNTS[name][n] for n in names}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_and_what_runs_again(door, name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    eager = copy.deepcopy(model)
    switch_on(eager)
    door(model)
    run(model, inputs)  # captured, or proved
    whole, once = kept(model, inputs), num_calls(model, inputs)
    switch_on(model)
    run(model, inputs)  # proved anew: swap's forward reads the switch
    assert num_calls(model, inputs) == 2 * once > 0
    # Eager's blocks keep their inputs alone; so do these.
    assert kept(model, inputs) <= kept(eager, inputs) < whole
    switch_off(model)
    assert kept(model, inputs) == whole and num_calls(model, inputs) == once


def test_evaluation_makes_no_checkpoint(door) -> None:
    family = FAMILIES["llama-sdpa"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    switch_on(model)
    door(model)
    model.eval()
    run(model, inputs)
    once = num_calls(model, inputs)
    model.train()
    run(model, inputs)
    assert num_calls(model, inputs) == 2 * once


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_class_that_changes(door, when: str) -> None:
    """FSDP2 gives each layer a class of its own, whose wrapper is the one that counts."""
    family = FAMILIES["llama-sdpa"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    judge = Judge(model, inputs)
    switch_on(model)
    if when == "after":
        door(model)
    for layer in model.model.layers:
        layer.__class__ = type("Sharded", (type(layer),), {})
    if when == "before":
        door(model)
    judge(model)
    assert num_calls(model, inputs) == 2 * NUM_CALLS


def test_restored_and_copied(door) -> None:
    family = FAMILIES["qwen3-sdpa"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    eager = run(copy.deepcopy(model), inputs)
    switch_on(model)
    door(model)
    run(model, inputs)
    twin = copy.deepcopy(model)
    Judge(family.build(), inputs)(twin)
    assert num_calls(twin, inputs) == 2 * NUM_CALLS
    fxopt.restore(model)
    assert not any("forward" in vars(m) for m in model.modules())
    restored = run(model, inputs)
    assert all(torch.equal(t, restored[name]) for name, t in eager.items() if t is not None)


def test_a_forward_that_the_user_replaced_is_not_wrapped() -> None:
    """It stood in for the wrapper as well."""
    family = FAMILIES["llama-sdpa"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    for layer in model.model.layers:
        inner = type(layer).forward.__wrapped__.__get__(layer)
        layer.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)
    switch_on(model)
    fxopt.optimize(model)
    run(model, inputs)
    assert num_calls(model, inputs) == NUM_CALLS


class SelfCheckpointing(nn.Module):
    """As blocks of UNets: the forward asks the switch for a part of itself, and wraps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing:
            return self._gradient_checkpointing_func(self.linear, x)
        return x + self.linear(self.norm(x))


def test_a_forward_that_checkpoints_within_is_no_wrapper(door) -> None:
    model, x = nn.Sequential(SelfCheckpointing()), torch.randn(2, 4, 16)
    expected = model(x)
    door(model, targets=[SelfCheckpointing])
    torch.testing.assert_close(model(x), expected)


def test_both_doors() -> None:
    family = FAMILIES["llama-sdpa"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    judge = Judge(model, inputs)
    switch_on(model)
    fxopt.optimize(fxopt.swap(model))
    judge(model)
    assert num_calls(model, inputs) == 2 * NUM_CALLS


def test_compilers_see_the_checkpoint(door) -> None:
    model = FAMILIES["llama-sdpa"].build()
    switch_on(model)
    door(model)
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    x, table = torch.randn(2, 5, 64), torch.randn(1, 5, 16)
    torch.compile(model.model.layers[0], backend=backend)(x, position_embeddings=(table, table))
    targets = [str(n.target) for gm in graphs for n in gm.graph.nodes]
    assert any("checkpoint" in target for target in targets), targets
