"""What a capture read from a module, so that a graph is used only where it would be the same.

A capture runs the module's own Python once. Whatever attribute it read then (a flag, a processor,
`training`, a method) is part of what it found; a module of the same class whose read attributes
are equal would give the same graph. Attributes that no capture read, such as a layer's index, may
differ.
"""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# What nn.Module keeps and offers itself: watched as structure, or the same for all.
_OF_ANY_MODULE = (frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))) - {
    "training",
    "forward",
}
_ATOMS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# Compared by identity: what they hold is no setting, or is watched elsewhere.
_OPAQUE = (
    nn.Module,
    torch.Tensor,
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    staticmethod,  # like a function: its __dict__ holds its name and annotations, not its code
    classmethod,
)
_MISSING = object()


@dataclass
class Reads:
    """Attributes read, as (path of the submodule, name) -> `frozen` value; paths are relative."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    # Containers among them, each with a copy of what it held when it was read.
    contents: list[tuple[Any, Any]] = field(default_factory=list)

    def hold_for(self, module: nn.Module) -> bool:
        """Whether `module` has the same value in each attribute that was read."""
        submodules = dict(module.named_modules(remove_duplicate=False))
        for (path, name), value in self.values.items():
            if path not in submodules or frozen(_find(submodules[path], name)[1]) != value:
                return False
        return True

    def undo(self) -> None:
        """Put back what was written to the containers since."""
        for live, kept in self.contents:
            if not _same(live, kept):
                live.clear()
                live.extend(kept) if isinstance(live, list) else live.update(kept)


@contextmanager
def recording(module: nn.Module, reads: Reads | None = None) -> Iterator[Reads]:
    """Record the plain attributes that this thread's code reads from `module` and its submodules,
    in `reads`."""
    reads = reads or Reads()
    paths = {id(m): path for path, m in module.named_modules()}

    def record(read: nn.Module, name: str) -> None:
        path = paths.get(id(read))
        if path is not None and _is_setting(read, path, name) and (path, name) not in reads.values:
            value = _find(read, name)[1]
            reads.values[path, name] = frozen(value)
            reads.contents += _contents(value)

    with _recorders.added(record):
        yield reads


class _Recorders:
    """Those of all threads, behind one replaced attribute: threads leave in any order."""

    def __init__(self) -> None:
        self.lock, self.replaced = threading.Lock(), ExitStack()
        self.recorders: list[tuple[int, Callable[[nn.Module, str], None]]] = []

    @contextmanager
    def added(self, record: Callable[[nn.Module, str], None]) -> Iterator[None]:
        added = threading.get_ident(), record
        with self.lock:
            if not self.recorders:
                self.replaced.enter_context(replaced(nn.Module, "__getattribute__", self._reader()))
            self.recorders = [*self.recorders, added]
        try:
            yield
        finally:
            with self.lock:
                self.recorders = [r for r in self.recorders if r is not added]
                if not self.recorders:
                    self.replaced.close()

    def _reader(self) -> Callable[[nn.Module, str], Any]:
        original = nn.Module.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            for thread, record in self.recorders:
                if thread == threading.get_ident():
                    record(module, name)
            return original(module, name)

        return read


_recorders = _Recorders()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute of a class or module for a while; then what was there before, if any."""
    held = vars(owner)
    own, kept = name in held, held.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, kept)
        else:
            delattr(owner, name)


@contextmanager
def same_attributes(module: nn.Module) -> Iterator[None]:
    """Leave the attributes of `module` and its submodules as they are found."""
    kept = [(vars(m), dict(vars(m))) for m in module.modules()]
    try:
        yield
    finally:
        for held, before in kept:
            for name in held.keys() - before.keys():
                del held[name]
            held.update((n, v) for n, v in before.items() if held.get(n) is not v)


def _is_setting(module: nn.Module, path: str, name: str) -> bool:
    if name in _OF_ANY_MODULE or name.startswith("__") or (name == "forward" and not path):
        return False
    held = object.__getattribute__(module, "__dict__")
    return not any(name in held[kind] for kind in ("_parameters", "_buffers", "_modules"))


