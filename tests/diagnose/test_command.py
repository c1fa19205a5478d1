"""`fxopt bench` from the command line: real steps, cheats, mistakes, interruptions."""

import errno
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fxopt.cli import main
from fxopt.diagnose import record
from fxopt.diagnose.devices import TorchDevice
from tests.diagnose.launch import fxopt, start

STEPS = """
import os
import time
import torch
from torch import nn

def training(batch=32, after=lambda step: step, before=lambda: None):
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))
    def step(x):
        model.zero_grad()
        before()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()
    return after(step), model, {"x": torch.randn(batch, 128)}

def baseline(batch=32):
    return training(batch)

def slower():
    return training(before=lambda: time.sleep(2e-3))

def zeros():
    return training(after=lambda step: lambda x: step(x) * 0)

def wider():
    return training(after=lambda step: lambda x: step(x).repeat(2))

def silent():
    return lambda: None

def number():
    return 3

def fails(error=RuntimeError("device lost")):
    def check():
        if "ROUNDS_HAVE_PASSED" in os.environ:
            raise error
    return training(before=check)

def interrupted():
    return fails(KeyboardInterrupt())

def named(batch=32, recipe="", ac="", door="", tokens=0, height=0, width=0):
    step, model, inputs = training(batch)
    print("called", batch, recipe, ac, door, tokens, height, width)
    return step, model, inputs
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs `fxopt bench` on two functions of STEPS; exit code and record, if one was written."""
    (tmp_path / "steps.py").write_text(STEPS)
    monkeypatch.chdir(tmp_path)

    def run(candidate: str, *options: str, baseline: str = "baseline"):
        subjects = f"steps.py:{baseline}", "--candidate", f"steps.py:{candidate}"
        code = main(["bench", *subjects, "--seconds", "1", *options])
        out = Path("claim.json")
        return code, record.read(out) if out.exists() else None

    return run


def test_a_slower_step_is_exit_code_one_and_a_full_record(bench, capsys):
    code, made = bench("slower", "--seconds", "20")  # enough rounds on a busy machine, too
    (claim,) = made.claims
    assert code == 1
    assert claim.verdict.label == "SLOW"
    assert claim.status == "complete"
    assert [check.when for check in claim.checks] == ["before", "after"]
    assert not any(check.failures for check in claim.checks)
    counted = {"float32": 5 * 2 * 32 * 128 * 128}
    assert claim.speed.flops == {"baseline": counted, "candidate": counted}
    assert claim.memory["baseline"].peak > 0
    assert len(claim.samples.rounds) == len(claim.samples.reference)
    assert {"torch", "device", "commit", "num_threads"} <= made.environment.keys()
    assert claim.configuration["seed"] == 0
    assert "SLOW" in capsys.readouterr().out


def test_wrong_results_are_invalid_and_not_timed(bench, capsys):
    code, made = bench("zeros")
    assert code == 1
    assert made.claims[0].verdict.label == "INVALID"
    assert not made.claims[0].samples.rounds
    assert "output 0: relative error 1.00e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("wider", "output 0 is [] in the baseline, but [2] in the candidate"),
        ("silent", "its step returned NoneType"),
        ("number", "it returned int, of which nothing can be called"),
        ("basline", "no function 'basline'; did you mean baseline"),
    ],
)
def test_mistakes_are_exit_code_two_and_leave_no_record(bench, capsys, candidate, message):
    code, made = bench(candidate, baseline="silent" if candidate == "silent" else "baseline")
    assert (code, made) == (2, None)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--device", "cuda:99"), "no device 'cuda:99' to measure on; this machine has cpu"),
        (("--dtype", "bf16"), "unknown option 'bf16'"),
    ],
)
def test_what_the_machine_lacks_is_exit_code_two(bench, capsys, option, message):
    code, made = bench("slower", *option)
    assert (code, made) == (2, None)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seconds", "--margin", "--tolerance"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_what_must_be_above_zero_is_exit_code_two(bench, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        bench("slower", f"{option}={value}")
    assert "is not above 0 and finite" in capsys.readouterr().err


def test_a_swept_option_must_be_an_argument(bench, capsys):
    code, _ = bench("slower", "--batch", "4")
    assert code == 2
    assert "takes no argument 'batch', which --batch would set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("candidate", "status", "code"), [("fails", "failed", 2), ("interrupted", "interrupted", 3)]
)
def test_what_was_measured_stays_and_is_marked(bench, capsys, monkeypatch, candidate, status, code):
    readings = TorchDevice.readings

    def passing(device):
        """Called after each round; the warm-up has none."""
        monkeypatch.setenv("ROUNDS_HAVE_PASSED", "1")
        return readings(device)

    monkeypatch.setattr(TorchDevice, "readings", passing)
    found, made = bench(candidate)
    (claim,) = made.claims
    assert (found, claim.status) == (code, status)
    assert claim.stop.phase == "timing"
    assert "steps.py:" in claim.stop.where
    assert claim.samples.rounds
    assert f"({status})" in capsys.readouterr().out


