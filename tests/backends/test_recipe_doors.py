"""Recipes through the three doors: the same linears of every family, the same results."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
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
from fxopt.passes.rules import quantized_linear as rule
from fxopt.recipes import RECIPES, gemm
from tests.families import FAMILIES, Inputs, outputs
from tests.numerics import relative_l2, run

QUANTIZED = [name for name, recipe in RECIPES.items() if recipe.gemms]
# Linears in the formats of a recipe. Exact: one less is a linear lost, one more a role mistaken.
COUNTS = {
    "flux": 34,
    "flux2": 28,
    "sd3.5": 65,
    "qwen-image": 24,
    "wan": 20,
    "ltx": 20,
    "z-image": 24,
    "qwen3-eager": 14,
    "qwen3-sdpa": 14,
    "llama-eager": 14,
    "llama-sdpa": 14,
}


@contextmanager
def recorded(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the parameters whose products run in low precision."""
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    found: set[str] = set()
    products = quantized_linears.products

    def record(x: Any, weights: Any, *args: Any) -> Any:
        if type(x[0]) is Tensor:  # a capture has fake ones
            found.update(names[w.data_ptr()] for w in weights)
        return products(x, weights, *args)

    with pytest.MonkeyPatch.context() as patch:
        modules = (
            quantized_linears,
            norm_modulate_quantized_linears,
            gated_activation_quantized_linear,
        )
        for module in modules:
            patch.setattr(module, "products", record)
        yield found


def opened(door: str, model: nn.Module, recipe: Any = "fp8_tensorwise") -> nn.Module:
    if door == "compile":
        torch._dynamo.reset()
        options = {"recipe": recipe, "inner": "eager"}
        return torch.compile(model, backend="fxopt", options=options)
    return getattr(fxopt, door)(model, recipe=recipe)


def low_precision(door: str, name: str) -> set[str]:
    family = FAMILIES[name]
    model = family.build()
    with recorded(model) as found, torch.no_grad():
        outputs(opened(door, model), family.inputs(2, 0, torch.float32))
    if door != "compile":
        assert fxopt.report(model).count("quantized_linear") == len(found)
    return found


def unused(name: str) -> set[str]:
    """Parameters that do not reach an output: Dynamo drops what they do."""
    family = FAMILIES[name]
    found = run(family.build(), family.inputs(2, 0, torch.float32))
    return {n.removeprefix("gradient of ") for n, g in found.items() if g is None}


def test_the_table_is_complete() -> None:
    assert COUNTS.keys() == FAMILIES.keys()


# Of each kind of block one is in the quick run.
SLOW = {"sd3.5", "qwen3-eager", "llama-eager", "llama-sdpa"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES]
)
def test_doors_decide_alike(name: str) -> None:
    captured = low_precision("optimize", name)
    assert len(captured) == COUNTS[name]
    assert captured == low_precision("swap", name)
    compiled = low_precision("compile", name)
    assert captured >= compiled >= captured - unused(name)
    for path in captured:  # embedders, modulation and the final projection are in none
        assert ".norm" not in path and "embed" not in path and not path.startswith("proj_out")


@pytest.fixture
def flux() -> tuple[nn.Module, Inputs]:
    family = FAMILIES["flux"]
    return family.build().to(torch.bfloat16), family.inputs(2, 0, torch.bfloat16)


