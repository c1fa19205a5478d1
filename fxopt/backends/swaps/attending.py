"""Attention in fused forwards: whoever runs it, on the backend that the recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxopt.kernels import fp8_attention
from fxopt.kernels.attention import Choice, attention, choose, named, steers
from fxopt.kernels.attention import attend as attend_by
from fxopt.kernels.attention_backends import Call
from fxopt.recipe_errors import AttentionRefused


@dataclass
class Attending:
    """What a recipe asks for, and who ran the attentions of one module so far.

    is_idle: nothing is asked for but what the module does on its own.
    """

    asked: str
    choices: dict[Choice, None] = field(default_factory=dict)
    is_idle: bool = False


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
    run: Callable[[], Tensor],
    described: Callable[[], Call],
    setting: Callable[[], str | None] = lambda: None,
) -> Tensor:
    """What `run`, the model's own code, returns; it calls scaled_dot_product_attention once.

    Args:
        described: the call.
        setting: by which the model calls something else instead; None if it does not.

    Raises:
        AttentionRefused: the recipe names a backend that cannot run this.
    """
    active = _active.get()
    if active is None or active.is_idle:
        return run()
    call, own = described(), setting()
    name = named(active.asked)
    if own is not None and name is not None:
        raise AttentionRefused(name, str(call), (f"the model has {own}",))
    active.is_idle = own is not None or not steers(active.asked, call.device)
    choice = choose(active.asked, lambda: call) if own is None else Choice("pytorch", f"with {own}")
    active.choices[choice] = None
    if choice.backend == fp8_attention.NAME:
        with _Instead(active.asked):
            return run()
    return attend_by(choice, lambda: call, run)


class _Instead(TorchFunctionMode):
    """Makes scaled_dot_product_attention `fxopt::attention`, which needs its tensors."""

    def __init__(self, asked: str) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return attention(*_arguments(*args, **(kwargs or {})), self.asked)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...]:
    """Those of scaled_dot_product_attention, in the order of the op."""
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
