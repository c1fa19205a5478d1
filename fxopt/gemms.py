"""How one product of two matrices is quantized, as data: its operands' formats, blocks, scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from fxopt.errors import InvalidRecipe

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


MAX_MARGIN = 16  # 448 / 2^16 is 3.5 times the least e4m3


def history_problems(history: int, margin: int, gemms: Iterable[tuple[str, Gemm]]) -> Iterator[str]:
    """What contradicts delayed scaling, in GEMMs by name."""
    for name, value in (("history", history), ("margin", margin)):
        if type(value) is not int or value < 0:
            yield f"{name} is {value!r}, not an integer from 0"
            return
    if margin > MAX_MARGIN:
        yield (
            f"margin {margin} is more than {MAX_MARGIN}: e4m3 would round the largest value of a "
            "tensor to one of its four least numbers; give a smaller one"
        )
    if margin and not history:
        yield f"margin {margin} is for delayed scaling, but history is 0"
    if not history:
        return
    for name, product in gemms:
        for which in ("a", "b"):
            operand = getattr(product, which)
            if operand.block != "tensor":
                yield (
                    f"history {history} is for one scale per tensor, but {name}.{which} has blocks "
                    f"{operand.block}, which are scaled by themselves"
                )
            elif operand.stochastic:
                yield f"history {history} rounds to nearest, but {name}.{which} is stochastic"


def gemm(a: str, b: str, accumulation: str = "fp32") -> Gemm:
    """The product of two operands as they are written."""
    return Gemm(Operand.parse(a), Operand.parse(b), accumulation)


def to_data(product: Gemm | None) -> Any:
    """As it stands in JSON; None is the model's own dtype."""
    if product is None:
        return HIGH_PRECISION
    return {"a": str(product.a), "b": str(product.b), "accumulation": product.accumulation}


def from_data(recipe: str, where: str, data: Any) -> Gemm | None:
    """What `to_data` gave.

    Args:
        recipe, where: for the error.

    Raises:
        InvalidRecipe: it is no such thing.
    """
    if data == HIGH_PRECISION:
        return None
    if not isinstance(data, dict) or not {"a", "b"} <= data.keys() <= {"a", "b", "accumulation"}:
        form = f"{HIGH_PRECISION!r} or an object of a, b and accumulation"
        raise InvalidRecipe(recipe, f"{where} is {data!r}, not {form}")
    return gemm(**data)
