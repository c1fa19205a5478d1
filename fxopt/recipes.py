"""Recipes: in which formats the block linears of a model are multiplied, as data.

A linear y = x W^T + b of M tokens, K inputs and N outputs runs three GEMMs, each `a @ b^T`,
contracted over the last dim of both operands:

    fprop   a = x [M, K]     b = W [N, K]
    dgrad   a = g [M, N]     b = W^T [K, N]     (g is the gradient of y)
    wgrad   a = g^T [N, M]   b = x^T [K, M]
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fxopt import roles
from fxopt.errors import InvalidRecipe, UnknownRecipe
from fxopt.gemms import GEMMS, HIGH_PRECISION, Gemm, Operand, from_data, gemm, to_data
from fxopt.recipe_errors import NoStoredRecipe, OtherStoredRecipe
from fxopt.recipe_problems import misshapen, problems
from fxopt.schedule import Phase

__all__ = ["RECIPES", "Gemm", "Operand", "Phase", "Recipe", "find", "gemm"]

FILE = "fxopt_recipe.json"
# What `Recipe.asked_attention` is of `attention="fp8"`: it may be emulated, or it may not.
FP8_ATTENTION = ("fp8", "fp8 without emulation")


@dataclass(frozen=True)
class Recipe:
    """Numerics of one optimization.

    name: as given to the doors and printed in reports.
    fprop, dgrad, wgrad: the three GEMMs of a block linear; None is the model's own dtype.
    keep: linears that stay in the model's dtype: globs over their fully qualified names, or roles,
        "role:" and a name in `fxopt.roles.ROLES`.
    profit: "model" quantizes on a GPU where the cost model says that it pays, "always" wherever
        it can be done.
    emulate: whether devices without the units compute the same by exact emulation; if not, the
        doors refuse them.
    schedule: steps in which a GEMM has other formats; `fxopt.at_step` says which step it is.
    overrides: pairs of a glob or role as in `keep` and a recipe, whose GEMMs and schedule its
        linears have instead of these; the first that matches counts.
    history: delayed scaling: a tensor is scaled by the largest magnitude that it had in this many
        steps before, so that it is quantized in one pass; 0 for its own. Larger values saturate.
        For blocks "tensor"; `fxopt.at_step` says which step it is. Weights have a history if
        `all_gather` is "model".
    margin: powers of two between that magnitude and the format's largest value.
    all_gather: what FSDP2 gathers of quantized weights: "model", in the model's dtype; "fp8", the
        codes that their products read, with the same results. Beside a history weights are then
        scaled by their own magnitudes, gathered or not.
    attention: who runs the attentions of rewritten blocks: "pytorch", as it chooses; the name of a
        backend, and calls that it refuses raise `AttentionRefused`; "auto", what was measured on
        the device, else "pytorch". "varlen" packs away keys that a mask leaves out; "flex"
        skips blocks of scores that a mask of any kind hides; "fp8" runs
        its forward on e4m3 codes of queries, keys and values, with a scale for each sample and
        head, and its backward in the model's dtype.
    saved: what fused ops keep of activations for their own backward: "model", the activations;
        "fp8", e4m3 codes with a scale for each 128 neighbours, half the bytes, which changes
        gradients. Also without a quantized GEMM; fp64 stays.

    Raises:
        InvalidRecipe: fields contradict each other; all contradictions are listed.
    """

    name: str
    fprop: Gemm | None = None
    dgrad: Gemm | None = None
    wgrad: Gemm | None = None
    keep: tuple[str, ...] = ()
    profit: str = "model"
    emulate: bool = True
    schedule: tuple[Phase, ...] = ()
    overrides: tuple[tuple[str, Recipe], ...] = ()
    history: int = 0
    margin: int = 0
    all_gather: str = "model"
    attention: str = "auto"
    saved: str = "model"

    def __post_init__(self) -> None:
        found = list(misshapen(self)) or list(problems(self))
        if found:
            raise InvalidRecipe(self.name, "; ".join(found))

    @property
    def places(self) -> tuple[str, ...]:
        """The globs and roles that have to match something."""
        return (*self.keep, *(where for where, _ in self.overrides))

    @property
    def parts(self) -> tuple[Recipe, ...]:
        """The recipe and those of its overrides."""
        return (self, *(recipe for _, recipe in self.overrides))

    @property
    def quantizes(self) -> bool:
        """Whether any linear may be quantized, in any step."""
        return any(part.gemms for part in self.parts)

    @property
    def is_scheduled(self) -> bool:
        """Whether any linear's formats depend on the step."""
        return any(part.schedule for part in self.parts)

    @property
    def is_delayed(self) -> bool:
        """Whether any linear's scales depend on the steps before."""
        return any(part.history for part in self.parts)

    @property
    def asked_attention(self) -> str:
        """`attention`; of "fp8" also whether it may be emulated."""
        return FP8_ATTENTION[not self.emulate] if self.attention == "fp8" else self.attention

    def of(self, fqn: str) -> Recipe | None:
        """Under which recipe the linear of this name runs; None for the model's dtype."""
        if any(roles.matches(where, fqn) for where in self.keep):
            return None
        found = (recipe for where, recipe in self.overrides if roles.matches(where, fqn))
        recipe = next(found, self)
        if recipe.history and recipe.all_gather != self.all_gather:  # of an override
            recipe = replace(recipe, all_gather=self.all_gather)
        return recipe if recipe.gemms else None

    @property
    def gemms(self) -> list[tuple[str, Gemm]]:
        """The quantized GEMMs by name, those of the schedule included, those of overrides not."""
        found = [(name, getattr(self, name)) for name in GEMMS]
        found += [(str(phase), phase.formats) for phase in self.schedule]
        return [(name, gemm) for name, gemm in found if gemm is not None]

    def at(self, step: int | None) -> Recipe:
        """What is in force in a step, without a schedule; None is for outside of all phases."""
        changed: dict[str, Any] = {
            phase.gemm: phase.formats
            for phase in self.schedule
            if step is not None and step in phase
        }
        overrides = tuple((where, recipe.at(step)) for where, recipe in self.overrides)
        return replace(self, schedule=(), overrides=overrides, **changed)

    @cached_property
    def key(self) -> str:
        """What `find` gives this recipe back for: its name in the table, or its JSON."""
        return self.name if RECIPES.get(self.name) == self else self.to_json()

    def to_json(self) -> str:
        """The recipe as one JSON object."""
        return json.dumps(self._to_data())

    def _to_data(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {name: to_data(data[name]) for name in GEMMS}
        data["keep"] = list(self.keep)
        data["schedule"] = [phase.to_data() for phase in self.schedule]
        data["overrides"] = [[where, recipe._to_data()] for where, recipe in self.overrides]
        return data

    def _numerics(self) -> dict[str, Any]:
        """What changes numbers by more than their rounding, as it stands in JSON."""
        data = self._to_data()
        del data["name"], data["emulate"]
        # Backends differ by rounding.
        data["attention"] = "fp8" if self.attention == "fp8" else HIGH_PRECISION
        if not self.is_delayed:  # else it says whether weights have a history
            data["all_gather"] = "model"
        formats = (*GEMMS, "schedule", "history", "margin")
        data["overrides"] = [[w, {f: part[f] for f in formats}] for w, part in data["overrides"]]
        return data

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe that `to_json` came from.

        Raises:
            InvalidRecipe: no JSON object, a field that is not known, or contradictory fields.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidRecipe("", f"it is no JSON: {error}") from None
        return Recipe._from_data(data)

    @staticmethod
    def _from_data(data: Any) -> Recipe:
        if not isinstance(data, dict) or "name" not in data:
            raise InvalidRecipe("", "it is no JSON object with a name")
        name, data = data["name"], dict(data)
        unknown = data.keys() - {f.name for f in fields(Recipe)}
        if unknown:
            raise InvalidRecipe(name, f"unknown field {', '.join(sorted(unknown))}")
        for field in ("keep", "schedule", "overrides"):
            if not isinstance(data.setdefault(field, []), list):
                raise InvalidRecipe(name, f"{field} is {data[field]!r}, not a list")
        for pair in data["overrides"]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise InvalidRecipe(name, f"override {pair!r} is not a glob or role and a recipe")
        data |= {g: from_data(name, g, data.get(g, HIGH_PRECISION)) for g in GEMMS}
        data["keep"] = tuple(data["keep"])
        data["schedule"] = tuple(Phase.from_data(name, phase) for phase in data["schedule"])
        data["overrides"] = tuple((w, Recipe._from_data(recipe)) for w, recipe in data["overrides"])
        return Recipe(**data)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the recipe into the directory of a checkpoint, as `fxopt_recipe.json`.

        One rank may, or all.
        """
        path = Path(directory) / FILE
        written = path.with_name(f"{FILE}.{os.getpid()}")
        written.write_text(self.to_json() + "\n")
        written.replace(path)

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> Recipe:
        """The recipe that was saved beside a checkpoint.

        Raises:
            NoStoredRecipe: there is none.
            InvalidRecipe: it was written by a version that knew other fields, or by hand.
        """
        path = Path(directory) / FILE
        try:
            return Recipe.from_json(path.read_text())
        except FileNotFoundError:
            raise NoStoredRecipe(str(path)) from None

    def check(self, directory: str | os.PathLike[str]) -> None:
        """Raise if the checkpoint in `directory` was trained under another recipe.

        Its name, `emulate`, the backend of `attention`, which is rounding, and without a history
        `all_gather` may differ.

        Raises:
            OtherStoredRecipe: with every field that differs, and both values.
            NoStoredRecipe, InvalidRecipe: as `load`.
        """
        stored = Recipe.load(directory)
        theirs, ours = stored._numerics(), self._numerics()
        differences = [
            (field, json.dumps(theirs[field]), json.dumps(value))
            for field, value in ours.items()
            if theirs[field] != value
        ]
        if differences:
            path = str(Path(directory) / FILE)
            raise OtherStoredRecipe(path, stored.name, self.name, differences)


def _table() -> Iterator[Recipe]:
    yield Recipe("bf16")
    tensorwise = Recipe(
        "fp8_tensorwise",
        fprop=gemm("e4m3/tensor/fp32", "e4m3/tensor/fp32", "fast"),
        dgrad=gemm("e5m2/tensor/fp32", "e4m3/tensor/fp32"),
        wgrad=gemm("e5m2/tensor/fp32", "e4m3/tensor/fp32"),
    )
    yield tensorwise
    # Of the recipes that run natively here, the one with the least to quantize.
    yield replace(tensorwise, name="fp8")
    rowwise = gemm("e4m3/row/pow2", "e4m3/row/pow2")
    yield Recipe("fp8_rowwise", replace(rowwise, accumulation="fast"), rowwise, rowwise)
    yield Recipe(
        "fp8_rowwise_gw_hp",
        fprop=gemm("e4m3/row/pow2", "e4m3/row/pow2", "fast"),
        dgrad=gemm("e4m3/row/pow2", "e4m3/tensor/pow2"),
    )
    # Blocks of 128: DeepSeek-V3, https://arxiv.org/abs/2412.19437
    weight = gemm("e4m3/1x128/fp32", "e4m3/128x128/fp32")
    yield Recipe("fp8_blockwise", weight, weight, gemm("e4m3/1x128/fp32", "e4m3/1x128/fp32"))
    # Scales rounded up, e4m3 for gradients as well: https://arxiv.org/abs/2506.08027
    mx = gemm("e4m3/1x32/e8m0", "e4m3/1x32/e8m0")
    yield Recipe("mxfp8", mx, mx, mx)
    # Square blocks of weights, stochastic gradients, Hadamard in wgrad alone:
    # https://arxiv.org/abs/2509.25149
    yield Recipe(
        "nvfp4",
        fprop=gemm("e2m1/1x16/two_level", "e2m1/16x16/two_level"),
        dgrad=gemm("e2m1/1x16/two_level/stochastic", "e2m1/16x16/two_level"),
        wgrad=gemm("e2m1/1x16/two_level/stochastic/hadamard", "e2m1/1x16/two_level/hadamard"),
    )


RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _table()})


@cache
def find(recipe: str | Recipe) -> Recipe:
    """The recipe of this name, or from this JSON; a recipe is returned as it is.

    Raises:
        UnknownRecipe, InvalidRecipe: with the nearest names, with all that is wrong.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe.lstrip().startswith("{"):
        return Recipe.from_json(recipe)
    if recipe not in RECIPES:
        raise UnknownRecipe(recipe, list(RECIPES))
    return RECIPES[recipe]
