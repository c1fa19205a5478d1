"""What a forward may do that its graph would not show; a capture that meets it is given up.

A graph holds tensor operations. Hooks on tensors and checkpoints inside a forward change its
backward or its memory, attributes that it sets change the module: tracing goes through all of them
without a trace. Autograd functions are held as a whole, where they can be.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.traceback import get_current_meta
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt.backends import opaque
from fxopt.backends.reads import Reads, replaced
from fxopt.passes.kernel_scopes import SWITCH, NotOneKernel, Scopes, marked

CHOOSES_KERNELS = (
    "its forward chooses between several kernels of attention (sdpa_kernel), which a graph would "
    "not show; name one there, or take that out and give the recipe attention=... instead"
)

FOREIGN = (
    "its forward reads a parameter that is not registered in it (but in another module, or in a "
    "list), to which a graph would give no gradient; register it, or pass it as an argument"
)

# A graph has a custom op as a whole, with the backward that was registered for it.
OF_CUSTOM_OPS = "torch._library.autograd"


class CannotCapture(Exception):
    """The block stays as it is; the message says why, for the report.

    reads: what the forward had read from its module until then.
    """

    def __init__(self, reason: str, reads: Reads | None = None) -> None:
        super().__init__(reason)
        self.reads = reads or Reads()


@dataclass
class Asked:
    """What the model's own code asked about autograd."""

    grad_mode: bool = False


@contextmanager
def refusing(module: nn.Module) -> Iterator[Asked]:
    """Raise CannotCapture where code does what a graph of `module` would not show.

    Other threads go on as they are.
    """
    asked, own = Asked(), threading.get_ident()
    inside = {id(m) for m in module.modules()}
    scopes, set_kernels = Scopes(), SWITCH
    set_attribute, is_grad_enabled = nn.Module.__setattr__, torch.is_grad_enabled
    entered = torch.autograd.graph.saved_tensors_hooks.__enter__

    def apply(cls: type, *args: Any) -> Any:
        if threading.get_ident() != own or cls.__module__ == OF_CUSTOM_OPS:
            return opaque.apply(cls, *args)
        try:
            return opaque.call(cls, args)
        except opaque.CannotHold as reason:
            raise CannotCapture(f"it calls {cls.__qualname__}.apply, which {reason}") from reason

    def enter(hooks: Any) -> Any:
        if threading.get_ident() != own:
            return entered(hooks)
        raise CannotCapture("it hooks saved tensors (a checkpoint?): a graph would not")

    def choose_kernel(*backends: Any, **options: Any) -> None:
        if threading.get_ident() == own:
            try:
                chosen = scopes.switch(*backends, **options)
            except NotOneKernel:
                raise CannotCapture(CHOOSES_KERNELS) from None
            traced = get_current_meta()
            traced.update(marked(traced, chosen))
        set_kernels(*backends, **options)

    def set_on_module(self: nn.Module, name: str, value: Any) -> None:
        if id(self) in inside and threading.get_ident() == own:
            raise CannotCapture(f"its forward sets the attribute {name!r}: a graph would not")
        set_attribute(self, name, value)

    def asks_grad_mode() -> bool:
        if threading.get_ident() == own:
            asked.grad_mode |= not _is_torch(sys._getframe(1))
        return is_grad_enabled()

    with ExitStack() as stack:
        for owner, name, value in (
            (opaque.FUNCTION, "apply", classmethod(apply)),
            (torch.autograd.graph.saved_tensors_hooks, "__enter__", enter),
            (nn.Module, "__setattr__", set_on_module),
            (torch.nn.attention, "_sdpa_kernel", choose_kernel),
            (torch, "is_grad_enabled", asks_grad_mode),
        ):
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(_AutogradOfTensors(module))
        yield asked


_HOOKS = {
    Tensor.register_hook: "registers a hook on a tensor",
    Tensor.retain_grad: "retains the gradient of a tensor",
}
_QUESTIONS = {
    vars(torch._C.TensorBase)["requires_grad"].__get__: "asks whether a tensor requires a gradient",
    vars(torch._C.TensorBase)["grad_fn"].__get__: "asks for the grad_fn of a tensor",
}


class _AutogradOfTensors(TorchFunctionMode):
    """Refuses hooks on tensors, code of the model that asks how a tensor is differentiated, and
    tensors from elsewhere that are: for a graph they would be constants."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = {id(v) for m in module.modules() for v in vars(m).values()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        why = _HOOKS.get(func)
        if func in _QUESTIONS and not _is_torch(_caller()):
            why = _QUESTIONS[func]
        if why:
            raise CannotCapture(f"its forward {why}: a graph would not")
        out = func(*args, **(kwargs or {}))
        if any(map(_is_fake, pytree.tree_leaves(out))) and any(
            map(self._is_foreign, pytree.tree_leaves((args, kwargs)))
        ):
            raise CannotCapture(FOREIGN)
        return out

    def _is_foreign(self, value: Any) -> bool:
        """Whether a tensor is learned, and not one that the export knows: those are fake."""
        if not isinstance(value, Tensor) or _is_fake(value):
            return False
        return (value.requires_grad or isinstance(value, nn.Parameter)) and id(
            value
        ) not in self.held


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _caller() -> Any:
    """The frame that made a call, behind the modes that it went through."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back:
        frame = frame.f_back
    return frame


def _is_torch(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"