def _find(module: nn.Module, name: str) -> tuple[Any, Any]:
    """Where an attribute stands, in the instance or in a class, and its value there."""
    held = object.__getattribute__(module, "__dict__")
    for namespace in (held, *map(vars, type(module).__mro__)):
        if name in namespace:
            return namespace, namespace[name]
    return held, _MISSING


@dataclass(frozen=True)
class _Same:
    """Equal to itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def frozen(value: Any, depth: int = 4) -> Any:
    """What to compare a value by, now or later: its content, or the object itself."""
    if isinstance(value, _ATOMS):
        return type(value), value
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [frozen(v, depth - 1) for v in value]
    if depth and isinstance(value, dict):
        return type(value), {k: frozen(v, depth - 1) for k, v in value.items()}
    if depth and hasattr(value, "__dict__") and not isinstance(value, _OPAQUE):
        return type(value), frozen(vars(value), depth)
    return _Same(value)


def _contents(value: Any, depth: int = 4) -> Iterator[tuple[Any, Any]]:
    """The containers that can change within a value, each with a copy."""
    if isinstance(value, _OPAQUE):
        return
    live = vars(value) if hasattr(value, "__dict__") and not isinstance(value, dict) else value
    if not isinstance(live, (list, tuple, set, dict)) or not depth:
        return
    if not isinstance(live, tuple):
        yield live, copy.copy(live)
    for item in list(live.values() if isinstance(live, dict) else live):
        if not isinstance(item, _ATOMS):
            yield from _contents(item, depth - 1)


def _same(live: Any, kept: Any) -> bool:
    try:
        return bool(live == kept)
    except (RuntimeError, ValueError):  # two tensors or arrays, hence not one
        return False


class Watch:
    """The state of one module under a graph, checked before every call in a few microseconds."""

    def __init__(self, module: nn.Module, reads: Reads) -> None:
        submodules = dict(module.named_modules(remove_duplicate=False))
        self.classes = [(m, type(m)) for m in submodules.values()]
        self.attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self.contents: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[dict[str, Any], str, Any, Any, Any]] = []
        # Names of one tensor, of which a graph reads one.
        self.ties: list[tuple[dict[str, Any], str, dict[str, Any], str]] = []
        first: dict[int, tuple[dict[str, Any], str]] = {}
        for path, name in reads.values:
            self._watch(submodules[path], name)
        for submodule in submodules.values():
            self.contents.append((submodule._modules, dict(submodule._modules)))
            for held in (submodule._parameters, submodule._buffers):
                self.tensors += [(held, name, *_kind(t)) for name, t in held.items()]
                for name, t in held.items():
                    other, alias = first.setdefault(id(t), (held, name))
                    if t is not None and (other is not held or alias != name):
                        self.ties.append((other, alias, held, name))
        self.hooks = hooks(module)

    def _watch(self, submodule: nn.Module, name: str) -> None:
        namespace, value = _find(submodule, name)
        self.attributes[id(namespace), name] = (namespace, name, value)
        if namespace is not submodule.__dict__:  # it would be hidden by one in the instance
            held = submodule.__dict__
            self.attributes[id(held), name] = (held, name, _MISSING)
        self.contents += _contents(value)

    def unchanged(self) -> bool:
        """Whether a new capture would read the same, and find tensors of the same kind."""
        for module, cls in self.classes:
            if type(module) is not cls:
                return False
        for namespace, name, value in self.attributes.values():
            if namespace.get(name, _MISSING) is not value:
                return False
        for live, kept in self.contents:
            if not _same(live, kept):
                return False
        for held, name, cls, dtype, shape in self.tensors:
            t = held.get(name)
            if type(t) is not cls or (t is not None and (t.dtype is not dtype or t.shape != shape)):
                return False
        return all(held.get(n) is other.get(m) for held, n, other, m in self.ties)

    def hooked(self) -> bool:
        """Whether a submodule has hooks, which a graph would not call."""
        return any(self.hooks) or has_global_hooks()


def _kind(t: torch.Tensor | None) -> tuple[Any, Any, Any]:
    return type(t), getattr(t, "dtype", None), getattr(t, "shape", None)


def hooks(module: nn.Module) -> list[Any]:
    """The hook tables of all submodules; those of `module` itself are called around its forward."""
    inner = (m for m in module.modules() if m is not module)
    return [getattr(m, name) for m in inner for name in HOOKS]


def has_global_hooks() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())
