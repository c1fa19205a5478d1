"""Which formats a node multiplies in: its forward decides, and its backward does likewise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fxopt.kernels.counters import without_demoted
from fxopt.kernels.gathered import require_formats, require_whole
from fxopt.recipe_errors import HistoryInGraph, ScheduleInGraph, StepChanged, StepNotTold
from fxopt.recipes import Recipe, find
from fxopt.schedule import current_step

_off: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def high_precision() -> Iterator[None]:
    """Multiply in the model's own dtype, to see what else a rewrite changes."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def is_high_precision() -> bool:
    """Whether `high_precision` is on."""
    return _off.get()


class Decision(NamedTuple):
    """What a forward and its backward go by.

    recipe: without a schedule.
    step: if formats or scales depend on it.
    has_grad: whether gradients are on.
    """

    recipe: Recipe
    step: int | None
    has_grad: bool


def decide(recipe: str, weights: Sequence[Tensor]) -> Decision | None:
    """What holds now for a node with these weights; None where no GEMM is quantized.

    Raises:
        StepNotTold, ScheduleInGraph, HistoryInGraph, WeightGathered: see there.
    """
    if _off.get():
        require_whole(weights, "this product wants it in the model's dtype")
        return None
    found, step = find(recipe), None
    if found.schedule or found.history:
        if get_proxy_mode() is not None:
            raise (ScheduleInGraph if found.schedule else HistoryInGraph)(found.name)
        step = current_step()
        if step is None:
            raise StepNotTold(found.name, "a schedule" if found.schedule else "a history")
        found = _at(recipe, step)
    found = without_demoted(found, weights)
    require_formats(weights, found)
    return Decision(found, step, torch.is_grad_enabled()) if found.gemms else None


@lru_cache(maxsize=64)
def _at(recipe: str, step: int) -> Recipe:
    return find(recipe).at(step)


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors in a node whose `ctx.step` is set, and beside them that step: a checkpoint
    computes both again."""
    step = [] if ctx.step is None else [torch.tensor(ctx.step, device="cpu")]
    ctx.save_for_backward(*tensors, *step)


def saved_tensors(ctx: Any) -> Sequence[Any]:
    """What `save_for_backward` was given.

    Raises:
        StepChanged: it was computed again, in another step.
    """
    if ctx.step is None:
        return ctx.saved_tensors
    *saved, step = ctx.saved_tensors
    if step.item() != ctx.step:
        raise StepChanged(ctx.step, step.item())
    return saved
