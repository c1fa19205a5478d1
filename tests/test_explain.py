"""Planning without a GPU and without weights."""

import dataclasses
import sys

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fxopt import errors, fakes, traffic
from fxopt.backends import state
from fxopt.backends.capture import CannotCapture, capture
from fxopt.backends.exported import optimize
from fxopt.backends.options import rules_for
from fxopt.backends.rewritten import NOT_CALLED, Bound
from fxopt.explanation import explain, load_example, model_blocks
from fxopt.recipes import find
from fxopt.report import Applied, Declined, Report
from tests.backends import toys
from tests.families import FAMILIES

# The package binds the name `explain` to the function.
explain_module = sys.modules["fxopt.explanation"]


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x, scale=None):
        return x + self.down(self.up(self.norm(x) * scale))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(3))
        self.narrow = nn.ModuleList([Block(16)])
        self.dropout = nn.ModuleList([nn.Dropout()])

    def forward(self, x, scale):
        x = self.narrow[0](x, scale[..., :16])
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, scale=scale)
        return self.dropout[0](x)


INPUTS = {"x": torch.zeros(2, 64, 16), "scale": torch.zeros(32)}


@pytest.fixture
def unchanged_blocks(monkeypatch):
    """Stands in for the rewriter: reports one substitution and one miss, changes nothing."""

    def rewrite_block(block, args, kwargs, recipe, target, planned_for):
        assert planned_for is target
        assert {p.device.type for p in block.parameters()} == {"meta"}

        def rewritten(*args, **kwargs):
            return block(*args, **kwargs)

        rewritten.report = Report(
            "optimize",
            "bf16",
            "cpu",
            (Applied("norm_modulate", "norm", 2, "native", "rounding", "m.py:1", 100),),
            (Declined("attention", "", "softmax", "m.py:2", ("dim is 1",)),),
        )
        return rewritten

    monkeypatch.setattr(explain_module, "rewrite_block", rewrite_block)


def test_blocks_of_a_model_are_found_with_their_inputs():
    model = Model()
    parameters = dict(model.named_parameters())
    narrow, wide = model_blocks(model, INPUTS)
    assert (narrow.name, narrow.count) == ("Block (narrow.0)", 1)
    assert (wide.name, wide.count) == ("Block (blocks.0)", 3)
    assert wide.args[0].shape == (2, 64, 32)
    assert wide.args[0].requires_grad
    assert wide.kwargs["scale"].shape == (32,)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_model_without_repeated_blocks_is_one_block():
    (block,) = model_blocks(nn.Linear(4, 4), (torch.zeros(2, 4),))
    assert (block.name, block.count) == ("Linear", 1)


def test_every_block_of_a_class_is_counted(unchanged_blocks):
    seen = []
    report = explain(Model(), example_inputs=INPUTS, progress=lambda *step: seen.append(step))
    narrow, wide = report.blocks
    assert report.door == "explain"
    assert report.target == "h100"
    assert report.count("norm_modulate") == 2 * 4
    # One narrow block, three wide ones; the FLOPs are not known.
    assert [(a.bytes_saved, a.flops) for a in report.applied] == [(100, None), (300, None)]
    assert [d.block_class for d in report.declined] == ["Block (narrow.0)", "Block (blocks.0)"]
    assert wide.before == wide.after
    total = narrow.before.glue_bytes + 3 * wide.before.glue_bytes
    assert report.totals["glue_bytes_before"] == report.totals["glue_bytes_after"] == total
    assert [(f.in_features, f.out_features, f.num_tokens) for f in wide.fp8] == [(32, 32, 128)]
    assert [done for done, _, _ in seen] == [0, 1, 2]


