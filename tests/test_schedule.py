"""Schedules are data; the step is told, and holds for the whole process."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fxopt
from fxopt import errors, recipe_errors
from fxopt.recipes import RECIPES, Phase, Recipe, find, gemm
from fxopt.schedule import current_step

ROW = gemm("e4m3/row/fp32", "e4m3/row/fp32")


def recipe(*phases: Phase) -> Recipe:
    return replace(RECIPES["fp8_rowwise"], name="mine", schedule=phases)


MINE = recipe(Phase("fprop", 0, 100, ROW), Phase("fprop", 9400), Phase("wgrad", 50, 60))


def test_json_and_key_give_the_schedule_back() -> None:
    assert Recipe.from_json(MINE.to_json()) == MINE == find(MINE.key)
    assert hash(Recipe.from_json(MINE.to_json())) == hash(MINE)
    assert hash(MINE) != hash(RECIPES["fp8_rowwise"])
    written = json.loads(MINE.to_json())["schedule"][1]
    assert written == {"gemm": "fprop", "start": 9400, "stop": None, "formats": "high_precision"}


def test_what_is_in_force() -> None:
    base = replace(MINE, schedule=())
    expected = {
        0: replace(base, fprop=ROW),
        50: replace(base, fprop=ROW, wgrad=None),
        99: replace(base, fprop=ROW),
        100: base,
        9399: base,
        9400: replace(base, fprop=None),
        10**9: replace(base, fprop=None),
    }
    assert {step: MINE.at(step) for step in expected} == expected


def test_phases_count_as_formats() -> None:
    late = Recipe("late", schedule=(Phase("dgrad", 3, None, ROW),))
    assert late.gemms == [("dgrad from step 3", ROW)]


PROBLEMS: dict[str, tuple[Phase, ...]] = {
    "two phases set fprop from step 5 to step 9": (Phase("fprop", 0, 10), Phase("fprop", 5)),
    "two phases set wgrad from step 7;": (Phase("wgrad", 7), Phase("wgrad", 0)),
    "two phases set dgrad from step 2 to step 2": (Phase("dgrad", 2, 3), Phase("dgrad", 0, 4)),
    "unknown GEMM 'forward'; known: fprop, dgrad, wgrad": (Phase("forward", 0),),
    "start -1 and stop None are no steps": (Phase("fprop", -1),),
    "start 0.94 and stop None are no steps": (Phase("fprop", 0.94),),
    "it stops at step 3, before its first step 3 is over": (Phase("fprop", 3, 3),),
    "blocks 1x32 have e8m0 scales, not 'fp32'": (
        Phase("fprop", 3, None, gemm("e4m3/1x32/fp32", "e4m3/1x32/e8m0")),
    ),
    "fprop from step 3.a rounds stochastically": (
        Phase("fprop", 3, None, gemm("e4m3/row/fp32/stochastic", "e4m3/row/fp32")),
    ),
    "schedule is ({'gemm': 'fprop'},), not a tuple of Phase": ({"gemm": "fprop"},),
}


@pytest.mark.parametrize("problem, phases", PROBLEMS.items())
def test_contradictions_are_refused(problem: str, phases: Any) -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        recipe(*phases)
    assert problem in str(caught.value)


def test_all_problems_are_listed() -> None:
    with pytest.raises(errors.InvalidRecipe) as caught:
        recipe(Phase("fprop", 0), Phase("fprop", 5), Phase("forward", 3), Phase("dgrad", -1))
    message = str(caught.value)
    assert "two phases set fprop" in message and "'forward'" in message and "-1" in message


def test_phases_that_touch_do_not_overlap() -> None:
    recipe(Phase("fprop", 0, 10), Phase("fprop", 10), Phase("dgrad", 5, 15))


@pytest.mark.parametrize(
    "phase", [3, {"gemm": "fprop"}, {"gemm": "fprop", "start": 0, "end": 3}, {"start": 0}]
)
def test_bad_json_is_refused(phase: object) -> None:
    text = json.dumps({"name": "x", "schedule": [phase]})
    with pytest.raises(errors.InvalidRecipe, match="is not an object of gemm and start, stop"):
        Recipe.from_json(text)


def test_a_list_of_no_phases_is_refused() -> None:
    with pytest.raises(errors.InvalidRecipe, match="schedule is 'late', not a list"):
        Recipe.from_json('{"name": "x", "schedule": "late"}')


@pytest.mark.parametrize("step", [7, np.int64(7), torch.tensor(7)])
def test_the_step_is_told(step: Any) -> None:
    assert current_step() is None
    with fxopt.at_step(step):
        assert current_step() == 7
        with fxopt.at_step(8):
            assert current_step() == 8
        assert current_step() == 7
    with pytest.raises(KeyError), fxopt.at_step(3):
        raise KeyError
    assert current_step() is None


def test_other_threads_are_in_the_same_step() -> None:
    """A backward on CUDA computes checkpoints again in a thread of autograd's own."""
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(current_step()))
    with fxopt.at_step(5):
        thread.start()
        thread.join()
    assert found == [5]


@pytest.mark.parametrize("step", [-1, 0.5, None, "3"])
def test_what_is_no_step_is_refused(step: Any) -> None:
    with pytest.raises(recipe_errors.InvalidStep), fxopt.at_step(step):
        pass
    assert current_step() is None
