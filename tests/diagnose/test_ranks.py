"""Processes that measure together: shared decisions, and a rank that raises or is silent."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fxopt.diagnose import record
from fxopt.diagnose.ranks import ALONE, RankFailed, Ranks
from tests.diagnose.launch import fxopt, start

STEPS = """
import os, time
import torch
import torch.distributed as dist

RANK = int(os.environ["RANK"])

def step_of(fault=None, with_collective=False, calls=6):
    weight = torch.randn(64, 64, requires_grad=True)
    count = 0
    def step():
        nonlocal count
        count += 1
        if count > calls and RANK == 1 and fault is not None:
            fault()
        weight.grad = None
        loss = (weight @ weight).square().mean()
        loss.backward()
        if with_collective:
            dist.all_reduce(weight.grad)
        return loss.detach()
    return step

def raises():
    raise ValueError("planted")

def plain():
    return step_of()

def reducing():
    return step_of(with_collective=True)

def raises_alone():
    return step_of(raises)

def raises_before_a_collective():
    return step_of(raises, with_collective=True)

def hangs_alone():
    return step_of(lambda: time.sleep(60))  # longer than any patience

def absent_on_rank_one():
    if RANK == 1:
        raise ValueError("no data here")
    return step_of()
"""


@pytest.fixture
def store():
    return torch.distributed.HashStore()


def of_two(store, patience=5.0) -> tuple[Ranks, Ranks]:
    return Ranks(0, 2, store, patience), Ranks(1, 2, store, patience)


def test_a_process_alone_decides_alone():
    assert ALONE.agree([1.0, 2.0]) == [1.0, 2.0]
    ALONE.fail("", "")
    assert ALONE.failure() is None


def test_every_rank_gets_the_largest_of_each_value_at_each_decision(store):
    ranks = of_two(store)
    with ThreadPoolExecutor() as pool:
        for number in (3.0, 1.0, 2.0):
            values = [1.0, number], [2.0, 0.5]
            found = list(pool.map(lambda rank, own: rank.agree(own), ranks, values))
            assert found == [[2.0, number]] * 2


def test_a_failure_reaches_who_decides_and_who_fails_because_of_it(store):
    first, second = of_two(store)
    assert first.failure() is None
    second.fail("ValueError: planted", "steps.py:9")
    assert (first.failure().rank, first.failure().where) == (1, "steps.py:9")
    with pytest.raises(RankFailed, match="rank 1: ValueError: planted"):
        first.agree([1.0])
    assert second.failure() is None  # it was there first


def test_a_silent_rank_is_named(store):
    first, _ = of_two(store, patience=0.05)
    with pytest.raises(RankFailed, match=r"rank 1: has not come to decision 0 within 0\.05 s"):
        first.agree([1.0])


def test_ranks_that_part_end_without_cleaning_up(store, monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    _, second = of_two(store)
    assert second.leave(3) == 3
    second.fail("ValueError: planted", "steps.py:9")
    second.leave(2)
    assert left == [2]


def bench(folder: Path, candidate: str, *options: str, baseline: str = "plain"):
    (folder / "steps.py").write_text(STEPS)
    steps = f"steps.py:{baseline}", "--candidate", f"steps.py:{candidate}"
    return fxopt(folder, "bench", *steps, "--seconds", "2", *options, num_ranks=2)


@pytest.mark.parametrize(
    ("baseline", "candidate", "error"),
    [
        ("reducing", "raises_before_a_collective", "rank 1: ValueError: planted"),
        pytest.param(
            *("plain", "raises_alone", "rank 1: ValueError: planted"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("plain", "absent_on_rank_one", "rank 1: ValueError: no data here"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_raises_alone_ends_all_with_its_error(tmp_path, baseline, candidate, error):
    done = bench(tmp_path, candidate, baseline=baseline)
    assert done.returncode == 1, done.stderr  # torchrun's, for a worker's 2
    assert (tmp_path / "claim.json").exists(), done.stderr
    (claim,) = record.read(tmp_path / "claim.json").claims
    assert claim.status == "failed"
    assert claim.stop.error == error
    assert "steps.py:" in claim.stop.where
    assert "exitcode  : 2" in done.stderr


def test_a_rank_that_hangs_is_named_after_the_time_limit(tmp_path):
    done = bench(tmp_path, "hangs_alone", "--patience", "3")
    assert done.returncode == 1, done.stderr
    (claim,) = record.read(tmp_path / "claim.json").claims
    assert claim.stop.error.startswith("rank 1: has not come to decision")
    assert claim.stop.error.endswith("within 3 s")


@pytest.mark.slow
def test_control_c_on_two_ranks_leaves_a_partial_record(tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    steps = "bench", "steps.py:plain", "--candidate", "steps.py:plain"
    options = "--margin", "1e-9", "--seconds", "60", "--world-size", "2"
    with start(tmp_path, *steps, *options, start_new_session=True) as process:
        for line in process.stderr:
            if line.endswith("step: timing\n"):
                break
        time.sleep(3)  # for some rounds
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.communicate(timeout=60)
    assert process.returncode == 3
    (claim,) = record.read(tmp_path / "claim.json").claims
    assert claim.status == "interrupted"
    assert claim.samples.rounds