def test_what_is_saved_adds_up_to_the_totals():
    """But for what is no rule's: canonicalization, and residuals read from a norm's node."""
    family = FAMILIES["qwen-image"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    report = explain(model, example_inputs=inputs)
    rules = [dataclasses.replace(rule, finish=None) for rule in rules_for(find("bf16"))]
    by_rules = sum(
        block.count * (glue_bytes(block, ()) - glue_bytes(block, rules))
        for block in model_blocks(model, inputs)
    )
    assert sum(a.bytes_saved for a in report.applied) == by_rules > 0
    rest = report.totals["glue_bytes_before"] - report.totals["glue_bytes_after"] - by_rules
    assert 0 <= rest < by_rules


def glue_bytes(block, rules):
    """Of a block's graph under `rules`, forward + backward."""
    with fakes.substituted(block.module, fakes.shell):
        args, kwargs = tree_map_only(torch.Tensor, fakes.shell, (block.args, block.kwargs))
        plan = capture(block.module, block.module.forward, args, kwargs, rules)
        graph = Bound(block.module, plan)
    passes = traffic.count(block.module, block.args, block.kwargs, graph)
    return sum(work.glue_bytes for work in passes)


def test_block_that_cannot_be_captured_stays_and_says_why(monkeypatch):
    def refuse(*_, **__):
        raise CannotCapture("torch.export: no")

    monkeypatch.setattr(explain_module, "rewrite_block", refuse)
    report = explain(nn.Linear(4, 4), example_inputs=(torch.zeros(2, 4),))
    assert [(d.rule, d.reasons) for d in report.declined] == [("capture", ("torch.export: no",))]
    assert report.blocks[0].before == report.blocks[0].after


def test_preset_has_its_published_work(unchanged_blocks):
    pytest.importorskip("diffusers", reason="presets need diffusers")
    report = explain("flux-dev")
    double, single = report.blocks
    assert (double.block_class, double.count) == ("FluxTransformerBlock", 19)
    assert (single.block_class, single.count) == ("FluxSingleTransformerBlock", 38)
    # 12 [D, D] weights per token and stream, three products each, 2 FLOPs per multiply-add, and
    # 6 + 6 (3 in the single block) modulation rows.
    dim, tokens = 3072, 4608
    assert double.before.gemm_flops == 3 * 2 * dim**2 * (12 * tokens + 12)
    assert single.before.gemm_flops == 3 * 2 * dim**2 * (12 * tokens + 3)
    assert double.before.attention_flops == 4 * tokens**2 * dim * 7 // 2


def test_batch_and_resolution_reach_the_preset(unchanged_blocks):
    pytest.importorskip("diffusers", reason="presets need diffusers")
    report = explain("flux-dev", batch=2, height=512, width=256, target="b200")
    dim, tokens = 3072, 512 + 512
    assert report.blocks[0].before.attention_flops == 2 * 4 * tokens**2 * dim * 7 // 2
    assert report.target == "b200"


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (("flux-dv",), errors.UnknownPreset, "did you mean 'flux-dev'"),
        ((3,), errors.NotAModule, "3"),
    ],
)
def test_bad_model_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        explain(*arguments)


def test_bad_target_is_refused_before_any_work():
    with pytest.raises(errors.UnknownTarget, match="h100"):
        explain("flux-dev", target="h1000")


def test_bad_recipe_is_refused():
    with pytest.raises(errors.UnknownRecipe, match="did you mean 'bf16'"):
        explain("flux-dev", recipe="bf61")


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(errors.InputMismatch, match="scale"):
        explain(Model(), example_inputs={"x": torch.zeros(2, 64, 16)})


EXAMPLE = """
from torch import nn
import torch

def example():
    return nn.Linear(4, 4), (torch.zeros(2, 4),)

def single():
    return nn.Linear(4, 4)
"""


def test_example_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(EXAMPLE)
    model, inputs = load_example(f"{path}:example")
    assert isinstance(model, nn.Linear)
    assert inputs[0].shape == (2, 4)


@pytest.mark.parametrize(
    "spec, match",
    [
        ("{path}:exampel", "did you mean example"),
        ("{path}:single", "it returned Linear"),
        ("missing.py:f", "there is no file 'missing.py'"),
    ],
)
def test_bad_example_says_what_is_wrong(tmp_path, spec, match):
    path = tmp_path / "my_model.py"
    path.write_text(EXAMPLE)
    with pytest.raises(errors.NotAnExample, match=match):
        load_example(spec.format(path=path))


@pytest.mark.parametrize("target, expected", [("a100", "emulation"), ("h100", "library")])
def test_products_are_emulated_where_there_are_no_units(target, expected):
    recipe = dataclasses.replace(find("fp8_tensorwise"), profit="always")
    inputs = {"x": toys.tokens(num_tokens=64)}
    report = explain(toys.stack(num_blocks=1), example_inputs=inputs, target=target, recipe=recipe)
    found = {a.provider for a in report.applied if a.rule == "quantized_linear"}
    assert found == {expected}


def test_doors_stay_open():
    inputs = {"x": toys.tokens(num_tokens=64)}
    strict = optimize(toys.stack(num_blocks=1), strict=["norm_modulate"])
    compiled = optimize(toys.stack(num_blocks=1), execution="compile")
    expected = explain(toys.stack(num_blocks=1), example_inputs=inputs)
    assert explain(strict, example_inputs=inputs) == expected
    assert explain(compiled, example_inputs=inputs) == expected
    assert any(m._compiled_call_impl is not None for m in compiled.modules())
    assert len(strict._forward_hooks) == 1
    strict(**inputs)
    assert not strict._forward_hooks and state.report(strict).count("norm_modulate")


def test_a_door_under_a_wrapper_of_the_user_does_not_notice():
    inputs = {"x": toys.tokens(num_tokens=64)}
    model, plain = optimize(toys.stack(num_blocks=1)), toys.stack(num_blocks=1)
    for block in (model.blocks[0], plain.blocks[0]):
        forward = block.forward
        block.forward = lambda *args, forward=forward: forward(*args)
    assert explain(model, example_inputs=inputs) == explain(plain, example_inputs=inputs)
    (declined,) = state.report(model).declined
    assert declined.reasons == (NOT_CALLED,)
