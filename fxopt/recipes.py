"""Recipes: in which formats the block linears of a model are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Recipe:
    """Numerics of one optimization.

    name: as given to the doors.
    matmul: format of the operands of the block linears' GEMMs; "model" is the model's own dtype.
    """

    name: str
    matmul: str = "model"


RECIPES: Mapping[str, Recipe] = MappingProxyType({"bf16": Recipe("bf16")})
