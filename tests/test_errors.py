"""Every mistake names the value, the limit and the remedy, and survives pickling."""

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from fxopt import errors, recipe_errors
from fxopt.diagnose import errors as measuring
from fxopt.report import Declined

MISS = Declined("attention", "blocks.0", "softmax", "model.py:7", ("dim is -2", "mask is int"), "x")
FAR = Declined("attention", "blocks.1", "softmax_1", "model.py:9", ("a", "b", "c"), "y")

CASES = [
    (errors.NotAModule([1, 2]), ["[1, 2]", "list", "torch.nn.Module", "pipeline.transformer"]),
    (errors.MetaModel("Flux", "proj.weight"), ["Flux", "proj.weight", "meta", "to_empty"]),
    (
        errors.InputMismatch("Flux", "(x)", "missing 'x'"),
        ["Flux.forward(x)", "missing 'x'", "dict"],
    ),
    (errors.UnknownRecipe("bf61", ("bf16", "fp8")), ["recipe 'bf61'", "did you mean 'bf16'"]),
    (errors.InvalidRecipe("mine", "a is no b"), ["'mine'", "a is no b", "fxopt.recipes.RECIPES"]),
    (errors.OtherRecipe("fp8", "bf16"), ["'fp8'", "'bf16'", "fxopt.restore"]),
    (
        errors.OtherSetting("execution", "compile", "eager"),
        ["execution='compile'", "execution='eager'", "fxopt.restore"],
    ),
    (errors.NotNative("fp8", "cpu", "x 9.0"), ["'fp8'", "cpu", "x 9.0", "emulate=True"]),
    (recipe_errors.InvalidStep(-1), ["step -1", "integer from 0", "optimizer steps"]),
    (recipe_errors.StepNotTold("late"), ["'late'", "schedule", "fxopt.at_step(step)"]),
    (recipe_errors.StepNotTold("late", "a history"), ["'late' has a history", "at_step(step)"]),
    (recipe_errors.HistoryInGraph("late"), ["'late'", "fxopt.swap(model)", "history=0"]),
    (recipe_errors.NoHistory("late", [4, 8]), ["'late'", "weight [4, 8]", "override", "keep"]),
    (recipe_errors.StepChanged(3, 4), ["of step 3", "in step 4", "fxopt.at_step(step)"]),
    (recipe_errors.ScheduleInGraph("late"), ["'late'", "compiled", "fxopt.swap(model)"]),
    (
        recipe_errors.OtherStoredRecipe("d/f.json", "a", "b", [("profit", '"x"', '"y"')]),
        ["d/f.json", "'a'", "'b'", 'profit is "x", not "y"', "fxopt.Recipe.load"],
    ),
    (recipe_errors.NoStoredRecipe("d/f.json"), ["d/f.json", "does not exist", "save(directory)"]),
    (recipe_errors.SavedInGraph("mine"), ["'mine'", "saved='fp8'", "fxopt.swap(model)"]),
    (recipe_errors.AllGatherInGraph("mine"), ["'mine'", "all_gather='fp8'", "fxopt.swap(model)"]),
    (
        recipe_errors.CannotGather("mine", "offloaded (3 weights)"),
        ["'mine'", "offloaded (3 weights)", "all_gather='model'"],
    ),
    (recipe_errors.WeightGathered("q", "a hook reads it"), ["'q'", "a hook reads it", "keep"]),
    (
        recipe_errors.AttentionRefused("cudnn", "q [1, 2, 3, 4]", ("the dtype", "the mask")),
        ["'cudnn'", "q [1, 2, 3, 4]", "the dtype; the mask", "attention='auto'"],
    ),
    (recipe_errors.MathInGraph("mine"), ["'mine'", "attention='math'", "fxopt.swap(model)"]),
    (errors.LowPrecisionParameter("w", "torch.e5m2"), ["'w'", "torch.e5m2", "bf16"]),
    (errors.KeepMatchesNothing("blok.*", ("blocks.0.q",)), ["'blok.*'", "1 linears", "glob"]),
    (errors.UnknownRule("rmsnorm", ("rms_norm",)), ["rule 'rmsnorm'", "'rms_norm'"]),
    (recipe_errors.UnknownAttention("flsh", ("flash", "math")), ["backend 'flsh'", "'flash'"]),
    (errors.UnknownTarget("H10", ("h100", "b200")), ["target 'H10'", "'h100'", "b200"]),
    (errors.UnknownPreset("flux", ("flux-dev",)), ["preset 'flux'", "'flux-dev'"]),
    (errors.UnknownOption("zzz", ("inner",)), ["option 'zzz'", "known: inner"]),
    (errors.TargetMatchesNothing("blok.*", ("blocks.0",)), ["'blok.*'", "1 submodules", "glob"]),
    (errors.UnsupportedTorch("2.10.1"), ["2.10.1", "2.11", "pip install"]),
    (errors.NothingToRestore("Flux"), ["Flux", "nothing to restore", "fxopt.optimize"]),
    (errors.StillRewritten("blocks.0"), ["'blocks.0'", "pickled", "fxopt.restore"]),
    (errors.NotReported("Flux"), ["Flux", "no report", "fxopt.explain"]),
    (errors.NoTelemetry("every is 0", "give 1"), ["every is 0", "give 1"]),
    (errors.MissingPackage("diffusers", "preset 'x'", "models"), ["diffusers", "fxopt[models]"]),
    (errors.NotAnExample("a.py:f", "no file"), ["'a.py:f'", "no file", "FILE.py:FUNCTION"]),
    (
        measuring.NotAStep("a.py:f", "it returned int"),
        ["'a.py:f'", "returned int", "FILE.py:FUNCTION"],
    ),
    (
        measuring.StepsDiffer("output 0", "[2]", "[3]"),
        ["output 0 is [2] in the baseline", "[3] in the candidate", "same tensors"],
    ),
    (
        measuring.RecordsDiffer("environment.torch", "2.12", "2.13"),
        ["environment.torch is '2.12'", "'2.13'", "one machine"],
    ),
    (measuring.InvalidRecord("c.json", "not JSON"), ["c.json", "not JSON", "--out"]),
    (measuring.InvalidTrace("t.json", "it ends"), ["t.json", "it ends", "export_chrome_trace"]),
    (measuring.NoSuchDevice("cuda:8", "cpu, cuda:0"), ["'cuda:8'", "has cpu, cuda:0"]),
    (measuring.NotAScript("train.py"), ["'train.py'", "fxopt profile"]),
    (measuring.NotAReport("r.json", "No such file"), ["r.json", "No such file", "to_dict"]),
    (measuring.EmptyWindow(0, 8, 8), ["0 skipped", "8 profiled", "at least 1"]),
    (measuring.RankEnded(1, "KeyError: 3"), ["rank 1", "KeyError: 3", "its output"]),
    (measuring.RankMissing(3, 120.0), ["rank 3", "120 s", "--out"]),
    (measuring.TooFewSteps(3, 20), ["after 3 steps", "needs 20", "--steps"]),
    (measuring.CannotWrite("c.json", "No space left"), ["c.json", "No space left", "--out"]),
    (errors.StrictRule("attention", (FAR, MISS)), ["'attention'", "model.py:7", "dim is -2", "x"]),
    (errors.StrictRule("rms_norm", (MISS,)), ["'rms_norm'", "no operation"]),
    (
        errors.StrictRule("rms_norm", (dataclasses.replace(MISS, rule="capture"),)),
        ["'rms_norm'", "run blocks.0: dim is -2"],
    ),
]


