"""What a capture read from a module, so that a graph is used only where it would be the same.

A capture runs the module's own Python once. Whatever attribute it read then (a flag, a processor,
`training`) is part of what it found; a module of the same class whose read attributes are equal
would give the same graph. Attributes that no capture read, such as a layer's index, may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Bookkeeping of nn.Module: compared as structure or as hooks, not as values.
_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules", "__dict__", "__class__", "forward"})
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_MISSING = object()


@dataclass
class Reads:
    """Attributes read, as (path of the submodule, name) -> value; paths are relative."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)

    def hold_for(self, module: nn.Module) -> bool:
        """Whether `module` has the same value in each attribute that was read."""
        submodules = dict(module.named_modules(remove_duplicate=False))
        for (path, name), value in self.values.items():
            holder = submodules.get(path)
            if holder is None or not equivalent(holder.__dict__.get(name, _MISSING), value):
                return False
        return True


@contextmanager
def recording(module: nn.Module) -> Iterator[Reads]:
    """Record the plain attributes that code reads from `module` and its submodules."""
    reads = Reads()
    paths = {id(m): path for path, m in module.named_modules()}
    original = nn.Module.__getattribute__

    def recorder(self: nn.Module, name: str) -> Any:
        value = original(self, name)
        path = paths.get(id(self))
        if path is not None and name not in _STRUCTURE and not name.startswith("__"):
            held = original(self, "__dict__")
            if name in held and name not in _BOOKKEEPING:
                reads.values[path, name] = value
        return value

    nn.Module.__getattribute__ = recorder  # type: ignore[method-assign, assignment]
    try:
        yield reads
    finally:
        del nn.Module.__getattribute__


_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}


def equivalent(a: Any, b: Any, depth: int = 3) -> bool:
    """Whether two attribute values steer a forward alike."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)):
        return bool(a == b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equivalent(x, y, depth) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equivalent(a[k], b[k], depth) for k in a)
    if isinstance(a, (nn.Module, torch.Tensor)) or callable(a) and not hasattr(a, "__dict__"):
        return False
    if depth == 0 or not hasattr(a, "__dict__"):
        return False
    return equivalent(vars(a), vars(b), depth - 1)


class Watch:
    """The state of one module under a graph, checked before every call in a few microseconds."""

    def __init__(self, module: nn.Module, reads: Reads) -> None:
        submodules = dict(module.named_modules(remove_duplicate=False))
        self.identities: list[tuple[dict[str, Any], str, Any]] = []
        self.hooks: list[Any] = []
        for path, name in reads.values:
            holder = submodules[path].__dict__
            self.identities.append((holder, name, holder[name]))
        for path, submodule in submodules.items():
            for name, child in submodule._modules.items():
                self.identities.append((submodule._modules, name, child))
            if path:
                self.hooks += [getattr(submodule, hooks) for hooks in _HOOKS]

    def unchanged(self) -> bool:
        for holder, name, value in self.identities:
            if holder.get(name, _MISSING) is not value:
                return False
        return True

    def hooked(self) -> bool:
        """Whether a submodule has hooks, which a graph would not call."""
        return any(self.hooks)
