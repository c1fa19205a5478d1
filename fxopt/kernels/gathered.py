"""Weights that were gathered as codes: what the nodes read of them, and nobody else may.

Such a weight's parameter is one NaN in the shape of the weight: it costs no memory, and whatever
reads it by mistake shows.

Shapes: N output features, K input features; n rows of the weight that one rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.formats import (
    FORMATS,
    Quantized,
    decode,
    encode,
    padded_columns,
    round_to,
    scale_blocks,
)
from fxopt.recipe_errors import WeightGathered
from fxopt.recipes import Operand, Recipe

ATTRIBUTE = "_fxopt_gathered"
# The copies of a weight: for fprop its rows are contracted, for dgrad its columns.
ROWS, COLUMNS = 0, 1


@dataclass(eq=False)
class GatheredWeight:
    """The codes of one weight, for as long as it is gathered.

    formats: of the copies for fprop and for dgrad. One scale for the tensor, the same for both,
        is one copy that serves both.
    amax: of the copies, fp32 [N or 1, 1] and [1, K or 1]; NaN where a value is not finite.
    codes: uint8 [N, K], of the copy `held`.
    """

    fqn: str
    formats: tuple[Operand, Operand]
    amax: tuple[Tensor, Tensor]
    codes: Tensor | None = None
    held: int = ROWS

    @property
    def is_shared(self) -> bool:
        return is_shared(self.formats)

    def rows(self) -> Quantized:
        """The operand of fprop: [N, K padded]."""
        return self._operand(ROWS, self._codes(ROWS), self.amax[ROWS])

    def columns(self) -> Quantized:
        """The operand of dgrad: [K, N padded]."""
        return self._operand(COLUMNS, self._codes(COLUMNS).t(), self.amax[COLUMNS].t())

    def values(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for [N, K]: the weight but for the rounding to FP8."""
        operand = self.formats[self.held]
        scales, _, _ = scale_blocks(self.amax[self.held], operand.scale, FORMATS[operand.format])
        codes = self._codes(self.held).view(FORMATS[operand.format].dtype)
        return (decode(codes, FORMATS[operand.format]) * scales).to(dtype)

    def _codes(self, copy: int) -> Tensor:
        assert self.codes is not None, "a node runs while its weights are gathered"
        if copy != self.held and not self.is_shared:
            now, then = ("forward", "backward") if copy == ROWS else ("backward", "forward")
            reader = (
                f"a {now} reads it that was gathered for the {then}: scales per row need the "
                "weight gathered for each (reshard_after_forward=True, no checkpoint, and "
                "resharding after each backward)"
            )
            raise WeightGathered(self.fqn, reader)
        return self.codes

    def _operand(self, copy: int, codes_RC: Tensor, amax: Tensor) -> Quantized:
        operand, num_columns = self.formats[copy], codes_RC.shape[1]
        format = FORMATS[operand.format]
        scales, _, _ = scale_blocks(amax, operand.scale, format)
        width = padded_columns(operand, num_columns)
        padded = F.pad(codes_RC, (0, width - num_columns)) if width > num_columns else codes_RC
        codes = padded.contiguous().view(format.dtype)
        return Quantized(codes, scales.contiguous(), scales.new_empty(0))


def is_shared(formats: tuple[Operand, Operand]) -> bool:
    """Whether one copy serves both products."""
    return formats[ROWS] == formats[COLUMNS] and formats[ROWS].block == "tensor"


def quantize_rows_of(x_nK: Tensor, operand: Operand, amax: Tensor) -> Tensor:
    """Codes, as uint8 [n, K], of some rows of a weight whose magnitudes are known.

    Those that `quantize` would give the whole weight, or its transposed.

    Args:
        amax: of the whole weight, [n or 1, K or 1].
    """
    format = FORMATS[operand.format]
    _, factor, _ = scale_blocks(amax, operand.scale, format)
    return encode(round_to(x_nK.float() * factor, format), format).view(torch.uint8)


def gathered(weight: Tensor) -> GatheredWeight | None:
    """The codes that stand for a weight; None for a weight that is there itself."""
    return cast("GatheredWeight | None", getattr(weight, ATTRIBUTE, None))


def values_of(weight: Tensor) -> Tensor:
    """The weight without its history, or what its codes stand for: to compare two forwards by."""
    found = gathered(weight)
    return weight.detach() if found is None else found.values(weight.dtype)


def require_whole(weights: Iterable[Tensor], reader: str) -> None:
    """Raise WeightGathered if only codes are there of one of these, which `reader` says who
    reads."""
    for weight in weights:
        found = gathered(weight)
        if found is not None:
            raise WeightGathered(found.fqn, reader)


def require_formats(weights: Iterable[Tensor], recipe: Recipe | None) -> None:
    """Raise WeightGathered if a node is to multiply codes by another recipe than their own."""
    formats = None
    if recipe is not None and recipe.fprop is not None and recipe.dgrad is not None:
        formats = recipe.fprop.b, recipe.dgrad.b
    for weight in weights:
        found = gathered(weight)
        if found is not None and found.formats != formats:
            raise WeightGathered(found.fqn, "this product wants it in other formats")
