"""Recipes are data: hashable, JSON in and out, and contradictions are refused with all reasons."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from fxopt import errors
from fxopt.recipes import RECIPES, Gemm, Operand, Recipe, find, gemm

NAMES = [
    *("bf16", "fp8_tensorwise", "fp8", "fp8_rowwise", "fp8_rowwise_gw_hp", "fp8_blockwise"),
    *("mxfp8", "nvfp4"),
]
ROW = gemm("e4m3/row/fp32", "e4m3/row/fp32")


def test_the_table() -> None:
    assert list(RECIPES) == NAMES
    assert all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", NAMES)
def test_json_and_key_give_the_recipe_back(name: str) -> None:
    recipe = RECIPES[name]
    assert Recipe.from_json(recipe.to_json()) == recipe == find(recipe.key) == find(name)
    assert recipe.key == name
    changed = replace(recipe, keep=("blocks.0.*",))
    assert find(changed.key) == changed and hash(changed) != hash(recipe)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        RECIPES["fp8"].profit = "always"


@pytest.mark.parametrize(
    "text", ["e4m3/row/pow2", "e2m1/1x16/two_level/stochastic/hadamard", "e2m1/1x16/two_level"]
)
def test_operands_are_written_as_they_are_read(text: str) -> None:
    assert str(Operand.parse(text)) == text


@pytest.mark.parametrize("text", ["e4m3", "e4m3/row", "e4m3/row/fp32/nearest", "", 3])
def test_what_is_no_operand_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRecipe, match="FORMAT/BLOCK/SCALE"):
        Operand.parse(text)


CONTRADICTIONS = {
    "unknown block '1x64'; known: tensor": gemm("e4m3/1x64/fp32", "e4m3/row/fp32"),
    "format 'e2m1' has no block row": gemm("e2m1/row/fp32", "e4m3/row/fp32"),
    "blocks 1x32 have e8m0 scales, not 'fp32'": gemm("e4m3/1x32/fp32", "e4m3/1x32/e8m0"),
    "1x128 of a does not go with row of b": gemm("e4m3/1x128/fp32", "e4m3/row/fp32"),
    "transform is for e2m1": gemm("e4m3/row/fp32/hadamard", "e4m3/row/fp32/hadamard"),
    "on one operand only": gemm("e2m1/1x16/two_level/hadamard", "e2m1/1x16/two_level"),
    "no hardware multiplies e5m2 by e5m2": gemm("e5m2/row/fp32", "e5m2/row/fp32"),
    "unknown accumulation 'fp16'": replace(ROW, accumulation="fp16"),
}


@pytest.mark.parametrize("problem, product", CONTRADICTIONS.items())
def test_contradictions_are_refused(problem: str, product: Gemm) -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        Recipe("mine", wgrad=product)
    assert problem in str(caught.value)
    assert "'mine': wgrad: " in str(caught.value)


def test_all_contradictions_are_listed() -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        Recipe("mine", fprop=replace(ROW, accumulation="x"), profit="often")
    assert "unknown accumulation 'x'" in str(caught.value)
    assert "unknown profit 'often'" in str(caught.value)


@pytest.mark.parametrize("name, which", [("fprop", "a"), ("fprop", "b"), ("dgrad", "b")])
def test_stochastic_rounding_is_for_gradients(name: str, which: str) -> None:
    drawn = replace(ROW, **{which: Operand.parse("e4m3/row/fp32/stochastic")})
    with pytest.raises(errors.InvalidRecipe, match=f"{name}.{which} rounds stochastically"):
        Recipe("mine", **{name: drawn})


@pytest.mark.parametrize(
    "data, problem",
    [
        ("{", "no JSON"),
        ("[]", "no JSON object with a name"),
        ({"name": "x", "amax": "delayed"}, "unknown field amax"),
        ({"name": "x", "fprop": {"a": "e4m3/row/fp32"}}, "fprop is"),
        ({"name": "x", "fprop": "bf16"}, "'high_precision' or an object"),
    ],
)
def test_bad_json_is_refused(data: object, problem: str) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    with pytest.raises(errors.InvalidRecipe, match=problem):
        Recipe.from_json(text)


def test_an_unknown_name_has_a_suggestion() -> None:
    with pytest.raises(errors.UnknownRecipe, match="did you mean 'mxfp8'"):
        find("mxfp6")
