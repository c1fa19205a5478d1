"""The doors with a recipe's `attention`, and which backend a model runs behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxopt
from fxopt.recipes import Recipe
from tests.backends.toys import stack, tokens
from tests.families import FAMILIES, loss

Door = Callable[[nn.Module, Recipe], Any]

KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_attention_math": "math",
    "fxopt::scaled_attention": "fp8",
}


def optimized(model: nn.Module, recipe: Recipe) -> None:
    fxopt.optimize(model, recipe=recipe)


def compiled(model: nn.Module, recipe: Recipe, inner: str = "eager", **options: Any) -> None:
    model.compile(backend="fxopt", options={"recipe": recipe, "inner": inner}, **options)


def swapped(model: nn.Module, recipe: Recipe) -> None:
    fxopt.swap(model, recipe=recipe)


DOORS = (optimized, compiled, swapped)
UNCOMPILED = (optimized, swapped)


def asking(attention: str) -> Recipe:
    return Recipe("mine", attention=attention)


def small(door: Door, recipe: Recipe) -> tuple[nn.Module, Callable[[], Any]]:
    """A model that is quickly captured, behind a door, and what runs it; `swap` knows no toys."""
    if door is swapped:
        family = FAMILIES["flux"]
        model, inputs = family.build(), family.inputs(2, 0, torch.float32)
        run: Callable[[], Any] = partial(loss, model, inputs)
    else:
        model = stack()
        run = partial(model, tokens())
    door(model, recipe)
    return model, run


def kernels(run: Callable[[], Any]) -> Counter[str]:
    """Forwards of attention that a run makes, by backend."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    events = {KERNELS[e.key]: e.count for e in seen.key_averages() if e.key in KERNELS}
    return Counter(events)


def lines(model: nn.Module) -> list[str]:
    """What the report says of attention."""
    text = str(fxopt.report(model)).splitlines()
    return [line.strip() for line in text if "attention:" in line]
