"""Options that all doors share, checked in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxopt import cost, hardware
from fxopt.errors import MetaModel, UnknownOption, UnknownRule, check_torch
from fxopt.errors import check_inputs as check_signature
from fxopt.passes.rule import Rule
from fxopt.passes.rules import CATALOGUE, quantized_linear
from fxopt.recipe_errors import (
    AllGatherInGraph,
    HistoryInGraph,
    MathInGraph,
    SavedInGraph,
    ScheduleInGraph,
)
from fxopt.recipes import Recipe, find
from fxopt.torchao_recipes import from_torchao

EXECUTIONS = ("eager", "compile")


def check(
    *,
    recipe: str | Recipe,
    execution: str = "eager",
    rules: Iterable[str] = (),
    inner: str = "inductor",
) -> Recipe:
    """The recipe of a name, of JSON or of torchao's configuration.

    Raises on a torch that is too old, on names that are not known, on what compilers cannot have.
    """
    check_torch(torch.__version__)
    found = find(recipe if isinstance(recipe, (str, Recipe)) else from_torchao(recipe))
    if execution not in EXECUTIONS:
        raise UnknownOption(execution, EXECUTIONS)
    if execution == "compile" and found.is_scheduled:
        raise ScheduleInGraph(found.name)
    if execution == "compile" and found.is_delayed:
        raise HistoryInGraph(found.name)
    if execution == "compile" and found.all_gather != "model":
        raise AllGatherInGraph(found.name)
    if (execution, inner, found.attention) == ("compile", "inductor", "math"):
        raise MathInGraph(found.name)
    if execution == "compile" and found.saved != "model":
        raise SavedInGraph(found.name)
    names = [rule.name for rule in CATALOGUE]
    for rule in rules:
        if rule not in names:
            raise UnknownRule(rule, names)
    return found


def rule_names(strict: str | Iterable[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (strict,) if isinstance(strict, str) else tuple(strict)


def check_inputs(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> None:
    """Raise if `model` cannot run on `inputs`."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    check_signature(model, args, kwargs)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise MetaModel(type(model).__name__, name)


def rules_for(
    recipe: Recipe,
    *,
    compiled: bool = False,
    block: str | None = "",
    target: hardware.Target | None = None,
) -> Sequence[Rule]:
    """The part of the catalogue that a recipe and an execution use.

    Args:
        compiled: whether a compiler gets the graphs.
        block: name of the block that they are of; None for graphs of whole models.
        target: what the graphs will run on, for the cost model; None for a device that it does not
            know, where all that can be quantized is.
    """
    rules = [rule for rule in CATALOGUE if rule.compiled or not compiled]
    if not recipe.quantizes:
        return tuple(rule for rule in rules if rule.tier != "low_precision")
    quantized = quantized_linear.rule(recipe, block, threshold(recipe, target))
    return tuple(quantized if rule is quantized_linear.RULE else rule for rule in rules)


def threshold(recipe: Recipe, target: hardware.Target | None) -> float | None:
    """The bound of `cost.fp8_pays` for what a recipe may quantize; None for all that can be."""
    if target is None or recipe.profit == "always":
        return None
    return cost.fp8_threshold(target)


def target_of(device: torch.device) -> hardware.Target | None:
    """The device as the cost model knows it; None for a CPU, which emulates at any price."""
    if device.type != "cuda":
        return None
    return hardware.of_capability(torch.cuda.get_device_capability(device))


def target_name(device: torch.device | None) -> str:
    """ "cpu" or "cuda:sm_90"."""
    if device is None or device.type != "cuda":
        return "cpu" if device is None else device.type
    if not torch.cuda.is_available():
        return "cuda"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:sm_{major}{minor}"
