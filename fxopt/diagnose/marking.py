"""Marks the phases of a training loop that knows nothing of it, by hooks that leave when it ends.

PyTorch itself marks data loaders and optimizers. The forwards of the outermost modules, backward,
checkpoints, logging and garbage collection are marked here, with `record_function`.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._logging._internal import trace_log
from torch.profiler import record_function

from fxopt.diagnose.phases import PREFIX
from fxopt.diagnose.trace import MODULE

# What wrappers, such as for data parallelism, put in front of the names in their model.
WRAPPERS = ("module.", "_fsdp_wrapped_module.")


@contextlib.contextmanager
def marked(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, phases are marked, and the parts of each model by name.

    Args:
        models: outermost modules; one with no trained parameter is an encoder.
    """
    with contextlib.ExitStack() as undo:
        for model in models:
            trained = any(parameter.requires_grad for parameter in model.parameters())
            _mark_forward(model, PREFIX + ("forward" if trained else "encoders"), undo)
            for name, part in parts(model):
                _mark_forward(part, MODULE + name, undo)
        _wrap(torch.autograd, "backward", "backward", undo)
        _wrap(torch, "save", "checkpointing", undo)
        # What Dynamo logs while it compiles is part of compilation.
        _wrap(logging.Logger, "handle", "logging", undo, except_for=trace_log)
        _wrap(builtins, "print", "logging", undo)
        checkpoint = sys.modules.get("torch.distributed.checkpoint")
        if checkpoint is not None:
            _wrap(checkpoint, "save", "checkpointing", undo)
        collector = _Collector()
        gc.callbacks.append(collector)
        undo.callback(gc.callbacks.remove, collector)
        yield


def outermost_modules() -> list[nn.Module]:
    """Every module of this process that has parameters and is in no other module."""
    # `isinstance` would ask lazy proxies for a class that they may no longer have.
    found = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    inside = {id(child) for module in found for child in module.children()}
    return [m for m in found if id(m) not in inside and next(m.parameters(), None) is not None]


def parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The items of the outermost lists, and what stands beside those lists.

    Hooks inside of what is compiled are not called, and inside of what fxopt has rewritten they
    would bring the module's own forward back. So nothing is looked for in there.
    """
    if "forward" in vars(module) or module._compiled_call_impl or "_orig_mod" in module._modules:
        return
    for name, child in module.named_children():
        path = prefix + name
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from ((f"{path}.{index}", item) for index, item in child.named_children())
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from parts(child, "" if f"{path}." in WRAPPERS else f"{path}.")
        else:
            yield path, child


def _mark_forward(model: nn.Module, name: str, undo: contextlib.ExitStack) -> None:
    open_marks: list[Any] = []

    def enter(*_: Any) -> None:
        open_marks.append(record_function(name))
        open_marks[-1].__enter__()

    def leave(*_: Any) -> None:
        if open_marks:
            open_marks.pop().__exit__(None, None, None)

    undo.callback(model.register_forward_pre_hook(enter).remove)
    undo.callback(model.register_forward_hook(leave, always_call=True).remove)


def _wrap(
    owner: Any, name: str, phase: str, undo: contextlib.ExitStack, except_for: object = None
) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def marking(*args: Any, **kwargs: Any) -> Any:
        if except_for is not None and args[0] is except_for:
            return original(*args, **kwargs)
        with record_function(PREFIX + phase):
            return original(*args, **kwargs)

    setattr(owner, name, marking)
    undo.callback(setattr, owner, name, original)


class _Collector:
    """Marks a run of Python's garbage collector."""

    def __init__(self) -> None:
        self.mark: Any = None

    def __call__(self, moment: str, _: dict[str, int]) -> None:
        if moment == "start":
            self.mark = record_function(PREFIX + "garbage collection")
            self.mark.__enter__()
        elif self.mark is not None:
            self.mark.__exit__(None, None, None)
            self.mark = None
