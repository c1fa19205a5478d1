"""Formats by role or name, through the doors: each linear under its own recipe."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import errors
from fxopt.kernels import (
    gated_activation_quantized_linear,
    norm_modulate_quantized_linears,
    quantized_linears,
)
from fxopt.recipes import RECIPES, Phase, Recipe, gemm
from tests.families import FAMILIES, outputs
from tests.numerics import run

MX, ROW, BF16 = (RECIPES[name] for name in ("mxfp8", "fp8_rowwise", "bf16"))
MIXED = Recipe(
    "mixed",
    *(ROW.fprop, ROW.dgrad, ROW.wgrad),
    keep=("role:attention_out",),
    overrides=(
        ("transformer_blocks.0.attn.to_k", MX),
        ("transformer_blocks.*.attn.to_v", BF16),
        ("role:mlp_out", MX),
    ),
)


def recipes(door: str, model: nn.Module, recipe: Recipe, inputs: Any) -> dict[str, str]:
    """By linear the name of the recipe that its product in low precision ran under."""
    names = {p.data_ptr(): n.removesuffix(".weight") for n, p in model.named_parameters()}
    found: dict[str, str] = {}
    products = quantized_linears.products

    def record(x: Any, weights: Any, biases: Any, ctx: Any, *args: Any) -> Any:
        if type(x[0]) is Tensor:  # a capture has fake ones
            found.update((names[w.data_ptr()], ctx.recipe.name) for w in weights)
        return products(x, weights, biases, ctx, *args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        modules = (
            quantized_linears,
            norm_modulate_quantized_linears,
            gated_activation_quantized_linear,
        )
        for module in modules:
            patch.setattr(module, "products", record)
        if door == "compile":
            torch._dynamo.reset()
            options = {"recipe": recipe, "inner": "eager"}
            outputs(torch.compile(model, backend="fxopt", options=options), inputs)
        else:
            outputs(getattr(fxopt, door)(model, recipe=recipe), inputs)
    return found


def expected(fqn: str) -> str | None:
    if ".to_out" in fqn or ".to_add_out" in fqn or fqn.endswith("proj_out"):
        return None
    if fqn.startswith("transformer_blocks.") and fqn.endswith(".to_v"):
        return None
    is_mx = fqn == "transformer_blocks.0.attn.to_k" or fqn.endswith(".net.2")
    return "mxfp8" if is_mx else "mixed"


@pytest.mark.parametrize("door", ["optimize", "swap", "compile"])
def test_each_linear_runs_under_its_recipe(door: str) -> None:
    family = FAMILIES["flux"]
    inputs = family.inputs(2, 0, torch.float32)
    everything = recipes("swap", family.build(), ROW, inputs)
    assert len(everything) == 34
    found = recipes(door, family.build(), MIXED, inputs)
    wanted = {fqn: expected(fqn) for fqn in everything}
    assert found == {fqn: name for fqn, name in wanted.items() if name is not None}


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_overrides_of_everything_are_the_recipe(door: str) -> None:
    family = FAMILIES["flux"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    plain = run(getattr(fxopt, door)(copy.deepcopy(model), recipe=ROW), inputs)
    late = replace(ROW, schedule=(Phase("wgrad", 2, 3), Phase("fprop", 0, 1)))
    by_override = getattr(fxopt, door)(model, recipe=Recipe("all", overrides=(("*", late),)))
    for step in (1, 2):
        with fxopt.at_step(step):
            found = run(by_override, inputs)
        same = {n for n, t in plain.items() if t is found[n] is None or torch.equal(t, found[n])}
        assert "output 0" in same and (same == plain.keys()) == (step == 1)


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_what_matches_nothing_is_refused(door: str) -> None:
    model = FAMILIES["flux"].build()
    for changes in ({"keep": ("blok.*",)}, {"overrides": (("blok.*", MX),)}):
        with pytest.raises(errors.KeepMatchesNothing, match=r"'blok\.\*' in keep or overrides"):
            getattr(fxopt, door)(model, recipe=replace(ROW, **changes))
    renamed = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(errors.KeepMatchesNothing, match="'role:qkv'"):
        getattr(fxopt, door)(renamed, recipe=replace(ROW, keep=("role:qkv",)))
    for each in (model, renamed):
        assert not any("forward" in vars(m) for m in each.modules())


def test_overrides_are_looked_at_as_a_whole() -> None:
    """Devices, compilers and parameters are checked for what overrides ask as well."""
    model = FAMILIES["flux"].build()
    partial = Recipe("partial", overrides=(("role:qkv", MX),), emulate=False)
    with pytest.raises(errors.NotNative, match="'partial'"):
        fxopt.optimize(model, recipe=partial)
    late = Recipe("late", overrides=(("role:qkv", replace(MX, schedule=(Phase("fprop", 3),))),))
    with pytest.raises(errors.FxoptError, match="a compiled graph keeps"):
        fxopt.optimize(model, recipe=late, execution="compile")
    model.proj_out.weight = nn.Parameter(
        model.proj_out.weight.data.to(torch.float8_e4m3fn),
        requires_grad=False,
    )
    with pytest.raises(errors.LowPrecisionParameter):
        fxopt.optimize(model, recipe=replace(partial, emulate=True))


def test_json_gives_overrides_back() -> None:
    assert Recipe.from_json(MIXED.to_json()) == MIXED
    assert hash(Recipe.from_json(MIXED.key)) == hash(MIXED)


PROBLEMS: dict[str, dict[str, Any]] = {
    "unknown role 'qkw' in 'role:qkw'; known: qkv, attention_out": {"keep": ("role:qkw",)},
    "unknown role 'mlp' in 'role:mlp'": {"overrides": (("role:mlp", MX),)},
    "override 'a' has keep or overrides of its own": {"overrides": (("a", MIXED),)},
    "override ('a', 'mxfp8') is not a glob or role and a Recipe": {"overrides": (("a", "mxfp8"),)},
    "overrides is {'a': 3}, not a tuple": {"overrides": {"a": 3}},
    "override (3, Recipe(": {"overrides": ((3, MX),)},
}


@pytest.mark.parametrize("problem, changes", PROBLEMS.items(), ids=PROBLEMS)
def test_contradictions_are_refused(problem: str, changes: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        replace(ROW, **changes)
    assert problem in str(caught.value)


@pytest.mark.parametrize("overrides", ['"all"', '[["*.attn.*"]]', '[["*", {"fprop": 3}]]', "[3]"])
def test_bad_json_is_refused(overrides: str) -> None:
    with pytest.raises(errors.InvalidRecipe):
        Recipe.from_json(f'{{"name": "x", "overrides": {overrides}}}')


def test_a_contradiction_inside_an_override_names_its_recipe() -> None:
    with pytest.raises(errors.InvalidRecipe, match="'inner': fprop: no hardware"):
        Recipe("x", overrides=(("*", Recipe("inner", gemm("e5m2/row/fp32", "e5m2/row/fp32"))),))
