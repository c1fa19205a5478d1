"""The benchmarks for a GPU, run on a CPU at toy sizes: what they measure, not how fast it is."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from bench import attention, blocks, kernels
from bench.contest import Contest, run
from bench.ops import OPS, Shape
from fxopt.diagnose.devices import TorchDevice
from fxopt.diagnose.protocol import Plan
from fxopt.diagnose.subjects import Subject
from fxopt.diagnose.suites import Sweep, forward_backward

SHAPE = Shape(batch=2, tokens=5, features=256)
ROUNDS = 2
PLAN = Plan(
    min_rounds=ROUNDS, max_rounds=ROUNDS, min_seconds=0.0, min_warmup=0.0, warmup_seconds=0.0
)
CPU = torch.device("cpu")
BANDWIDTH = 1e9  # bytes/s, as if it had been measured
TORCHAO = ("torchao", "torchao, torch.compile")


@pytest.fixture
def contest():
    contest = Contest(TorchDevice(CPU), PLAN)
    contest.bandwidth = BANDWIDTH
    return contest


def uncompiled(function, mixed_order=True):
    return function


def figures(contest):
    return {row.metric: row for row in contest.found}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_is_right_and_measured(contest, op):
    kernels.measure(contest, op, SHAPE, torch.float32, uncompiled)
    found = figures(contest)
    assert found["fxopt, wrong tensors"].value == 0
    assert {"forward vs torch.compile, speedup", "backward vs torch.compile, speedup"} <= {*found}
    assert all(len(rounds) == ROUNDS for rounds in contest.samples.values())


def test_share_of_bandwidth_is_least_time_over_time_taken(contest):
    op = OPS[0]
    kernels.measure(contest, op, SHAPE, torch.float32, uncompiled)
    found = figures(contest)
    num_bytes = 2 * 5 * 256 * 4
    for which, num_tensors in (("forward", 4), ("backward", 6)):
        taken_us = found[f"{which} vs torch.compile, candidate [us]"].value
        share = found[f"{which}, share of copy bandwidth"].value
        # The same two figures, multiplied and divided in another order.
        assert share == pytest.approx(
            num_tensors * num_bytes / BANDWIDTH / (taken_us * 1e-6), rel=1e-9
        )


def test_a_wrong_compiler_is_shown_and_timed_again(contest):
    def broken(function, mixed_order=True):
        return (lambda **t: 1.1 * function(**t)) if mixed_order else function

    kernels.measure(contest, OPS[3], SHAPE, torch.float32, broken)
    found = figures(contest)
    assert found["torch.compile, wrong tensors"].value > 0
    assert found[f"{kernels.WITHOUT}, wrong tensors"].value == 0
    assert f"backward vs {kernels.WITHOUT}, speedup" in found


def test_a_wrong_op_misses_its_target(contest):
    op = dataclasses.replace(OPS[4], fused=lambda x, weight: 1.1 * OPS[4].fused(x, weight=weight))
    kernels.measure(contest, op, SHAPE, torch.float32, uncompiled)
    assert figures(contest)["fxopt, wrong tensors"].holds is False


class Block(nn.Module):
    """A norm, a modulation and two linears with an activation between them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, scale):
        hidden = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale)
        return x + self.down(F.gelu(self.up(hidden), approximate="tanh"))


def block(door=None, recipe="bf16"):
    torch.manual_seed(0)
    model = Block()
    inputs = {"x": torch.randn(2, 16, 32, requires_grad=True), "scale": torch.randn(2, 1, 32)}
    forward = model if door is None else door(model, recipe=recipe)
    step = functools.partial(forward_backward, forward, model, 0)
    return Subject("block", step, model, inputs)


def test_a_block_is_right_and_measured_in_all_its_forms(contest):
    makes = {
        "eager": block,
        "torch.compile": block,  # Inductor would take a minute here
        "fxopt": functools.partial(block, fxopt.optimize),
        "fxopt fp8": functools.partial(block, fxopt.optimize, "fp8"),
        "torchao": functools.partial(blocks.with_torchao, block, False),
    }
    blocks.measure(contest, "flux-dev-single", makes, blocks.BLOCKS["flux-dev-single"])
    found = figures(contest)
    assert all(found[f"{who}, wrong tensors"].value == 0 for who in makes if who != "eager")
    assert found["fxopt vs eager, speedup"].target == ">= 1.2"
    assert found["fxopt fp8 vs fxopt, speedup"].target == ">= 1.2"
    assert found["fxopt fp8 vs torchao, speedup"].target is None


def test_every_block_is_a_preset_block_and_has_all_forms():
    for name in blocks.BLOCKS:
        found = blocks.contenders(name, Sweep(), CPU)
        assert {*found} == {"eager", "torch.compile", "fxopt", "fxopt fp8", *TORCHAO}


@pytest.mark.parametrize("command", [kernels.main, blocks.main, attention.main])
def test_without_a_gpu_nothing_is_written(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "found.json"
    assert command(["--json", str(out)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not out.exists()


def test_results_are_saved_with_their_samples(contest, tmp_path):
    kernels.measure(contest, OPS[4], SHAPE, torch.float32, uncompiled)
    contest.save("kernels", tmp_path)
    (written,) = tmp_path.iterdir()
    found = json.loads(written.read_text())
    assert found["environment"]["device"] and found["rows"]
    assert len(found["samples"]) == 3


def test_cases_run_by_all_parts_of_their_names_and_are_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.contest.gpu", lambda: CPU)
    names = ["norm, small", "norm, large", "rope, large"]
    cases = {name: lambda contest, n=name: contest.add(n, "tried", 1.0) for name in names}
    assert run("toys", None, cases, PLAN, ["--save", str(tmp_path), "--only", "norm", "large"]) == 0
    (written,) = tmp_path.glob("toys_*.json")
    assert [row["case"] for row in json.loads(written.read_text())["rows"]] == ["norm, large"]
    assert "norm, large" in capsys.readouterr().out


def test_a_case_that_fails_misses_a_target_and_the_next_ones_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.contest.gpu", lambda: CPU)

    def fails(contest):
        contest.add("first", "tried", 1.0)
        raise torch.OutOfMemoryError("40 GB")

    def cut_off(contest):
        (written,) = tmp_path.glob("toys_*.json")
        rows = json.loads(written.read_text())["rows"]
        assert [row["metric"] for row in rows] == ["tried", "errors"] and not rows[1]["holds"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("toys", None, {"first": fails, "second": cut_off}, PLAN, ["--save", str(tmp_path)])
    assert "OutOfMemoryError: 40 GB" in capsys.readouterr().err


def test_no_case_begins_when_the_time_is_over(monkeypatch, capsys):
    monkeypatch.setattr("bench.contest.gpu", lambda: CPU)
    cases = {name: lambda contest, n=name: contest.add(n, "tried", 1.0) for name in ("one", "two")}
    assert run("toys", None, cases, PLAN, ["--seconds", "-1"]) == 0
    assert "-1 s are over; not run: one; two" in capsys.readouterr().err


def test_the_first_cases_are_the_blocks_that_people_train():
    shapes = [(s.batch, s.tokens, s.features) for s in kernels.SHAPES[:2]]
    assert sorted(shapes) == [(1, 4608, 3072), (1, 32760, 5120)]
    assert len(set(kernels.SHAPES)) == 12


def test_an_unknown_case_names_the_known():
    with pytest.raises(SystemExit):
        kernels.main(["--only", "softmax"])
