"""What a figure may depend on: of the machine, the packages and the checkout."""

import subprocess
from types import SimpleNamespace

import torch

from fxopt.diagnose import environment

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_a_cpu_has_no_driver_but_all_fields():
    found = environment.describe(CPU)
    assert found["torch"] == torch.__version__
    assert found["device"]
    assert {name: found[name] for name in environment.OF_GPU} == dict.fromkeys(environment.OF_GPU)


def test_a_gpu_is_asked_by_its_own_number(monkeypatch):
    asked = []
    known = {
        "driver_version": "580.1",
        "power.limit": "700.00 W",
        "clocks.max.sm": "1980 MHz",
    }

    def output(command, folder):
        asked.append(command)
        return known.get(command[2].partition("=")[2], "") if command[0] == "nvidia-smi" else ""

    monkeypatch.setattr(environment, "_output", output)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"ab-{device}")
    )
    found = environment.describe(GPU)
    assert "--id=GPU-ab-cuda:1" in asked[0]
    assert (found["driver"], found["power_limit"]) == ("580.1", "700.00 W")
    # A field that this driver does not know hides none of the others.
    assert (found["largest_clock"], found["application_clock"]) == ("1980 MHz", None)
    monkeypatch.setattr(environment, "_output", lambda *_: "")
    assert environment.describe(GPU)["driver"] is None


def test_a_commit_says_whether_files_changed(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    assert environment.commit(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    clean = environment.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == clean + "+"