@pytest.mark.parametrize("error, parts", CASES, ids=lambda v: type(v).__name__)
def test_message_names_value_limit_and_remedy(error, parts):
    assert isinstance(error, ValueError)
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize("error", [error for error, _ in CASES], ids=lambda e: type(e).__name__)
def test_survives_pickle(error):
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_every_class_has_a_case():
    def leaves(cls):
        children = cls.__subclasses__()
        return set().union(*map(leaves, children)) if children else {cls}

    assert leaves(errors.FxoptError) == {type(error) for error, _ in CASES}


def test_strict_rule_lists_all_reasons_of_the_nearest_miss_only():
    message = str(errors.StrictRule("attention", (FAR, MISS)))
    assert "mask is int" in message
    assert "model.py:9" not in message


def test_unknown_name_without_a_near_one_suggests_nothing():
    assert "did you mean" not in str(errors.UnknownTarget("qqqq", ("h100",)))


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.12.0a0+git1", "3.0.0"])
def test_supported_torch_passes(version):
    errors.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.1"])
def test_old_torch_is_refused(version):
    with pytest.raises(errors.UnsupportedTorch, match=r"2\.11 or newer"):
        errors.check_torch(version)


def test_inputs_are_checked_against_the_signature():
    module = nn.Linear(2, 2)
    errors.check_inputs(module, (torch.zeros(1, 2),), {})
    with pytest.raises(errors.InputMismatch, match=r"missing a required argument: .input."):
        errors.check_inputs(module, (), {"y": torch.zeros(1, 2)})
