"""The two benches that time this CPU, at sizes that take seconds; no figure of theirs is judged."""

import json

import pytest
import torch

from bench import cpu_step, models, setup


def tiny() -> models.Example:
    return models.flux(2, num_heads=2, head_dim=32, side=4)


def test_a_row_for_every_door(monkeypatch, capsys):
    monkeypatch.setattr(cpu_step, "CASES", {"tiny": tiny})
    assert cpu_step.main(["--json", "-", "--rounds", "2", "--no-compile"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["eager [ms]"]["value"] > 0
    for door in ("optimize", "swap"):
        speedup = rows[f"{door} vs eager, speedup"]
        assert speedup["target"] == ">= 0.98"
        low, high = (rows[f"{door} vs eager, 95% {end}"]["value"] for end in ("from", "to"))
        assert low <= speedup["value"] <= high


def test_a_door_that_changes_the_loss_is_not_timed():
    one, other = torch.ones(()), torch.full((), 1 + 2 * cpu_step.SAME_LOSS)
    with pytest.raises(RuntimeError, match=r"loss 1\.0 by eager, but 1\.0002"):
        list(cpu_step.report("case", "eager", "swap", lambda: one, lambda: other, 2, 0.98))


@pytest.mark.parametrize("case", cpu_step.CASES)
def test_every_case_trains(case):
    model, inputs = cpu_step.CASES[case]()
    assert models.step(model, inputs).isfinite()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit):
        cpu_step.main(["--only", "gpt"])
    assert "there are flux, flux-512, sd3.5, wan, llama-eager" in capsys.readouterr().err


def test_setup_compares_depths_and_torch_compile(monkeypatch, capsys):
    seconds = {("eager", 2): 0.1, ("optimize", 2): 2.0, ("optimize", 8): 2.5}
    seconds |= {("eager", 8): 0.2, ("torch.compile", 2): 40.0, ("torch.compile", 8): float("inf")}
    monkeypatch.setattr(setup, "measure", lambda door, depth, time_limit=None: seconds[door, depth])
    setup.main(["--json", "-", "--depths", "2", "8", "--time-limit", "100"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {(row["case"], row["metric"]): (row["value"], row["holds"]) for row in rows}
    assert found["flux, 2 layers", "optimize / torch.compile"] == (0.05, True)
    stopped = "optimize / torch.compile, stopped: at most"
    assert found["flux, 8 layers", stopped] == (0.025, True)
    assert found["flux, 8 / 2 layers", "optimize"] == (1.25, True)


def test_setup_measures_in_a_process_of_its_own():
    assert 0 < setup.measure("eager", 2) < float("inf")
    assert setup.measure("torch.compile", 2, time_limit=0.01) == float("inf")
