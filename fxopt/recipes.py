"""Recipes: in which formats the block linears of a model are multiplied, as data.

A linear y = x W^T + b of M tokens, K inputs and N outputs runs three GEMMs, each `a @ b^T`,
contracted over the last dim of both operands:

    fprop   a = x [M, K]     b = W [N, K]
    dgrad   a = g [M, N]     b = W^T [K, N]     (g is the gradient of y)
    wgrad   a = g^T [N, M]   b = x^T [K, M]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from fxopt.errors import InvalidRecipe, UnknownRecipe

FP8 = ("e4m3", "e5m2")
# By block of an operand: its formats, its kinds of scale, and blocks of the other operand.
BLOCKS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "tensor": (FP8, ("fp32", "pow2"), ("tensor", "row")),
        "row": (FP8, ("fp32", "pow2"), ("tensor", "row")),
        "1x128": (FP8, ("fp32", "pow2"), ("1x128", "128x128")),
        "128x128": (FP8, ("fp32", "pow2"), ("1x128",)),
        "1x32": (FP8, ("e8m0",), ("1x32",)),
        "1x16": (("e2m1",), ("two_level",), ("1x16", "16x16")),
        "16x16": (("e2m1",), ("two_level",), ("1x16",)),
    }
)
GEMMS = ("fprop", "dgrad", "wgrad")
EXTRAS = ("stochastic", "hadamard")
ACCUMULATIONS = ("fp32", "fast")
PROFITS = ("model", "always")
HIGH_PRECISION = "high_precision"


@dataclass(frozen=True)
class Operand:
    """How one operand [rows, contraction] of a GEMM is quantized; written "e4m3/row/pow2".

    format: "e4m3", "e5m2" (FP8) or "e2m1" (FP4).
    block: elements that share a scale, rows x contraction; "tensor" for all, "row" for one row.
    scale: "fp32"; "pow2", an fp32 power of two; "e8m0", an exponent byte; "two_level", e4m3 per
        block times fp32 per tensor. The powers of two are rounded so that nothing saturates.
    stochastic: round up or down at random, unbiased, instead of to nearest with ties to even.
    hadamard: mix 16 neighbours along the contraction first; the other operand does so as well,
        which leaves the product as it is.
    """

    format: str
    block: str
    scale: str
    stochastic: bool = False
    hadamard: bool = False

    def __str__(self) -> str:
        extras = [name for name in EXTRAS if getattr(self, name)]
        return "/".join([self.format, self.block, self.scale, *extras])

    @staticmethod
    @cache
    def parse(text: str) -> Operand:
        """The operand that is written like this.

        Raises:
            InvalidRecipe: saying which part is not known.
        """
        parts = text.split("/") if isinstance(text, str) else []
        if len(parts) < 3 or not set(parts[3:]) <= set(EXTRAS):
            form = f"FORMAT/BLOCK/SCALE, then any of {', '.join(EXTRAS)}"
            raise InvalidRecipe("", f"the operand {text!r} is not of the form {form}")
        format, block, scale = parts[:3]
        return Operand(format, block, scale, *(name in parts[3:] for name in EXTRAS))

    def problems(self) -> Iterator[str]:
        """What contradicts what."""
        if self.block not in BLOCKS:
            yield f"unknown block {self.block!r}; known: {', '.join(BLOCKS)}"
            return
        formats, scales, _ = BLOCKS[self.block]
        if self.format not in formats:
            yield f"format {self.format!r} has no block {self.block}; {' and '.join(formats)} have"
        if self.scale not in scales:
            yield f"blocks {self.block} have {' or '.join(scales)} scales, not {self.scale!r}"
        if self.hadamard and self.format != "e2m1":
            yield f"the Hadamard transform is for e2m1, not for {self.format}"


@dataclass(frozen=True)
class Gemm:
    """The formats of one product a @ b^T.

    accumulation: "fp32", or "fast", which on Hopper keeps about 14 bits between additions and is
        no difference elsewhere.
    """

    a: Operand
    b: Operand
    accumulation: str = "fp32"

    def problems(self) -> Iterator[str]:
        for operand in (self.a, self.b):
            yield from operand.problems()
        a, b = self.a, self.b
        if a.block in BLOCKS and b.block not in BLOCKS[a.block][2]:
            yield f"a block {a.block} of a does not go with {b.block} of b"
        if a.hadamard != b.hadamard:
            yield "the Hadamard transform is on one operand only, which changes the product"
        if (a.format, b.format) == ("e5m2", "e5m2"):
            yield "no hardware multiplies e5m2 by e5m2; make one operand e4m3"
        if self.accumulation not in ACCUMULATIONS:
            known = ", ".join(ACCUMULATIONS)
            yield f"unknown accumulation {self.accumulation!r}; known: {known}"


@dataclass(frozen=True)
class Recipe:
    """Numerics of one optimization.

    name: as given to the doors and printed in reports.
    fprop, dgrad, wgrad: the three GEMMs of a block linear; None is the model's own dtype.
    keep: globs over fully qualified names of linears that stay in the model's dtype.
    profit: "model" quantizes on a GPU where the cost model says that it pays, "always" wherever
        it can be done.
    emulate: whether devices without the units compute the same by exact emulation; if not, the
        doors refuse them.

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

    def __post_init__(self) -> None:
        problems = [f"{name}: {p}" for name, gemm in self.gemms for p in gemm.problems()]
        drawn = {
            "fprop.a": self.fprop and self.fprop.a.stochastic,
            "fprop.b": self.fprop and self.fprop.b.stochastic,
            "dgrad.b": self.dgrad and self.dgrad.b.stochastic,
            "wgrad.b": self.wgrad and self.wgrad.b.stochastic,
        }
        problems += [
            f"{where} rounds stochastically; only gradients (a of dgrad and wgrad) may, as the "
            "forward of a checkpoint runs twice and would draw twice"
            for where, is_drawn in drawn.items()
            if is_drawn
        ]
        if self.profit not in PROFITS:
            problems.append(f"unknown profit {self.profit!r}; known: {', '.join(PROFITS)}")
        if problems:
            raise InvalidRecipe(self.name, "; ".join(problems))

    @property
    def gemms(self) -> list[tuple[str, Gemm]]:
        """The quantized GEMMs by name."""
        found = ((name, getattr(self, name)) for name in GEMMS)
        return [(name, gemm) for name, gemm in found if gemm is not None]

    @property
    def key(self) -> str:
        """What `find` gives this recipe back for: its name in the table, or its JSON."""
        return self.name if RECIPES.get(self.name) == self else self.to_json()

    def to_json(self) -> str:
        """The recipe as one JSON object, to be stored beside a checkpoint."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in GEMMS:
            gemm = data[name]
            data[name] = HIGH_PRECISION if gemm is None else _gemm_to_dict(gemm)
        return json.dumps(data)

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
        if not isinstance(data, dict) or "name" not in data:
            raise InvalidRecipe("", "it is no JSON object with a name")
        unknown = data.keys() - {f.name for f in fields(Recipe)}
        if unknown:
            raise InvalidRecipe(data["name"], f"unknown field {', '.join(sorted(unknown))}")
        for name in GEMMS:
            data[name] = _gemm_from_dict(data["name"], name, data.get(name, HIGH_PRECISION))
        return Recipe(**data | {"keep": tuple(data.get("keep", ()))})


def _gemm_to_dict(gemm: Gemm) -> dict[str, str]:
    return {"a": str(gemm.a), "b": str(gemm.b), "accumulation": gemm.accumulation}


def _gemm_from_dict(recipe: str, name: str, data: Any) -> Gemm | None:
    if data == HIGH_PRECISION:
        return None
    if not isinstance(data, dict) or not {"a", "b"} <= data.keys() <= {"a", "b", "accumulation"}:
        form = f"{HIGH_PRECISION!r} or an object of a, b and accumulation"
        raise InvalidRecipe(recipe, f"{name} is {data!r}, not {form}")
    return gemm(**data)


def gemm(a: str, b: str, accumulation: str = "fp32") -> Gemm:
    """The product of two operands as they are written."""
    return Gemm(Operand.parse(a), Operand.parse(b), accumulation)


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