def test_a_device_that_disappears_fails_the_claim_and_keeps_its_rounds(bench, capsys, monkeypatch):
    seconds, readings = TorchDevice.seconds, TorchDevice.readings
    rounds = []

    def counting(device):
        rounds.append(device)
        return readings(device)

    def gone(device, step, num_calls, flush):
        if len(rounds) >= 3:
            raise torch.AcceleratorError("CUDA error: device unavailable")
        return seconds(device, step, num_calls, flush)

    monkeypatch.setattr(TorchDevice, "readings", counting)
    monkeypatch.setattr(TorchDevice, "seconds", gone)
    code, made = bench("slower")
    (claim,) = made.claims
    assert (code, claim.status, claim.stop.phase) == (2, "failed", "timing")
    assert claim.stop.error == "AcceleratorError: CUDA error: device unavailable"
    assert len(claim.samples.rounds) == 3
    assert [check.when for check in claim.checks] == ["before"]
    assert claim.memory.keys() == {"baseline", "candidate"}
    assert "stopped while timing: AcceleratorError" in capsys.readouterr().out


def test_a_full_disk_is_exit_code_two_after_the_table_and_leaves_the_good_record(
    bench, capsys, monkeypatch
):
    good = Path("claim.json")
    good.write_text("good")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    assert main(["bench", "steps.py:baseline", "--candidate", "steps.py:zeros"]) == 2
    captured = capsys.readouterr()
    assert "INVALID" in captured.out
    assert "cannot write claim.json: No space left on device; nothing was replaced" in captured.err
    assert good.read_text() == "good"
    assert sorted(path.name for path in Path().iterdir()) == ["claim.json", "steps.py"]


def test_control_c_leaves_a_partial_record_and_exit_code_three(tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    # The step against itself: there is nothing to decide.
    itself = "bench", "steps.py:baseline", "--candidate", "steps.py:baseline"
    with start(
        *(tmp_path, *itself, "--seconds", "60", "--margin", "1e-9"),
        stdout=subprocess.PIPE,
        # A shell's background jobs ignore Ctrl-C, and so would this process if the tests are one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for line in process.stderr:
            if line.endswith("timing\n") and "check" not in line:
                break
        time.sleep(2)  # for some rounds
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    (claim,) = record.read(tmp_path / "claim.json").claims
    assert (claim.status, claim.stop.error) == ("interrupted", "KeyboardInterrupt")
    assert claim.stop.phase == "timing"
    assert "(interrupted)" in out


def test_control_c_before_anything_was_measured_leaves_no_record(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("early.py").write_text("raise KeyboardInterrupt")
    assert main(["bench", "early.py:f", "--candidate", "early.py:f"]) == 3
    assert "interrupted before anything was measured" in capsys.readouterr().err
    assert not Path("claim.json").exists()


def test_every_swept_option_reaches_the_function(bench, capsys):
    options = {"batch": "4", "recipe": "fp8", "ac": "full", "door": "swap"}
    options |= {"tokens": "8", "height": "16", "width": "32"}
    listed = [word for name, value in options.items() for word in (f"--{name}", value)]
    code, made = bench("named", *listed, baseline="named")
    assert code in (0, 3)
    assert "called 4 fp8 full swap 8 16 32" in capsys.readouterr().out
    assert made.claims[0].name == (
        "step batch=4 tokens=8 height=16 width=32 recipe=fp8 ac=full door=swap"
    )


def test_a_sweep_is_one_record_with_a_claim_each(bench, tmp_path, capsys):
    code, made = bench("baseline", "--batch", "4", "8")
    assert code in (0, 3)  # a second is short: SAME, or not yet known
    assert [claim.name for claim in made.claims] == ["step batch=4", "step batch=8"]
    assert [claim.configuration["batch"] for claim in made.claims] == [4, 8]
    page = tmp_path / "page.html"
    assert main(["bench", "show", "claim.json", "--html", str(page), "--plots", "plot"]) == 0
    text = page.read_text()
    assert text.count("<svg") == 2
    assert made.digest in text
    assert "src=" not in text and 'href="http' not in text
    for name in ("plot-ratio", "plot-roofline"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    capsys.readouterr()
    assert main(["bench", "show", "claim.json", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| case | verdict | speedup")
    assert lines[2].startswith("| step batch=4 |")
    assert main(["bench", "compare", "claim.json", "claim.json"]) in (0, 3)
    for claim in made.claims:
        claim.configuration["seed"] = 7
    record.write(made, Path("seeded.json"))
    assert main(["bench", "compare", "claim.json", "seeded.json"]) == 2
    assert "configuration.seed is 0 in the old one and 7 in the new" in capsys.readouterr().err
    made.environment["torch"] = "2.0"
    record.write(made, Path("other.json"))
    assert main(["bench", "compare", "claim.json", "other.json"]) == 2
    assert "environment.torch is" in capsys.readouterr().err


def test_a_record_that_is_none_is_exit_code_two(tmp_path, capsys):
    path = tmp_path / "claim.json"
    path.write_text(json.dumps({"version": 1}))
    assert main(["bench", "show", str(path)]) == 2
    assert "is no valid claim record" in capsys.readouterr().err


def test_two_ranks_share_one_record(tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    options = "--candidate", "steps.py:slower", "--seconds", "2", "--world-size", "2"
    done = fxopt(tmp_path, "bench", "steps.py:baseline", *options)
    assert done.returncode == 1, done.stderr
    made = record.read(tmp_path / "claim.json")
    assert made.environment["world_size"] == 2
    assert made.claims[0].verdict.label == "SLOW"
