"""Forwards that checkpoint themselves: transformers wraps those of its layers, class by class.

Such a wrapper asks the layer at every call whether to checkpoint; if so, it runs what it wraps
inside of `torch.utils.checkpoint`. The doors rewrite what is wrapped and leave the wrapper around
it, so checkpoints can be turned on and off before and after a door is opened.

Source: https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_layers.py
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

# What a wrapper reads off its layer to run the rest with.
CHECKPOINT = "_gradient_checkpointing_func"


def within(own: Any) -> Callable[..., Any]:
    """What a module's own forward, or that of another door, runs within its checkpoint."""
    if not _is_wrapper(getattr(own, "__func__", None)):
        return getattr(own, "within_checkpoint", own)
    return unwrapped(own.__func__).__get__(own.__self__)


def unwrapped(function: Any) -> Any:
    """A class's forward less wrappers around it; each subclass adds one of its own."""
    while _is_wrapper(function):
        function = function.__wrapped__
    return function


def call(own: Any, inner: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`inner(*args, **kwargs)`, in a checkpoint where `own` would make one."""
    own = getattr(own, "own", own)  # of another door
    if not _is_wrapper(getattr(own, "__func__", None)):
        return inner(*args, **kwargs)
    # FSDP2 changes the class, and with it the wrapper that counts.
    wrapper = type(own.__self__).forward
    return _around(wrapper, inner)(own.__self__, *args, **kwargs)


def _is_wrapper(function: Any) -> bool:
    # Other forwards checkpoint parts of themselves, and wrap nothing.
    wraps = isinstance(function, FunctionType) and hasattr(function, "__wrapped__")
    return wraps and CHECKPOINT in function.__code__.co_names


def _around(wrapper: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapper` with `inner`, of the same module, in place of what it wraps."""

    def of_module(_: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    cells = [
        CellType(of_module) if cell.cell_contents is wrapper.__wrapped__ else cell
        for cell in wrapper.__closure__
    ]
    code, namespace = wrapper.__code__, wrapper.__globals__
    return FunctionType(code, namespace, wrapper.__name__, wrapper.__defaults__, tuple(cells))
