"""What a recipe asks of a model as a whole, before any block is looked at."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from fxopt.errors import KeepMatchesNothing, LowPrecisionParameter, NotNative
from fxopt.kernels.scaled_attention import missing
from fxopt.kernels.scaled_matmul import native_capability
from fxopt.passes.rules.quantized_linear import OUTSIDE, REMEDY, RULE
from fxopt.recipes import Recipe
from fxopt.report import Declined
from fxopt.roles import matches


def check_model(recipe: Recipe, model: nn.Module) -> None:
    """Raise if `recipe` cannot be had on `model` as it is.

    Raises:
        LowPrecisionParameter, KeepMatchesNothing, NotNative: see there.
    """
    if recipe.quantizes:
        check_parameters(recipe, model.named_parameters())
        linears = [fqn for fqn, m in model.named_modules() if isinstance(m, nn.Linear)]
        for where in recipe.places:
            if not any(matches(where, fqn) for fqn in linears):
                raise KeepMatchesNothing(where, linears)
    for device in {p.device for p in model.parameters()} - {torch.device("meta")}:
        check_device(recipe, device)


def check_parameters(recipe: Recipe, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise LowPrecisionParameter if `recipe` quantizes and a parameter is in FP8 already."""
    for name, parameter in named:
        if recipe.quantizes and parameter.is_floating_point() and parameter.element_size() == 1:
            raise LowPrecisionParameter(name, str(parameter.dtype))


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Raise NotNative if `recipe` may not be emulated and `device` has not the units it needs."""
    if recipe.emulate:
        return
    if recipe.attention == "fp8" and (lacking := missing(device)) is not None:
        raise NotNative(recipe.name, str(device), lacking)
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    for name, gemm in (gemm for part in recipe.parts for gemm in part.gemms):
        needed = native_capability(gemm)
        if needed is None:
            raise NotNative(recipe.name, str(device), f"units for {name} that no device runs yet")
        if has < needed:
            major, minor = needed
            raise NotNative(recipe.name, str(device), f"compute capability {major}.{minor}")


def outside(recipe: Recipe, model: nn.Module, blocks: Iterable[str]) -> tuple[Declined, ...]:
    """For the report: the linears outside the blocks, which stay in the model's dtype."""
    if not recipe.quantizes:
        return ()
    prefixes = tuple(f"{fqn}." for fqn in blocks if fqn)
    if not prefixes:
        return ()  # the model is one block
    return tuple(
        Declined(RULE.name, fqn, "Linear", source(m), (OUTSIDE,), REMEDY, type(m).__name__)
        for fqn, m in model.named_modules()
        if isinstance(m, nn.Linear) and not fqn.startswith(prefixes)
    )


def exceptions(recipe: Recipe, fqn: str, block: nn.Module) -> frozenset[tuple[str, Recipe | None]]:
    """Linears of a block that do not run under the recipe itself, by their path in the block, and
    under which instead; None is the model's dtype. Blocks that agree in it can share a graph."""
    paths = (path for path, m in block.named_modules() if isinstance(m, nn.Linear))
    found = ((path, recipe.of(f"{fqn}.{path}" if fqn else path)) for path in paths)
    return frozenset((path, other) for path, other in found if other is not recipe)


def source(module: nn.Module) -> str:
    """ "file.py:line" of the forward that a module's class has."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""
