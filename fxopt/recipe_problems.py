"""What contradicts itself in a recipe, all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from fxopt import all_gather, roles, schedule
from fxopt.errors import nearest
from fxopt.gemms import GEMMS, history_problems
from fxopt.schedule import Phase

if TYPE_CHECKING:
    from fxopt.recipes import Recipe

# Fields with a few values that have names.
CHOICES = {
    "profit": ("model", "always"),
    "all_gather": ("model", "fp8"),
    "attention": (
        *("auto", "pytorch"),
        *("cudnn", "flash", "flash3", "flash4", "efficient", "math", "varlen", "flex"),
        "fp8",
    ),
    "saved": ("model", "fp8"),
}
# Those of them that are no linear's own.
OF_ALL = ("all_gather", "attention", "saved")


def misshapen(recipe: Recipe) -> Iterator[str]:
    """Fields that would not be hashable, or not what they are taken for."""
    for field, kind in (("keep", str), ("schedule", Phase), ("overrides", tuple)):
        value = getattr(recipe, field)
        if not isinstance(value, tuple) or not all(isinstance(v, kind) for v in value):
            yield f"{field} is {value!r}, not a tuple of {kind.__name__}"
        elif field == "overrides":
            for pair in value:
                if list(map(type, pair)) != [str, type(recipe)]:
                    yield f"override {pair!r} is not a glob or role and a Recipe"
                elif pair[1].places:
                    yield f"override {pair[0]!r} has keep or overrides of its own"


def problems(recipe: Recipe) -> Iterator[str]:
    """What speaks against a recipe that is not misshapen."""
    for where in recipe.places:
        if (role := roles.unknown(where)) is not None:
            yield f"unknown role {role!r} in {where!r}; known: {', '.join(roles.ROLES)}"
    for name in GEMMS:
        if (product := getattr(recipe, name)) is not None:
            yield from (f"{name}: {problem}" for problem in product.problems())
    yield from schedule.problems(recipe.schedule)
    yield from history_problems(recipe.history, recipe.margin, recipe.gemms)
    yield from all_gather.problems(recipe)
    yield from _stochastic(recipe)
    for field, known in CHOICES.items():
        value = getattr(recipe, field)
        if value not in known:
            close = nearest(str(value), known)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            yield f"unknown {field} {value!r}; {hint}known: {', '.join(known)}"
    yield from _of_overrides(recipe)


def _stochastic(recipe: Recipe) -> Iterator[str]:
    for name, product in recipe.gemms:
        for which in ("a", "b"):
            is_gradient = which == "a" and not name.startswith("fprop")
            if getattr(product, which).stochastic and not is_gradient:
                yield (
                    f"{name}.{which} rounds stochastically; only gradients (a of dgrad and wgrad) "
                    "may, as the forward of a checkpoint runs twice and would draw twice"
                )


def _of_overrides(recipe: Recipe) -> Iterator[str]:
    defaults = {field.name: field.default for field in fields(recipe)}
    for where, other in recipe.overrides:
        for field in OF_ALL:
            if getattr(other, field) != defaults[field]:
                yield f"override {where!r} has its own {field}; give it to the whole recipe"
