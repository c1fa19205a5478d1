"""The doors with a recipe's `attention`, and which backend a model runs behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxopt
from fxopt.recipes import Recipe

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