# The output's error against bf16's own, fp64 as the truth: two or three products deep in every one
# of four blocks, each of 27 dB (e4m3) or 15 dB (e2m1) below the result.
BOUNDS = {name: 0.35 if name == "nvfp4" else 0.08 for name in QUANTIZED}


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_recipe_trains_flux(name: str, flux: tuple[nn.Module, Inputs]) -> None:
    model, inputs = flux
    plain, keys = run(model, inputs), list(model.state_dict())
    assert fxopt.optimize(model, recipe=name) is model
    torch.manual_seed(0)
    low = run(model, inputs)
    assert list(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter and p.dtype == torch.bfloat16 for p in model.parameters())
    assert fxopt.report(model).recipe == name
    exact, found = plain["output 0"], low["output 0"]
    assert exact is not None and found is not None
    error = relative_l2(found, exact.double())
    assert 0.01 < error < BOUNDS[name]
    for what, gradient in plain.items():
        other = low[what]
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            cosine = nn.functional.cosine_similarity(
                gradient.double().flatten(), other.double().flatten(), 0
            )
            assert cosine > (0.7 if name == "nvfp4" else 0.95), what


def test_swap_computes_what_optimize_computes(flux: tuple[nn.Module, Inputs]) -> None:
    model, inputs = flux
    other = copy.deepcopy(model)
    fxopt.optimize(model, recipe="fp8_rowwise")
    fxopt.swap(other, recipe="fp8_rowwise")
    a, b = run(model, inputs), run(other, inputs)
    # The same ops; a gradient of two branches may be summed in another order.
    for what, x in a.items():
        y = b[what]
        assert x is y is None or relative_l2(x, y.double()) < 2e-2, what
    assert torch.equal(a["output 0"], b["output 0"])


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_computes_what_optimize_computes(
    inner: str, flux: tuple[nn.Module, Inputs]
) -> None:
    model, inputs = flux
    options = {"recipe": "fp8_tensorwise", "inner": inner}
    torch._dynamo.reset()
    compiled = run(torch.compile(copy.deepcopy(model), backend="fxopt", options=options), inputs)
    captured = run(fxopt.optimize(model, recipe="fp8_tensorwise"), inputs)
    plain = run(fxopt.restore(model), inputs)
    for what in ("output 0",):
        a, b, p = compiled[what], captured[what], plain[what]
        assert a is not None and b is not None and p is not None
        # One rounding in bf16 that falls otherwise moves codes: the two are closer to each other
        # than either is to bf16, or as close.
        assert relative_l2(a, b.double()) < 1.2 * relative_l2(b, p.double())


def test_checkpointing_gives_the_same_gradients(flux: tuple[nn.Module, Inputs]) -> None:
    model, inputs = flux
    fxopt.optimize(model, recipe="mxfp8")
    plain = run(model, inputs)
    model.enable_gradient_checkpointing()
    recomputed = run(model, inputs)
    for what, x in plain.items():
        assert x is recomputed[what] is None or torch.equal(x, recomputed[what]), what


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_the_report_says_why_not(door: str) -> None:
    family = FAMILIES["flux"]
    model = family.build()
    opened(door, model)
    with torch.no_grad():
        model(**family.inputs(2, 0, torch.float32))
    declined = [d for d in fxopt.report(model).declined if d.rule == "quantized_linear"]
    why = {
        reason: {d.fqn for d in declined if reason in d.reasons}
        for reason in (
            rule.OUTSIDE,
            rule.PER_SAMPLE,
        )
    }
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= why[rule.OUTSIDE]
    assert "time_text_embed.timestep_embedder.linear_1" in why[rule.OUTSIDE]
    assert why[rule.PER_SAMPLE] == {
        *(f"transformer_blocks.{i}" for i in (0, 1)),
        *(f"single_transformer_blocks.{i}" for i in (0, 1)),
    }
    applied = [a for a in fxopt.report(model).applied if a.rule == "quantized_linear"]
    assert {a.tier for a in applied} == {"low_precision"}


@pytest.mark.parametrize("door", ["optimize", "swap", "compile"])
def test_the_recipe_keeps_by_name(door: str) -> None:
    family = FAMILIES["flux"]
    model = family.build()
    keep = ("transformer_blocks.0.*", "*.ff.net.2", "single_transformer_blocks.1.attn.to_k")
    with recorded(model) as found, torch.no_grad():
        outputs(
            opened(door, model, replace(RECIPES["fp8"], keep=keep)),
            family.inputs(2, 0, torch.float32),
        )
    everything = low_precision("swap", "flux")
    kept = {n for n in everything if "transformer_blocks.0." in n and "single" not in n}
    kept |= {n for n in everything if n.endswith("ff.net.2.weight")}
    assert found == everything - kept - {"single_transformer_blocks.1.attn.to_k.weight"}


