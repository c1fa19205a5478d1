"""What a recipe may ask of FSDP2's all-gather, and whether its formats allow it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fxopt.gemms import Gemm

if TYPE_CHECKING:
    from fxopt.recipes import Recipe

BLOCKS = ("tensor", "row")


def problems(recipe: Recipe) -> Iterator[str]:
    """What speaks against the `all_gather` of a recipe."""
    if recipe.all_gather != "fp8":
        return
    if not recipe.quantizes:
        yield "all_gather 'fp8' has no quantized weights to gather"
    for part in recipe.parts:
        if part.gemms:
            for name in ("fprop", "dgrad"):
                yield from _weight(part, name)


def _weight(recipe: Recipe, name: str) -> Iterator[str]:
    """Problems with the weight of one GEMM, which is to be the same codes in every step."""
    product: Gemm | None = getattr(recipe, name)
    scheduled = [phase.formats for phase in recipe.schedule if phase.gemm == name]
    if product is None:
        yield f"all_gather 'fp8' leaves no weight in the model's dtype, and {name} reads that"
    elif product.b.block not in BLOCKS:
        yield (
            f"all_gather 'fp8' takes one scale for a tensor or a row of the weight, {name}.b is "
            f"{product.b}"
        )
    elif any(other is None or other.b != product.b for other in scheduled):
        yield f"all_gather 'fp8' needs one format of the weight, and {name} changes it by step"
