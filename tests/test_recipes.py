"""Recipes are data: hashable, JSON in and out, and contradictions are refused with all reasons."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from fxopt import errors, recipe_errors
from fxopt.gemms import GEMMS
from fxopt.recipe_errors import OtherStoredRecipe
from fxopt.recipes import FP8_ATTENTION, RECIPES, Gemm, Operand, Phase, Recipe, find, gemm

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


def test_an_attention_is_data() -> None:
    recipe = replace(RECIPES["fp8"], name="mine", attention="flash")
    assert Recipe.from_json(recipe.to_json()) == recipe == find(recipe.key)
    assert json.loads(recipe.to_json())["attention"] == "flash"
    assert {r.attention for r in RECIPES.values()} == {"auto"}


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"attention": "flsh"}, "unknown attention 'flsh'; did you mean 'flash' or "),
        ({"attention": 3}, "unknown attention 3; known: auto, pytorch, cudnn"),
        (
            {"overrides": (("role:qkv", Recipe("other", attention="math")),)},
            "override 'role:qkv' has its own attention",
        ),
    ],
)
def test_what_is_no_attention(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        replace(RECIPES["fp8"], **changes)
    assert problem in str(caught.value)


def test_the_attention_of_a_checkpoint_may_differ(tmp_path: Path) -> None:
    replace(RECIPES["fp8"], attention="flash").save(tmp_path)
    RECIPES["fp8"].check(tmp_path)


def test_an_attention_in_fp8_may_not(tmp_path: Path) -> None:
    low = replace(RECIPES["fp8"], attention="fp8")
    low.save(tmp_path)
    replace(low, emulate=False).check(tmp_path)
    with pytest.raises(OtherStoredRecipe, match='attention is "fp8", not "high_precision"'):
        RECIPES["fp8"].check(tmp_path)


def test_what_may_not_be_emulated_asks_for_that() -> None:
    low = Recipe("mine", attention="fp8")
    assert (low.asked_attention, replace(low, emulate=False).asked_attention) == FP8_ATTENTION
    assert Recipe("mine", attention="flash", emulate=False).asked_attention == "flash"


def test_a_history_is_data() -> None:
    recipe = replace(RECIPES["fp8"], name="delayed", history=16, margin=1)
    assert recipe.is_delayed and not RECIPES["fp8"].is_delayed and not recipe.is_scheduled
    assert Recipe.from_json(recipe.to_json()) == recipe == find(recipe.key)
    assert recipe.at(3) == recipe and hash(recipe) != hash(replace(recipe, history=8))
    assert replace(RECIPES["fp8"], overrides=(("role:qkv", recipe),)).is_delayed
    # A phase without a GEMM that is quantized keeps it for the others.
    assert replace(recipe, schedule=tuple(Phase(g, 0) for g in GEMMS)).at(0).history == 16


@pytest.mark.parametrize(
    "name, changes, problem",
    [
        ("fp8_rowwise", {"history": 4}, "fprop.a has blocks row, which are scaled by themselves"),
        ("fp8_rowwise_gw_hp", {"history": 4}, "dgrad.a has blocks row"),
        ("fp8_blockwise", {"history": 4}, "wgrad.b has blocks 1x128"),
        ("mxfp8", {"history": 4}, "history 4 is for one scale per tensor, but fprop.a"),
        ("nvfp4", {"history": 4}, "fprop.b has blocks 16x16"),
        ("fp8", {"history": 4, "schedule": (Phase("fprop", 2, None, ROW),)}, "has blocks row"),
        ("fp8", {"history": -1}, "history is -1, not an integer from 0"),
        ("fp8", {"history": 2.0}, "history is 2.0, not an integer from 0"),
        ("fp8", {"history": True}, "history is True, not an integer from 0"),
        ("fp8", {"history": 4, "margin": -1}, "margin is -1"),
        ("fp8", {"margin": 1}, "margin 1 is for delayed scaling, but history is 0"),
        ("fp8", {"history": 4, "margin": 17}, "margin 17 is more than 16: e4m3 would round"),
    ],
)
def test_what_contradicts_a_history(name: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        replace(RECIPES[name], **changes)
    assert problem in str(caught.value)


def test_a_history_rounds_to_nearest() -> None:
    drawn = replace(RECIPES["fp8"].dgrad, a=Operand.parse("e5m2/tensor/fp32/stochastic"))
    with pytest.raises(errors.InvalidRecipe, match=r"dgrad\.a is stochastic"):
        replace(RECIPES["fp8"], dgrad=drawn, history=4)


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


def test_a_recipe_lies_beside_a_checkpoint(tmp_path: Path) -> None:
    mine = replace(RECIPES["fp8"], name="mine", keep=("*.attn.*",), schedule=(Phase("fprop", 9),))
    mine.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["fxopt_recipe.json"]
    assert Recipe.load(tmp_path) == mine
    mine.check(tmp_path)
    replace(mine, name="the same", emulate=False).check(tmp_path)  # they change no number
    first = replace(RECIPES["mxfp8"], name="first", profit="always")
    replace(mine, overrides=(("role:qkv", first),)).save(tmp_path)
    replace(mine, overrides=(("role:qkv", RECIPES["mxfp8"]),)).check(tmp_path)
    with pytest.raises(recipe_errors.OtherStoredRecipe, match="history is 0, not 16"):
        replace(mine, history=16).check(tmp_path)
    delayed = replace(RECIPES["fp8"], history=16)
    with pytest.raises(recipe_errors.OtherStoredRecipe, match=r"overrides is .* not .*: 16"):
        replace(mine, overrides=(("role:qkv", delayed),)).check(tmp_path)
    with pytest.raises(recipe_errors.OtherStoredRecipe, match=r"overrides is .* not "):
        replace(mine, overrides=(("role:qkv", RECIPES["nvfp4"]),)).check(tmp_path)
    RECIPES["mxfp8"].save(str(tmp_path))
    assert Recipe.load(tmp_path) == RECIPES["mxfp8"]


def test_another_recipe_than_the_stored_one_is_refused(tmp_path: Path) -> None:
    RECIPES["fp8"].save(tmp_path)
    asked = replace(
        RECIPES["fp8_rowwise"], dgrad=RECIPES["fp8"].dgrad, wgrad=None, profit="always", keep=("a",)
    )
    with pytest.raises(recipe_errors.OtherStoredRecipe) as caught:
        asked.check(tmp_path)
    differences = {field: (stored, now) for field, stored, now in caught.value.differences}
    assert differences.keys() == {"fprop", "wgrad", "keep", "profit"}
    assert differences["profit"] == ('"model"', '"always"')
    assert differences["keep"] == ("[]", '["a"]')
    assert "e4m3/tensor/fp32" in differences["fprop"][0]
    assert "e4m3/row/pow2" in differences["fprop"][1]
    assert differences["wgrad"][1] == '"high_precision"'
    for part in (
        str(tmp_path),
        "'fp8'",
        "'fp8_rowwise'",
        *(v for d in differences.values() for v in d),
    ):
        assert part in str(caught.value)
    assert Recipe.load(tmp_path) == RECIPES["fp8"]


@pytest.mark.parametrize("what", ["check", "load"])
def test_a_checkpoint_without_a_recipe(tmp_path: Path, what: str) -> None:
    with pytest.raises(recipe_errors.NoStoredRecipe, match=r"fxopt_recipe\.json does not exist"):
        RECIPES["fp8"].check(tmp_path) if what == "check" else Recipe.load(tmp_path)


def test_a_recipe_of_an_earlier_version_has_the_defaults_of_its_time(tmp_path: Path) -> None:
    (tmp_path / "fxopt_recipe.json").write_text('{"name": "bf16"}')
    RECIPES["bf16"].check(tmp_path)
    (tmp_path / "fxopt_recipe.json").write_text('{"name": "bf16", "amax": "delayed"}')
    with pytest.raises(errors.InvalidRecipe, match="unknown field amax"):
        RECIPES["bf16"].check(tmp_path)


def test_lists_are_no_tuples() -> None:
    for keep in (["blocks.*"], "blocks.*", (3,)):
        with pytest.raises(errors.InvalidRecipe, match=r"keep is .*, not a tuple of str"):
            Recipe("mine", keep=keep)


@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_gw_hp"])
def test_codes_of_scales_per_tensor_and_row_can_be_gathered(name: str, tmp_path: Path) -> None:
    mine = replace(RECIPES[name], all_gather="fp8", schedule=(Phase("wgrad", 9),))
    assert Recipe.from_json(mine.to_json()) == mine == find(mine.key)
    mine.save(tmp_path)
    replace(mine, all_gather="model").check(tmp_path)  # the numbers are the same


def test_beside_a_history_a_gather_of_codes_is_another_recipe(tmp_path: Path) -> None:
    """Weights then scale by themselves, those of overrides as well."""
    other = replace(RECIPES["fp8"], name="other", history=2)
    mine = replace(RECIPES["fp8"], name="mine", history=4, overrides=(("*.q", other),))
    codes = replace(mine, all_gather="fp8")
    assert [r.of(f) for r in (mine, codes) for f in ("q", "a.q")] == [
        *(mine, other),
        *(codes, replace(other, all_gather="fp8")),
    ]
    codes.save(tmp_path)
    codes.check(tmp_path)
    with pytest.raises(recipe_errors.OtherStoredRecipe, match="all_gather"):
        mine.check(tmp_path)


LATE = Phase("fprop", 9, formats=gemm("e4m3/row/fp32", "e4m3/row/fp32"))


@pytest.mark.parametrize(
    "name, changes, problem",
    [
        ("fp8", {"all_gather": "int8"}, "unknown all_gather 'int8'; known: model, fp8"),
        ("bf16", {}, "no quantized weights to gather"),
        ("fp8_blockwise", {}, "fprop.b is e4m3/128x128/fp32"),
        ("mxfp8", {}, "dgrad.b is e4m3/1x32/e8m0"),
        ("fp8", {"dgrad": None}, "no weight in the model's dtype, and dgrad reads that"),
        ("fp8", {"schedule": (Phase("dgrad", 9),)}, "and dgrad changes it by step"),
        ("fp8", {"schedule": (LATE,)}, "and fprop changes it by step"),
        ("fp8", {"overrides": (("*.q", RECIPES["mxfp8"]),)}, "fprop.b is e4m3/1x32/e8m0"),
        (
            "fp8",
            {"overrides": (("*.q", replace(RECIPES["fp8"], all_gather="fp8")),)},
            "override '*.q' has its own all_gather",
        ),
    ],
)
def test_what_cannot_be_gathered_as_codes_is_refused(
    name: str, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        replace(RECIPES[name], **{"all_gather": "fp8", **changes})
    assert problem in str(caught.value)


def test_what_is_saved_is_data() -> None:
    recipe = Recipe("bf16 saved", saved="fp8")
    assert Recipe.from_json(recipe.to_json()) == recipe == find(recipe.key) != RECIPES["bf16"]
    assert not recipe.quantizes and recipe.at(3) == recipe
    # One that an earlier version wrote.
    data = json.loads(recipe.to_json())
    del data["saved"]
    assert Recipe.from_json(json.dumps(data)).saved == "model"


def test_what_is_saved_changes_numbers(tmp_path: Path) -> None:
    RECIPES["fp8"].save(tmp_path)
    with pytest.raises(recipe_errors.OtherStoredRecipe, match='saved is "model", not "fp8"'):
        replace(RECIPES["fp8"], saved="fp8").check(tmp_path)


def test_saved_is_one_for_the_whole_recipe() -> None:
    with pytest.raises(errors.InvalidRecipe, match="unknown saved 'int8'; known: model, fp8"):
        Recipe("mine", saved="int8")
    own = replace(RECIPES["fp8"], name="own", saved="fp8")
    with pytest.raises(errors.InvalidRecipe, match="'role:qkv' has its own saved"):
        replace(RECIPES["fp8"], overrides=(("role:qkv", own),))
