"""Which attributes a capture depends on, and how a change of one is noticed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.reads import Reads, Watch, frozen, recording


class Color(Enum):
    RED = 1
    BLUE = 2


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain, self.unread = nn.Linear(3, 3), 2.0, 5

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x)


class Module(nn.Module):
    kind = "class attribute"

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = Inner(), nn.Dropout(0.1)
        self.sizes, self.config = [1, 2], SimpleNamespace(a=1, b={"c": [2]})
        self.layer_idx = 7

    def helper(self) -> float:
        return sum(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind and self.config.a and not getattr(self, "absent", None):
            x = x * self.helper()
        return self.drop(self.inner(x))


def read(module: nn.Module) -> Reads:
    with recording(module) as reads:
        module(torch.ones(2, 3))
    return reads


def test_what_is_recorded() -> None:
    names = set(read(Module()).values)
    expected = {
        ("", "kind"),
        ("", "config"),
        ("", "absent"),
        ("", "helper"),
        ("", "sizes"),
        ("inner", "forward"),
        ("inner", "gain"),
        ("inner.linear", "forward"),
        ("drop", "forward"),
        ("drop", "p"),
        ("drop", "training"),
        ("drop", "inplace"),
    }
    assert names == expected


def test_recording_leaves_nothing_behind() -> None:
    before = nn.Module.__getattribute__
    module = Module()
    with pytest.raises(RuntimeError), recording(module):
        module(torch.ones(2, 4))
    assert nn.Module.__getattribute__ is before
    assert "__getattribute__" not in vars(nn.Module)


def test_a_recording_within_a_recording() -> None:
    outer, inner = Module(), Module()
    with recording(outer) as reads:
        read(inner)
        outer(torch.ones(2, 3))
    assert reads.values.keys() == read(Module()).values.keys()
    assert "__getattribute__" not in vars(nn.Module)


def twice(x: Tensor) -> Tensor:
    return 2 * x


def thrice(x: Tensor) -> Tensor:
    return 3 * x


# Each access to the __dict__ of such a type gives a new object.
twice.__annotations__["return"] = thrice.__annotations__["return"] = tuple[Tensor, ...]


class Static(nn.Module):
    scale = staticmethod(twice)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x)


def test_a_static_method_is_itself_until_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = read(Static())
    assert reads.hold_for(Static())
    thrice.__name__, thrice.__qualname__ = twice.__name__, twice.__qualname__
    monkeypatch.setattr(Static, "scale", staticmethod(thrice))
    assert not reads.hold_for(Static())


def test_recording_keeps_the_patch_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def patch(self: nn.Module, name: str) -> object:
        seen.append(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(nn.Module, "__getattribute__", patch, raising=False)
    module = Module()
    seen.clear()
    reads = read(module)
    assert vars(nn.Module)["__getattribute__"] is patch
    assert {name for _, name in reads.values} <= set(seen)


def test_other_modules_are_not_recorded() -> None:
    module, other = Module(), Module()
    with recording(module) as reads:
        other(torch.ones(2, 3))
    assert not reads.values


def change_class(module: nn.Module) -> None:
    module.__class__ = type("Other", (Module,), {"kind": "another"})


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda m: setattr(m.inner, "gain", 3.0),
    "type of a number": lambda m: setattr(m.inner, "gain", 2),
    "class attribute hidden": lambda m: setattr(m, "kind", ""),
    "class attribute of another class": change_class,
    "absent": lambda m: setattr(m, "absent", True),
    "list in place": lambda m: m.sizes.append(1),
    "object in place": lambda m: setattr(m.config, "a", 2),
    "dict in an object": lambda m: m.config.b.update(d=1),
    "list in a dict in an object": lambda m: m.config.b["c"].append(1),
    "method": lambda m: setattr(m, "helper", lambda: 1.0),
    "forward inside": lambda m: setattr(m.inner, "forward", F.relu),
    "training": lambda m: m.drop.eval(),
}
# Of the structure: seen by a watch, and by the state that a plan compares, but no attribute.
STRUCTURE: dict[str, Callable[[nn.Module], object]] = {
    "module": lambda m: setattr(m.inner, "linear", nn.Linear(3, 3)),
    "new module": lambda m: setattr(m.inner, "adapter", nn.Linear(3, 3)),
    "dtype": lambda m: m.inner.linear.double(),
    "shape": lambda m: setattr(m.inner.linear, "weight", nn.Parameter(torch.ones(4, 3))),
    "no bias": lambda m: setattr(m.inner.linear, "bias", None),
    "data of another dtype": lambda m: setattr(
        m.inner.linear.bias, "data", torch.ones(3, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    module = Module()
    reads = read(module)
    watch = Watch(module, reads)
    assert watch.unchanged()
    assert reads.hold_for(module)
    assert reads.hold_for(Module())
    CHANGES[name](module)
    assert not watch.unchanged()
    assert not reads.hold_for(module)


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_change_of_structure_is_noticed(name: str) -> None:
    module = Module()
    watch = Watch(module, read(module))
    STRUCTURE[name](module)
    assert not watch.unchanged()


def test_what_is_not_read_may_change() -> None:
    module = Module()
    reads = read(module)
    watch = Watch(module, reads)
    module.layer_idx, module.inner.unread = 1, 2
    module.inner.linear.weight = nn.Parameter(torch.zeros(3, 3))  # read at every call
    assert watch.unchanged()
    assert reads.hold_for(module)


def test_an_equal_value_is_no_new_capture() -> None:
    module = Module()
    reads = read(module)
    module.config = SimpleNamespace(a=1, b={"c": [2]})
    module.sizes = [1, 2]
    assert reads.hold_for(module)


def test_undo_restores_containers() -> None:
    module = Module()
    sizes, config = module.sizes, module.config
    reads = read(module)
    sizes.append(3)
    config.b["c"].clear()
    config.new = 1
    reads.undo()
    assert module.sizes is sizes
    assert sizes == [1, 2]
    assert vars(config) == {"a": 1, "b": {"c": [2]}}


@pytest.mark.parametrize(
    "value",
    [
        0,
        False,
        0.0,
        "0",
        None,
        math.inf,
        torch.float32,
        torch.device("cpu"),
        [0],
        (0,),
        {"a": 0},
        {0},
        Color.RED,
        F.relu,
        SimpleNamespace(a=0),
        nn.Linear,
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],  # the same in every process
)
def test_frozen_values_equal_only_their_like(value: object) -> None:
    others = [1, True, 0.5, "1", "", torch.float16, [1], (1,), {"a": 1}, {"b": 0}, Color.BLUE]
    others += [F.gelu, SimpleNamespace(a=1), nn.LayerNorm, [], {}, functools.partial(F.relu)]
    assert frozen(value) == frozen(value)
    assert all(frozen(value) != frozen(other) for other in others)


def test_frozen_values_of_one_kind() -> None:
    assert frozen(0) != frozen(False) != frozen(0.0)
    assert frozen(SimpleNamespace(a=[1])) == frozen(SimpleNamespace(a=[1]))
    assert frozen(torch.ones(1)) != frozen(torch.ones(1))  # values of tensors are not compared
    cycle: list = []
    cycle.append(cycle)
    assert frozen(cycle) == frozen(cycle)
