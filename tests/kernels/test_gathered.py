"""Codes that are gathered by rows are those that the whole weight would have been cast to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxopt.kernels.gathered import (
    ATTRIBUTE,
    COLUMNS,
    ROWS,
    GatheredWeight,
    quantize_rows_of,
    require_formats,
    require_whole,
    values_of,
)
from fxopt.kernels.in_force import decide, high_precision
from fxopt.kernels.quantize import Cast
from fxopt.recipe_errors import WeightGathered
from fxopt.recipes import RECIPES, Operand

FORMATS = [
    ("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
    ("e4m3/tensor/fp32", "e5m2/tensor/pow2"),
    ("e4m3/row/pow2", "e4m3/tensor/pow2"),
    ("e4m3/row/fp32", "e4m3/row/pow2"),
]
NUM_ROWS, NUM_COLUMNS = 50, 24  # both are padded to multiples of 16


def weight(kind: str) -> Tensor:
    w_NK = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))
    w_NK[7], w_NK[:, 3] = 0, 0
    w_NK[1] *= 1e4
    if kind == "zeros":
        w_NK.zero_()
    if kind == "inf":
        w_NK[5, 9] = torch.inf
    return w_NK.bfloat16()


def gathered(w_NK: Tensor, formats: tuple[Operand, Operand], held: int) -> GatheredWeight:
    """The codes of three ranks, the last of which has fewer rows."""
    magnitudes = w_NK.float().abs()
    amax = [
        magnitudes.amax().view(1, 1) if operand.block == "tensor" else magnitudes.amax(dim, True)
        for operand, dim in zip(formats, (1, 0), strict=True)
    ]
    amax = [m.masked_fill(~m.isfinite(), torch.nan) for m in amax]
    of_rows = amax[held].expand(NUM_ROWS, -1).split(17)
    parts = zip(w_NK.split(17), of_rows, strict=True)
    codes = torch.cat([quantize_rows_of(rows, formats[held], m) for rows, m in parts])
    assert codes.dtype == torch.uint8 and codes.shape == w_NK.shape
    return GatheredWeight("blocks.0.q", formats, (amax[ROWS], amax[COLUMNS]), codes, held)


@pytest.mark.parametrize("kind", ["normal", "zeros", "inf"])
@pytest.mark.parametrize("names", FORMATS)
def test_codes_and_scales_are_those_of_the_whole_weight(names: tuple[str, str], kind: str) -> None:
    rows, columns = formats = Operand.parse(names[0]), Operand.parse(names[1])
    w_NK = weight(kind)
    expected = Cast(w_NK, rows, columns).pair()
    found = gathered(w_NK, formats, ROWS).rows(), gathered(w_NK, formats, COLUMNS).columns()
    for ours, whole in zip(found, expected[:2], strict=True):
        codes, scales, _ = whole
        assert ours.codes.dtype == codes.dtype and ours.codes.is_contiguous()
        torch.testing.assert_close(ours.scales, scales, rtol=0, atol=0, equal_nan=True)
        # By value: behind a scale that is NaN the padding is zero here, and NaN there.
        values = [c.float() * scales for c in (ours.codes, codes)]
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


def test_a_copy_that_serves_one_product_is_refused_to_the_other() -> None:
    formats = Operand.parse("e4m3/row/pow2"), Operand.parse("e4m3/row/pow2")
    with pytest.raises(WeightGathered, match="reads it that was gathered for the forward"):
        gathered(weight("normal"), formats, ROWS).columns()
    with pytest.raises(WeightGathered, match="reads it that was gathered for the backward"):
        gathered(weight("normal"), formats, COLUMNS).rows()


def test_who_may_read_a_gathered_weight() -> None:
    recipe = RECIPES["fp8"]
    assert recipe.fprop is not None and recipe.dgrad is not None
    w_NK, parameter = weight("normal"), torch.full((), torch.nan).expand(NUM_ROWS, NUM_COLUMNS)
    setattr(parameter, ATTRIBUTE, gathered(w_NK, (recipe.fprop.b, recipe.dgrad.b), ROWS))
    require_whole([w_NK], "nobody reads it")
    with pytest.raises(WeightGathered, match=r"'blocks.0.q' was gathered .* but a hook reads it"):
        require_whole([w_NK, parameter], "a hook reads it")
    require_formats([parameter], recipe)
    for other in (None, replace(recipe, fprop=None), RECIPES["fp8_rowwise"]):
        with pytest.raises(WeightGathered, match="in other formats"):
            require_formats([parameter], other)
    with high_precision(), pytest.raises(WeightGathered, match="in the model's dtype"):
        decide(recipe.key, [parameter])
    # Three bits behind the first: half a unit of e4m3, of each value and, below its normal
    # numbers, of the largest.
    bound = w_NK.float().abs().clamp(min=w_NK.float().abs().max() / 448 * 2**-6) * 2**-4
    assert ((values_of(parameter) - w_NK.float()).abs() <= bound).all()
