"""The contest of attention backends: what a CPU has runs, and a clock that stands in decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import attention
from bench.attention import Attention, best_row, measure, search
from bench.contest import Contest
from fxopt.diagnose.devices import TorchDevice
from fxopt.diagnose.protocol import Plan
from fxopt.diagnose.verdict import Regime
from fxopt.kernels import attention as kernels
from fxopt.kernels import fp8_attention
from fxopt.kernels.attention import TABLE, Row
from tests.kernels.emulated_varlen import on_cpu

CPU = torch.device("cpu")
PLAN = Plan(min_rounds=2, max_rounds=2, min_seconds=0.0, min_warmup=0.0, warmup_seconds=0.0)
SMALL, LARGE = Attention("small", 1, 2, 16, 8), Attention("large", 2, 2, 16, 8)


class Timed(Contest):
    """Speedups over PyTorch's own choice are as said."""

    def __init__(self, speedups: dict[str, float], wrong: str | None = None) -> None:
        super().__init__(TorchDevice(CPU), PLAN)
        self.speedups, self.wrong = speedups, wrong

    def race(self, case, name, baseline, candidate):
        backend = name.partition(" vs ")[0]
        speedup = self.speedups.get(backend, 1.0)
        return Regime(8, 1.0, 1.0 / speedup, 1.0, speedup, speedup - 0.01, speedup + 0.01)

    def is_right(self, case, who, baseline, candidate, exact, tolerance=None):
        right = super().is_right(case, who, baseline, candidate, exact, tolerance)
        return right and who != self.wrong


@pytest.mark.parametrize("options", [{}, {"has_mask": True}, {"num_kv_heads": 1}])
def test_every_backend_that_takes_a_call_is_timed(options, capsys) -> None:
    contest = Contest(TorchDevice(CPU), PLAN)
    measure(contest, Attention("toy", 1, 2, 16, 8, **options), torch.float32)
    rows = {row.metric: row for row in contest.found}
    wrong = {metric: row.value for metric, row in rows.items() if "wrong" in metric}
    assert wrong == {"flash, wrong tensors": 0, "math, wrong tensors": 0}
    assert rows["math vs PyTorch's choice, speedup"].value > 0
    assert rows["fxopt's choice vs the best"].target == ">= 0.99"
    said = capsys.readouterr().err
    for backend in ("cudnn", "flash3", "flash4", "efficient", "varlen", "flex", "fp8"):
        assert f"toy: attention={backend!r} cannot run q [1, 2, 16, 8]" in said


def test_packed_keys_are_a_candidate_under_a_mask() -> None:
    """Right, with the kernel emulated, and named by the row that it would get."""
    contest, padded = Timed({"varlen": 1.5}), replace(SMALL, batch=2, has_mask=True)
    with on_cpu() as kernels:
        found = measure(contest, padded, torch.float32)
    assert found["varlen"] == 1.5 and "backward" in kernels.calls
    wrong = {row.metric: row.value for row in contest.found}["varlen, wrong tensors"]
    row = best_row((padded,), [found])
    assert wrong == 0 and row == Row("varlen", 1.5, 8, "padding", False, False, 12, 24)


def test_a_window_is_a_row_of_its_own() -> None:
    contest, windowed = Timed({"varlen": 1.5}), replace(SMALL, window=4)
    with on_cpu() as kernels:
        found = measure(contest, windowed, torch.float32)
    assert kernels.windows == {(3, 0)}
    row = Row("varlen", 1.5, 8, "window", False, False, 12, 24)
    assert best_row((windowed,), [found]) == row


def test_the_forward_in_fp8_is_compared_with_the_best_and_is_no_row(monkeypatch) -> None:
    """Emulated here, with a larger head."""
    monkeypatch.setattr(fp8_attention, "missing", lambda device: None)
    contest, call = Timed({"flash": 1.25, "fp8 forward": 1.4}), replace(SMALL, head_dim=32)
    assert "fp8" not in measure(contest, call, torch.bfloat16)
    rows = {row.metric: row.value for row in contest.found}
    assert rows["fp8 forward, wrong tensors"] == 0
    assert rows["fp8 forward vs flash, speedup"] == 1.4


