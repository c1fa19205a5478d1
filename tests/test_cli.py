"""The `fxopt` command, as a user types it."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxopt import cli
from fxopt.hardware import TARGETS
from fxopt.presets import PRESETS


def fxopt(*arguments, **environment):
    return python("-m", "fxopt", *arguments, **environment)


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        check=False,
    )


# The last line says what it has taken.
MEASURED = """
import runpy, sys
from tests.memory import peak
try:
    runpy.run_module("fxopt", run_name="__main__")
finally:
    print(peak(), file=sys.stderr)
"""


def test_explain_plans_a_preset_within_its_means(tmp_path):
    pytest.importorskip("diffusers", reason="presets need diffusers")
    page = tmp_path / "page.html"
    start = time.monotonic()
    done = python(
        *("-c", MEASURED, "explain", "flux-dev", "--target", "h100", "--batch", "1"),
        *("--height", "1024", "--width", "1024", "--html", str(page), "--json", "-"),
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    gigabytes = int(done.stderr.split()[-1]) / 2**30
    # Promised: 60 s and 3 GB on two cores.
    assert seconds < 60
    assert gigabytes < 3
    report = json.loads(done.stdout)
    assert [b["count"] for b in report["blocks"]] == [19, 38]
    assert {a["rule"] for a in report["applied"]} >= {"qk_norm_rope", "norm_modulate"}
    for block in report["blocks"]:
        assert block["after"]["glue_s"] < block["before"]["glue_s"]
        assert block["after"]["gemm_flops"] == block["before"]["gemm_flops"]
        assert block["after"]["attention_flops"] == block["before"]["attention_flops"]
    assert "FluxSingleTransformerBlock" in page.read_text()


def test_explain_takes_a_users_own_model(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "def example():\n"
        "    with torch.device('meta'):\n"
        "        return torch.nn.Linear(64, 64), (torch.empty(8, 64),)\n"
    )
    done = fxopt("explain", f"{path}:example", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert "Linear x1" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["target"] == "h100"


MINE = """
import torch
from beside import SIZE
def example():
    return torch.nn.Linear(SIZE, SIZE), (torch.empty(8, SIZE),)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "beside.py").write_text("SIZE = 64")
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:example"


def test_a_reader_that_closes_the_pipe_is_no_mistake(mine):
    """Nor does it matter what folder the command is run in: the file finds what lies beside it."""
    command = f"{sys.executable} -m fxopt explain {mine} --json - | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_an_output_that_cannot_be_written_is_said_first(capsys, tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "page.html"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["explain", "flux-dev", "--html", str(path)])
        assert caught.value.code == 2
        assert f"cannot write {path}" in capsys.readouterr().err


def test_a_full_disk_is_one_line_on_standard_error(mine, capsys, tmp_path, monkeypatch):
    def write(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write)
    assert cli.main(["explain", mine, "--json", str(tmp_path / "report.json")]) == 2
    assert "cannot write the report: [Errno 28]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["flux-def"], "unknown preset 'flux-def'; did you mean 'flux-dev'"),
        (["flux-dev", "--target", "h10"], "unknown target 'h10'; did you mean 'h100'"),
        (["nothing.py:f"], "there is no file 'nothing.py'"),
    ],
)
def test_mistake_is_one_line_on_standard_error(capsys, arguments, message):
    assert cli.main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fxopt: ")
    assert message in captured.err


@pytest.mark.parametrize(
    "arguments", [[], ["explain"], ["explain", "flux-dev", "--batch", "0"], ["explain", "x", "-q"]]
)
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: fxopt" in capsys.readouterr().err


def test_help_names_every_preset_and_target(capsys):
    with pytest.raises(SystemExit):
        cli.main(["explain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in (*PRESETS, *TARGETS):
        assert name in text.replace("- ", "-")


def test_progress_is_silent_while_steps_are_fast(capsys):
    progress = cli.Progress()
    progress(0, 2, "FluxBlock")
    assert capsys.readouterr().err == ""
    progress.start -= 3
    progress(1, 2, "FluxBlock")
    assert "1/2 FluxBlock 3 s" in capsys.readouterr().err