def test_batch_of_one_and_other_sizes_train() -> None:
    """The tokens are the contraction of the weight's gradient, whatever their number."""
    family = FAMILIES["flux"]
    model = fxopt.optimize(family.build(), recipe="fp8_rowwise")
    for batch, size in ((1, 0), (1, 1), (3, 2)):
        found = run(model, family.inputs(batch, size, torch.float32))
        assert all(t is None or t.isfinite().all() for t in found.values())
    assert not [d for d in fxopt.report(model).declined if d.rule == "capture"]


def test_restore_gives_bf16_back(flux: tuple[nn.Module, Inputs]) -> None:
    model, inputs = flux
    before = run(model, inputs)
    run(fxopt.optimize(model, recipe="fp8"), inputs)
    after = run(fxopt.restore(model), inputs)
    assert torch.equal(before["output 0"], after["output 0"])


def with_field(**fields: Any) -> str:
    return json.dumps({"name": "mine"} | fields)


SQUARED = {"a": "e5m2/row/fp32", "b": "e5m2/row/fp32"}
TWICE = [{"gemm": "fprop", "start": 0, "stop": 9}, {"gemm": "fprop", "start": 5}]
MISTAKES = {
    "no such name": (errors.UnknownRecipe, "fp9"),
    "no such field": (errors.InvalidRecipe, with_field(amax="delayed")),
    "contradictory fields": (errors.InvalidRecipe, with_field(fprop=SQUARED)),
    "no such role": (errors.InvalidRecipe, with_field(keep=["role:qkw"])),
    "a schedule that overlaps": (errors.InvalidRecipe, with_field(schedule=TWICE)),
    "a glob of nothing": (errors.KeepMatchesNothing, replace(RECIPES["fp8"], keep=("blok.*",))),
    "an override of nothing": (
        errors.KeepMatchesNothing,
        replace(RECIPES["fp8"], overrides=(("blok.*", RECIPES["mxfp8"]),)),
    ),
    "no such units": (errors.NotNative, replace(RECIPES["mxfp8"], emulate=False)),
    "an fp8 parameter": (errors.LowPrecisionParameter, "fp8"),
}


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """What the modules hold, parameters and hooks included."""
    return [
        {n: dict(v) if isinstance(v, dict) else v for n, v in vars(m).items()}
        for m in model.modules()
    ]


@pytest.mark.parametrize("door", ["optimize", "swap", "optimize and compile"])
@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_leave_the_model_as_it_was(door: str, what: str) -> None:
    error, recipe = MISTAKES[what]
    model = FAMILIES["flux"].build()
    if what == "an fp8 parameter":
        linear = model.transformer_blocks[0].ff.net[2]
        low = linear.weight.data.to(torch.float8_e4m3fn)
        linear.weight = nn.Parameter(low, requires_grad=False)
    before = attributes(model)
    parameters = {n: (p, p._version) for n, p in model.named_parameters()}
    with pytest.raises(error):
        if door == "optimize and compile":
            fxopt.optimize(model, recipe=recipe, execution="compile")
        else:
            getattr(fxopt, door)(model, recipe=recipe)
    assert attributes(model) == before
    assert all(p is parameters[n][0] for n, p in model.named_parameters())
    assert all(p._version == version for p, version in parameters.values())