def test_the_fastest_is_the_row_to_add() -> None:
    found = [
        {"pytorch": 1.0, "cudnn": 1.5, "flash": 1.1},
        {"pytorch": 1.0, "cudnn": 1.3, "flash": 1.2},
    ]
    row = Row("cudnn", 1.3, 8, "none", False, False, 12, 24)
    assert best_row((SMALL, LARGE), found) == row


@pytest.mark.parametrize(
    "found",
    [
        [{"pytorch": 1.0, "flash": 1.01}],
        # Refused, wrong or slower in the second call.
        [{"pytorch": 1.0, "flash": 1.5}, {"pytorch": 1.0}],
        # Inductor would undo it.
        [{"pytorch": 1.0, "math": 1.5}],
    ],
)
def test_no_row(found) -> None:
    assert best_row((SMALL, LARGE), found) is None


def test_what_is_slower_is_out_and_the_best_is_compared_with_the_choice() -> None:
    contest = Timed({"flash": 1.25, "math": 0.8})
    assert measure(contest, SMALL, torch.float32) == {"pytorch": 1.0, "flash": 1.25}
    share = next(r for r in contest.found if r.metric == "fxopt's choice vs the best")
    assert share.value == 0.8 and share.holds is False


def test_what_is_wrong_is_not_timed() -> None:
    contest = Timed({"math": 2.0}, wrong="math")
    assert measure(contest, SMALL, torch.float32) == {"pytorch": 1.0, "flash": 1.0}
    assert not any("math vs" in row.metric for row in contest.found)


def test_the_target_is_what_the_table_chooses(monkeypatch) -> None:
    row = Row("math", 1.2, 8, "none", False, False, 12, 24, torch.float32)
    monkeypatch.setitem(TABLE, "cpu", (row,))
    contest = Timed({"flash": 1.1, "math": 1.2})
    measure(contest, SMALL, torch.float32)
    share = next(r for r in contest.found if r.metric == "fxopt's choice vs the best")
    assert share.value == 1.0 and share.holds


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 1, "is_causal": True},
        {"has_mask": True, "num_tokens": 9},
        {"num_kv_heads": 1, "window": 4},
    ],
)
def test_a_row_holds_for_the_calls_that_it_was_made_of(options, monkeypatch) -> None:
    call = replace(SMALL, **options)
    row = best_row((call,), [{"pytorch": 1.0, "cudnn": 1.5}])
    made = []
    monkeypatch.setattr(kernels, "choose", lambda asked, described: made.append(described()))
    monkeypatch.setattr(kernels, "attend", lambda choice, described, run, window: run())
    call.subject("auto", CPU, torch.bfloat16)()
    assert made == [call.described(CPU, torch.bfloat16)]
    assert row is not None and row.holds(made[0])


def test_rows_are_printed_as_they_are_to_be_written(capsys, monkeypatch) -> None:
    monkeypatch.setattr(attention, "measure", lambda contest, call: {"pytorch": 1.0, "flash": 1.25})
    search(Timed({}), (SMALL, LARGE))
    name, _, row = capsys.readouterr().err.strip().partition(": ")
    assert name == "'cpu', head 8, no mask, 16 tokens"
    assert eval(row) == Row("flash", 1.25, 8, "none", False, False, 12, 24)
    monkeypatch.setattr(attention, "measure", lambda contest, call: {"pytorch": 1.0})
    search(Timed({}), (SMALL,))
    assert capsys.readouterr().err.strip().endswith(": as it is")


def test_calls_of_one_kind_are_one_case(capsys, monkeypatch) -> None:
    monkeypatch.setattr("bench.contest.gpu", lambda: CPU)
    monkeypatch.setattr(attention, "measure", lambda contest, call: {"pytorch": 1.0})
    assert attention.main(["--only", "flux-dev", "4608"]) == 0
    said = capsys.readouterr().err
    assert "[1/1] head 128, no mask, 4608 tokens: flux-dev; flux-dev, batch 4; z-image" in said
