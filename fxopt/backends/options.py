"""Options that all doors share, checked in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxopt.errors import MetaModel, UnknownOption, UnknownRecipe, UnknownRule, check_torch
from fxopt.errors import check_inputs as check_signature
from fxopt.passes.rule import Rule
from fxopt.passes.rules import CATALOGUE
from fxopt.recipes import RECIPES

EXECUTIONS = ("eager", "compile")


def check(*, recipe: str, execution: str = "eager", rules: Iterable[str] = ()) -> None:
    """Raise on a torch that is too old and on names that are not known."""
    check_torch(torch.__version__)
    if recipe not in RECIPES:
        raise UnknownRecipe(recipe, list(RECIPES))
    if execution not in EXECUTIONS:
        raise UnknownOption(execution, EXECUTIONS)
    names = [rule.name for rule in CATALOGUE]
    for rule in rules:
        if rule not in names:
            raise UnknownRule(rule, names)


def check_inputs(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> None:
    """Raise if `model` cannot run on `inputs`."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    check_signature(model, args, kwargs)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise MetaModel(type(model).__name__, name)


def rules_for(recipe: str, *, compiled: bool = False) -> Sequence[Rule]:
    """The part of the catalogue that a recipe and an execution use."""
    assert recipe in RECIPES
    return tuple(rule for rule in CATALOGUE if rule.compiled or not compiled)


def target_name(device: torch.device | None) -> str:
    """ "cpu" or "cuda:sm_90"."""
    if device is None or device.type != "cuda":
        return "cpu" if device is None else device.type
    if not torch.cuda.is_available():
        return "cuda"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:sm_{major}{minor}"
