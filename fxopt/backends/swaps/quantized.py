"""Which linears of a fused forward run in the formats of a recipe, and those that do.

The roles are those of the rule `quantized_linear`: the captured doors decide alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt import cost
from fxopt.kernels.gathered import require_whole
from fxopt.kernels.in_force import is_high_precision
from fxopt.kernels.registration import ops
from fxopt.kernels.scaled_matmul import MULTIPLE
from fxopt.passes.rules.quantized_linear import FLOAT64, KEPT, PER_SAMPLE, SIZES
from fxopt.recipes import Recipe

UNPROFITABLE = "FP8 does not pay at this number of tokens"
NOT_PLAIN = "it is no plain nn.Linear, and runs as the module it is"


class Formats(NamedTuple):
    """A recipe, and by path those linears of a module that run under another, or under none."""

    recipe: Recipe
    exceptions: frozenset[tuple[str, Recipe | None]]


@dataclass
class Quantizing:
    """A recipe at work on one module.

    theta: the bound of `cost.fp8_pays` that a linear has to meet; None for any linear.
    exceptions: linears that run under another recipe, or under none.
    accepted: by which recipes the linears met so far run.
    refused: why the others stay in the model's dtype.
    """

    recipe: Recipe
    theta: float | None
    exceptions: dict[nn.Module, Recipe | None] = field(default_factory=dict)
    accepted: dict[nn.Module, Recipe] = field(default_factory=dict)
    refused: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)


_active: ContextVar[Quantizing | None] = ContextVar("active", default=None)


@contextmanager
def quantizing(formats: Formats, theta: float | None, module: nn.Module) -> Iterator[Quantizing]:
    """Run fused forwards of `module` in `formats`, where `theta` allows it."""
    exceptions = {module.get_submodule(path): other for path, other in formats.exceptions}
    active = Quantizing(formats.recipe, theta, exceptions)
    token = _active.set(active if formats.recipe.quantizes else None)
    try:
        yield active
    finally:
        _active.reset(token)


class Unbiased(NamedTuple):
    """Stands in for a plain linear whose bias is left to the op that reads it."""

    weight: Tensor
    bias: None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def is_plain(linear: Any) -> bool:
    """Whether `linear` is its weight and bias and nothing else."""
    return type(linear) is Unbiased or (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and not is_traceable_wrapper_subclass(linear.weight)
    )


def quantizes(x: Tensor, linear: nn.Module, *, is_swapped: bool = False) -> Recipe | None:
    """The recipe by which `linear` of `x` runs; None for the model's dtype.

    Args:
        is_swapped: whether it is the linear's own replaced forward that asks.
    """
    active = _active.get()
    if active is None or not isinstance(linear, nn.Linear):
        return None
    reasons = tuple(_reasons(active, x, linear, is_swapped))
    recipe = None if reasons else active.exceptions.get(linear, active.recipe)
    if recipe is None:
        require_whole([linear.weight], "; ".join(reasons))
        active.refused[linear] = reasons
    else:
        active.accepted[linear] = recipe
    return recipe


def reason(linear: nn.Module) -> str:
    """Why `linear`, asked for last, stays in the model's dtype."""
    active = _active.get()
    return "; ".join(active.refused.get(linear, ())) if active is not None else ""


def _reasons(active: Quantizing, x: Tensor, linear: nn.Linear, is_swapped: bool) -> Iterator[str]:
    if not is_swapped and not is_plain(linear):
        yield NOT_PLAIN
    if active.exceptions.get(linear, active.recipe) is None:
        yield KEPT
    if x.dim() < 3 or x.shape[-2] == 1:
        yield PER_SAMPLE
    if active.theta is not None and not is_high_precision():  # a proof has other sizes
        out, features = linear.weight.shape
        # x may be what the linear's input is yet to be made of, of another width.
        if not _pays(x.numel() // x.shape[-1], out, features, active.theta):
            yield UNPROFITABLE
    uneven = [s for s in linear.weight.shape if s % MULTIPLE]
    if uneven:
        yield SIZES.format(" and ".join(map(str, uneven)))
    if x.dtype == torch.float64 and not is_high_precision():
        yield FLOAT64


_pays = cache(lambda m, n, k, theta: bool(cost.fp8_pays(m, n, k, theta)))


def multiply(
    x: Tensor, linears: list[nn.Module], recipe: Recipe, *, keeps_x: bool = False
) -> list[Tensor]:
    """What `linears` make of `x`, quantized once for all.

    keeps_x: whether x itself is kept for backward, because what made it keeps it anyway.
    """
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    parameters = (weights, biases, recipe.key)
    outs: list[Tensor] = ops.quantized_linears(x, *parameters, keeps_x)
    return outs
