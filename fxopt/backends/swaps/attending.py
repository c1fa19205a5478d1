"""Attention in fused forwards: whoever runs it, on the backend that the recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from fxopt.kernels.attention import Choice, choose, steers
from fxopt.kernels.attention import attend as attend_by
from fxopt.kernels.attention_backends import BACKENDS, Call
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
    if own is not None and active.asked in BACKENDS:
        raise AttentionRefused(active.asked, str(call), (f"the model has {own}",))
    active.is_idle = own is not None or not steers(active.asked, call.device)
    choice = choose(active.asked, lambda: call) if own is None else Choice("pytorch", f"with {own}")
    active.choices[choice] = None
    return attend_by(choice, lambda: call, run)
