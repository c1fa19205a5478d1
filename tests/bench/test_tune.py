"""The search for launch parameters, with kernels in the interpreter and a clock that stands in."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from bench import tune
from bench.contest import Contest
from bench.launches import recorded
from bench.ops import OPS, Shape
from fxopt.diagnose.devices import TorchDevice
from fxopt.diagnose.protocol import Plan
from fxopt.kernels import triton_tables
from fxopt.kernels.triton_tables import Row
from tests.kernels.interpreted import Interpreted

CPU = torch.device("cpu")
# Six rounds are the fewest that give an interval.
PLAN = Plan(
    min_rounds=6, max_rounds=6, min_seconds=0.0, min_warmup=0.0, warmup_seconds=0.0, flush=True
)
SMALL, LARGE = (Shape(batch=1, tokens=tokens, features=384) for tokens in (2, 3))
INTERPRET = InterpretedFunction.run
FORWARD = "norm_modulate forward"
NORMS = [op for op in OPS if op.name.endswith((": RMS norm", ": layer norm, affine"))]


class Clock(TorchDevice):
    """A step takes as long as is said of the warps that it launches.

    Args:
        seconds_of: by number of warps, of all row counts or by row count; 1 of all others.
        wrong: with this many warps the forward computes nothing.
        too_large: with this many, the device refuses.
    """

    def __init__(self, seconds_of, wrong=None, too_large=None):
        super().__init__(CPU)
        self.seconds_of, self.wrong, self.too_large = seconds_of, wrong, too_large
        self.taken = {}

    def launch(self, kernel, *args, grid, warmup, **options):
        num_warps = options["num_warps"]
        if num_warps == self.too_large:
            raise OutOfResources(2, 1, "registers")
        seconds = self.seconds_of.get(num_warps, 1.0)
        self.last = seconds.get(grid[0], 1.0) if isinstance(seconds, dict) else seconds
        if num_warps != self.wrong or kernel.__name__ != "forward_kernel":
            INTERPRET(kernel, *args, grid=grid, warmup=warmup, **options)

    def seconds(self, step, num_calls, flush):
        if step not in self.taken:
            step()
            self.taken[step] = self.last
        return self.taken[step]


def search(ops=NORMS[:1], **clock):
    """What `tuned` finds for the forward of norms; the contest that it held."""
    contest = Contest(Clock(**clock), PLAN)

    def launch(kernel, *args, **options):
        contest.device.launch(kernel, *args, **options)

    with recorded(launch, InterpretedFunction), Interpreted():
        return tune.tuned(contest, FORWARD, ops, (SMALL, LARGE), torch.float32), contest


def row(num_warps):
    bounds = {"min_features": 257, "max_features": 512, "min_rows": 2, "capability": 0}
    return Row({"num_warps": num_warps}, **bounds)


def test_the_fastest_is_the_row_to_add():
    found, contest = search(NORMS, seconds_of={2: 0.8, 4: 0.5, 8: 0.9})
    assert found == row(4)
    # 4 candidates beside today's one, 2 ops, 2 shapes.
    assert len(contest.samples) == 16
    taken = [rounds for case, rounds in contest.samples.items() if case.endswith("4}")]
    assert taken == [[(1.0, 0.5, 0.5, 1.0)] * 6] * 4


def test_no_row_for_a_gain_within_the_margin():
    assert search(seconds_of={4: 0.99})[0] is None


def test_what_is_slower_at_one_row_count_is_out():
    found, _ = search(seconds_of={2: 0.8, 4: {2: 0.2, 3: 1.5}})
    assert found == row(2)


def test_what_is_wrong_is_neither_timed_nor_taken():
    found, contest = search(seconds_of={2: 0.1, 4: 0.5}, wrong=2)
    assert found == row(4)
    assert not any("2}" in case for case in contest.samples)
    assert [r.metric for r in contest.found if r.holds is False] == [
        "fxopt {'num_warps': 2}, wrong tensors"
    ]


def test_what_the_device_refuses_is_out(capsys):
    found, _ = search(seconds_of={16: 0.1, 4: 0.5}, too_large=16)
    assert found == row(4)
    assert "{'num_warps': 16}: out of resource: registers" in capsys.readouterr().err


def test_the_row_is_what_the_kernel_is_launched_with_where_it_holds(monkeypatch):
    table = (row(4), *triton_tables.TABLES[FORWARD])
    monkeypatch.setitem(triton_tables.TABLES, FORWARD, table)
    for shape, expected in ((SMALL, 4), (Shape(1, 1, 384), 1), (Shape(1, 2, 256), 1)):
        with Interpreted():
            trial = tune.Trial(Contest(Clock({}), PLAN), FORWARD, NORMS[0], shape, torch.float32)
        assert trial.today == {"num_warps": expected}


@pytest.mark.parametrize("kernel", tune.SPACES)
def test_every_candidate_computes_the_same(kernel):
    op = next(op for op in OPS if op.name.startswith(f"{kernel.split()[0]}:"))
    with Interpreted():
        trial = tune.Trial(Contest(TorchDevice(CPU), PLAN), kernel, op, SMALL, torch.float32)
        today = trial.step()
        for candidate in tune.candidates(kernel):
            found = tune.using(kernel, candidate, trial.step)()
            # Sums of 384 values in fp32, in another order.
            torch.testing.assert_close(found, today, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", tune.SPACES)
def test_every_space_holds_what_is_used_today(kernel):
    for features in tune.FEATURES:
        num_features = 4 * features if kernel.startswith("gated") else features
        today = triton_tables.parameters(kernel, num_features, 4608, torch.empty(0))
        assert today in tune.candidates(kernel)


def test_without_a_gpu_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "found.json"
    assert tune.main(["--json", str(out)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not out.exists()


def test_rows_are_printed_as_they_are_to_be_written(capsys, monkeypatch):
    monkeypatch.setattr("bench.contest.gpu", lambda: CPU)
    monkeypatch.setattr(tune, "tuned", lambda contest, kernel, ops, shapes: row(4) if ops else None)
    assert tune.main(["--only", FORWARD, "D=3072"]) == 0
    printed = capsys.readouterr().err.splitlines()[-1].split(": ", 1)
    assert printed[0] == f'"{FORWARD}", D=3072' and eval(printed[1]) == row(4)
