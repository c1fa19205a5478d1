"""Attention in fused forwards: whoever runs it, on the backend that the recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxopt.kernels import fp8_attention
from fxopt.kernels.attention import Choice, attention, choose, named, steers
from fxopt.kernels.attention import attend as attend_by
from fxopt.kernels.attention_call import Arguments, Call, as_autocast
from fxopt.recipe_errors import AttentionRefused


@dataclass
class Attending:
    """What a recipe asks for, and who ran the attentions of one module so far.

    choices: by backend and kind of call, the first of each.
    idle: devices on which nothing is asked for but what the module does on its own.
    """

    asked: str
    choices: dict[Hashable, Choice] = field(default_factory=dict)
    idle: set[torch.device] = field(default_factory=set)


_active: ContextVar[Attending | None] = ContextVar("attending", default=None)


@contextmanager
def attending(active: Attending) -> Iterator[None]:
    """Run fused forwards with what `active` asks for; a proof asks for nothing."""
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


def attend(
    run: Callable[[], Tensor], query: Tensor, setting: Callable[[], str | None] = lambda: None
) -> Tensor:
    """What `run`, the model's own code, returns; it calls scaled_dot_product_attention.

    Args:
        query: that it attends with, in any layout.
        setting: by which the model calls something else instead; None if it does not.

    Raises:
        AttentionRefused: the recipe names a backend that cannot run this.
    """
    active = _active.get()
    if active is None or query.device in active.idle:
        return run()
    own, name = setting(), named(active.asked)
    what = f"the attention of queries {list(query.shape)}"
    if own is not None:
        if name is not None:
            raise AttentionRefused(name, what, (f"the model has {own}",))
        active.choices.setdefault(own, Choice("pytorch", f"with {own}"))
        active.idle.add(query.device)
        return run()
    with _Steering(active) as steering:
        out = run()
    if name is not None and not steering.has_met:
        why = "the model's code calls no scaled_dot_product_attention"
        raise AttentionRefused(name, what, (why,))
    if not steers(active.asked, query.device):
        active.idle.add(query.device)
    return out


class _Steering(TorchFunctionMode):
    """Has each attention in it run as `active` asks, by the tensors that the model's code gives."""

    def __init__(self, active: Attending) -> None:
        super().__init__()
        self.active, self.has_met = active, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return run()
        self.has_met = True
        call = Call.of(*args, **(kwargs or {}))
        choice = choose(self.active.asked, lambda: call)
        self.active.choices.setdefault((choice.backend, call.kind), choice)
        if choice.backend == fp8_attention.NAME:
            query, key, value, *others = Arguments(*args, **(kwargs or {}))
            return attention(*as_autocast(query, key, value), *others, None, self.active.asked)
        return attend_by(choice, lambda: call, run)