def test_a_recipe_that_needs_a_gpu_says_which() -> None:
    model = FAMILIES["flux"].build()
    recipe = replace(RECIPES["fp8_rowwise"], emulate=False)
    with pytest.raises(errors.NotNative, match=r"'fp8_rowwise' cannot run on cpu.* 9\.0"):
        fxopt.optimize(model, recipe=recipe)


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_another_recipe_on_the_same_model_is_refused(door: str) -> None:
    model = Owned()
    opened(door, model, "fp8")
    assert opened(door, model, "fp8") is model
    with pytest.raises(errors.OtherRecipe, match=r"'mxfp8' was asked for.*'fp8' already"):
        opened(door, model, "mxfp8")
    opened(door, fxopt.restore(model), "mxfp8")
    assert fxopt.report(model).recipe == "mxfp8"


class Stored(nn.Module):
    """A linear whose weight is stored in FP8 and cast for its product."""

    def __init__(self) -> None:
        super().__init__()
        low = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(low, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def test_fp8_parameters_are_refused() -> None:
    model = nn.Sequential(Stored())
    for door in ("optimize", "swap"):
        with pytest.raises(errors.LowPrecisionParameter, match=r"'0\.weight'.*float8_e4m3fn"):
            opened(door, model, "fp8")
    with pytest.raises(Exception, match=r"weight.* is stored in torch\.float8_e4m3fn"):
        opened("compile", model, "fp8")(torch.zeros(2, 3, 64))
    opened("compile", model, "bf16")(torch.zeros(2, 3, 64))
    fxopt.optimize(model)(torch.zeros(2, 3, 64))


def test_a_recipe_of_ones_own() -> None:
    family = FAMILIES["flux"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    mine = fxopt.Recipe("mine", fprop=gemm("e4m3/row/fp32", "e4m3/tensor/fp32"))
    text = mine.to_json()
    plain = run(model, inputs)
    low = run(fxopt.optimize(model, recipe=text), inputs)
    assert fxopt.report(model).recipe == "mine"
    error = relative_l2(low["output 0"], plain["output 0"].double())
    assert 0.01 < error < 0.08


def test_autocast_is_quantized_in_its_dtype() -> None:
    family = FAMILIES["flux"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    fxopt.optimize(model, recipe="fp8")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, inputs)
    assert fxopt.report(model).count("quantized_linear") == COUNTS["flux"]
    assert all(t is None or t.isfinite().all() for t in found.values())


def test_blocks_compiled_one_by_one() -> None:
    """Each graph is a block; nothing in the paths says so."""
    family = FAMILIES["flux"]
    model = family.build()
    torch._dynamo.reset()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend="fxopt", options={"recipe": "fp8", "inner": "eager"})
    with recorded(model) as found, torch.no_grad():
        outputs(model, family.inputs(2, 0, torch.float32))
    assert found == low_precision("swap", "flux")


def test_compiled_with_checkpoints() -> None:
    """The bodies of checkpoints are graphs of their own; around them are embedders."""
    family = FAMILIES["flux"]
    model = family.build()
    model.enable_gradient_checkpointing()
    with recorded(model) as found:
        run(opened("compile", model), family.inputs(2, 0, torch.float32))
    assert found == low_precision("swap", "flux")


class Own(nn.Module):
    """A block of no known family: an MLP, a gate from the sample, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.gate, self.down = nn.Linear(64, 128), nn.Linear(64, 64), nn.Linear(128, 64)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.up(self.norm(x)).relu() ** 2
        return x + self.gate(emb)[:, None] * self.down(hidden)


class Owned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Own() for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
        return x


def test_swap_finds_the_linears_of_an_unknown_block() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 7, 64), "emb": torch.randn(2, 64)}
    found: dict[str, set[str]] = {}
    for door in ("optimize", "swap"):
        model = Owned()
        with recorded(model) as names:
            opened(door, model)(**inputs).sum().backward()
        found[door] = names
        report = fxopt.report(model)
        assert report.count("quantized_linear") == 4
        assert rule.PER_SAMPLE in {r for d in report.declined for r in d.reasons}
    expected = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")}
    assert found == {"optimize": expected, "swap": expected}
