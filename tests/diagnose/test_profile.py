"""`fxopt profile`: what it names first, what it leaves behind, and its page in a browser."""

import builtins
import dataclasses
import errno
import gc
import gzip
import json
import logging
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from fxopt.cli import main
from fxopt.demo.training import Scale, batches, build_model, flow_loss
from fxopt.diagnose import profile_page
from fxopt.diagnose.compiles import Compile
from fxopt.diagnose.errors import CannotWrite, EmptyWindow, RankEnded, TooFewSteps
from fxopt.diagnose.findings import findings, mean_walls, spreads
from fxopt.diagnose.marking import marked, outermost_modules, parts
from fxopt.diagnose.phases import EXPOSED, PHASES, Phase, Step
from fxopt.diagnose.profile_results import load
from fxopt.diagnose.profiling import (
    Profile,
    Profiled,
    Window,
    allocator_counts,
    report_on,
    snapshot,
)
from fxopt.report import Applied, Declined, Report
from tests.diagnose.launch import ENVIRONMENT, free_port, fxopt, start

MB = 1 << 20

TRAIN = """
import os, sys, time
import torch
import torch.distributed as dist
from torch import nn

from fxopt.demo.training import Batch, Scale, batches, build_model, flow_loss

plant = sys.argv[1]
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if world > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
torch._dynamo.config.recompile_limit = 1000


class Digits(torch.utils.data.IterableDataset):
    def __iter__(self):
        for batch in batches(scale, seed=rank):
            if plant == "slow loader":
                time.sleep(0.2)  # several times a step
            yield tuple(batch)


scale = Scale(num_double=1, num_single=1, num_heads=2, batch=8)
model = build_model(scale, seed=0)
net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
compiled = torch.compile(lambda x: (2 * x).sin(), backend="eager", dynamic=False)
optimizer = torch.optim.AdamW(net.parameters())
kept = []
for index, batch in enumerate(torch.utils.data.DataLoader(Digits(), batch_size=None)):
    optimizer.zero_grad()
    if plant == "slow rank" and rank == 1:
        time.sleep(0.25)  # likewise
    if plant == "raise" and rank == 1 and index == 5:
        raise ValueError("planted")
    loss = flow_loss(net, Batch(*batch))
    if plant == "recompile":
        for size in range(3):
            loss = loss + 1e-9 * compiled(torch.ones(3 + 3 * index + size)).mean()
    loss.backward()
    if plant == "leak":
        kept.append(torch.randn(2_000_000))
    if plant == "checkpoint" and index % 3 == 0:
        for _ in range(40):
            torch.save(model.state_dict(), f"{rank}.pt")
    optimizer.step()
"""
FIRST = {
    "slow loader": "data wait",
    "slow rank": "straggler",
    "checkpoint": "checkpointing",
    "recompile": "compilation",
    "leak": "leak",
}


def profile(folder: Path, plant: str, num_ranks: int, *options: str) -> subprocess.CompletedProcess:
    (folder / "train.py").write_text(TRAIN)
    words = "profile", "--out", "profile", *options, "train.py", plant
    return fxopt(folder, *words, num_ranks=num_ranks)


@pytest.mark.parametrize(
    "plant",
    ["slow rank", *(pytest.param(p, marks=pytest.mark.slow) for p in FIRST if p != "slow rank")],
)
def test_two_ranks_name_the_planted_cost_first(tmp_path, plant):
    done = profile(tmp_path, plant, 2, "--steps", "6", "--skip", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert found["findings"][0]["name"] == FIRST[plant]
    if plant == "slow rank":
        assert found["findings"][0]["evidence"].startswith("rank 1 ")
        # Of the 0.25 s that it sleeps.
        assert found["findings"][0]["seconds"] > 0.15
    if plant == "recompile":
        assert "<lambda> at train.py:" in found["findings"][0]["evidence"]
        assert "its guard failed: tensor 'x' size mismatch" in found["findings"][0]["evidence"]
    assert sum(found["phases_share"].values()) == pytest.approx(1)
    assert set(found["overhead"]) == {"0", "1"}
    assert "the profiler made a step" in done.stdout
    for rank in (0, 1):
        assert (tmp_path / "profile" / f"rank{rank}_trace.json.gz").exists()


def test_one_process_and_its_page(tmp_path):
    done = profile(tmp_path, "none", 1, "--steps", "2", "--skip", "1")
    assert done.returncode == 0, done.stderr
    phases = json.loads((tmp_path / "profile" / "profile.json").read_text())["phases_s"]
    for name in ("data wait", "forward", "backward", "optimizer"):
        assert phases[name] > 0
    with gzip.open(tmp_path / "profile" / "rank0_trace.json.gz") as file:
        overhead = json.load(file)["fxopt profile"]
    assert overhead["profiled_s"] > overhead["plain_s"] / 2 > 0
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium to open the page in")
    # A frame as wide as a phone, and how wide the page then is.
    (tmp_path / "phone.html").write_text(
        '<iframe src="profile/profile.html" style="width: 390px" onload="'
        'document.title = this.contentDocument.documentElement.scrollWidth"></iframe>'
    )
    shown = {}
    for name in ("profile/profile.html", "phone.html"):
        shown[name] = subprocess.run(
            [
                *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *("--allow-file-access-from-files", f"--user-data-dir={tmp_path}/browser"),
                f"file://{tmp_path}/{name}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    page = shown["profile/profile.html"]
    assert "Largest avoidable costs" in page
    assert page.count('class="bar"') == 2
    assert "aten::addmm" in page
    assert "held at the peak" in page
    assert "the profiler made a step" in page
    width = int(re.search(r"<title>(\d+)</title>", shown["phone.html"]).group(1))
    assert width <= 390


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "there is no script 'absent.py'"),
        (["--report", "absent.json", "short.py"], "absent.json is no report of fxopt's: No such"),
        (["--report", "short.py", "short.py"], "short.py is no report of fxopt's: JSONDecodeError"),
        (["--report", "list.json", "short.py"], "list.json is no report of fxopt's: "),
        (["--out", "short.py/out", "short.py"], "cannot write short.py/out: Not a directory"),
        (["--steps", "9", "short.py"], "the loop ended after 2 steps, a profile needs 24"),
    ],
)
def test_mistakes_are_exit_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("short.py").write_text(
        "import torch\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])\n"
        "optimizer.step(); optimizer.step()\n"
    )
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_control_c_is_exit_code_three(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("raise KeyboardInterrupt")
    assert main(["profile", "train.py"]) == 3
    assert "interrupted, there is no profile" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/profile/profile.*"))


def loop(profile: Profile, num_steps: int) -> None:
    model = nn.Linear(32, 32)
    optimizer = torch.optim.SGD(model.parameters())
    with profile:
        for _ in range(num_steps):
            model(torch.randn(4, 32)).sum().backward()
            optimizer.step()
            profile.step()


def test_three_lines_in_a_loop(tmp_path):
    profile = Profile(tmp_path, Window(1, 2, 3))
    loop(profile, 20)
    assert (tmp_path / "profile.html").exists()
    found = profile.result()
    assert len(found.steps) == 3
    for step in found.steps:
        assert {"forward", "backward", "optimizer"} <= {n for n, p in step.phases.items() if p.wall}
    assert load(json.loads(json.dumps(dataclasses.asdict(found)))).plain_s == found.plain_s


def test_a_rank_that_failed_is_named_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError), Profile(tmp_path, Window(1, 1, 1)):
        raise ValueError("planted")
    monkeypatch.setenv("RANK", "0")
    named = "rank 1 has no profile, because it ended with ValueError: planted"
    with pytest.raises(RankEnded, match=named):
        loop(Profile(tmp_path, Window(1, 1, 1)), 20)
    capsys.readouterr()
    with pytest.raises(RuntimeError), Profile(tmp_path, Window(1, 1, 1)):
        raise RuntimeError("Connection closed by peer")
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_end_when_one_raises(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = [
        start(
            *(tmp_path, "profile", "--out", "out", "train.py", "raise"),
            env=ENVIRONMENT | place | {"RANK": str(number)},
        )
        for number in (0, 1)
    ]
    errors = [process.communicate(timeout=100)[1] for process in started]
    assert all(process.returncode for process in started)
    assert "ValueError: planted" in errors[1]
    assert "rank 1 has no profile, because it ended with ValueError: planted" in errors[0]


def test_a_full_disk_when_the_trace_is_written(tmp_path, monkeypatch):
    def full(profiler, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    with pytest.raises(CannotWrite, match=r"rank0_trace.json.gz: No space left on device"):
        loop(Profile(tmp_path, Window(1, 1, 1)), 20)
    assert torch.save.__module__ == "torch.serialization"  # marks are gone


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_a_window_without_steps_is_refused(counts):
    with pytest.raises(EmptyWindow, match="each must be at least 1"):
        Window(*counts)


def test_a_loop_that_is_too_short_is_said(tmp_path, capsys):
    profile = Profile(tmp_path, Window(1, 2, 3))
    loop(profile, 5)
    assert "the loop ended after 5 steps, a profile needs 9" in capsys.readouterr().err
    with pytest.raises(TooFewSteps):
        profile.result()


def test_marking_leaves_nothing_behind():
    model = nn.Linear(2, 2)
    before = torch.autograd.backward, torch.save, logging.Logger.handle, builtins.print
    callbacks = list(gc.callbacks)
    with pytest.raises(KeyError), marked([model]):
        assert torch.save is not before[1]
        raise KeyError
    assert before == (torch.autograd.backward, torch.save, logging.Logger.handle, builtins.print)
    assert gc.callbacks == callbacks
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_outermost_modules_are_in_no_other():
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(inner, nn.GELU())
    found = outermost_modules()
    assert any(module is outer for module in found)
    assert not any(module is inner for module in found)


def step(seconds: float = 0.1, **walls: float) -> Step:
    """A step of forward but for what is given, with `exposed` for exposed communication."""
    given = {{"exposed": EXPOSED}.get(k, k.replace("_", " ")): v for k, v in walls.items()}
    phases = {name: Phase(given.get(name, 0.0), 0.0, 0.0, 0.0) for name in PHASES}
    phases["forward"] = Phase(seconds - sum(given.values()), 0.0, 0.0, 0.0)
    return Step(seconds, phases, {"glue": 0.02}, [], 0.0, 0.0, [])


def rank(number: int, *steps: Step, held=(0, 0, 0), **more) -> Profiled:
    made = Profiled(number, steps, 0.1, 0.11, held, (), None, {}, f"rank{number}_trace.json.gz", "")
    return dataclasses.replace(made, **more)


def test_the_straggler_is_the_one_that_does_not_wait():
    ranks = [rank(0, step(exposed=0.04)), rank(1, step()), rank(2, step(exposed=0.04))]
    first, *others = findings(ranks)
    assert first.name == "straggler"
    assert first.evidence.startswith("rank 1 needs 40 ms more")
    assert first.seconds == pytest.approx(0.04)
    # What the others waited for it is not counted again as the network's.
    assert EXPOSED not in [finding.name for finding in others]
    assert spreads(ranks)["forward"] == (pytest.approx(0.04), 1)
    assert mean_walls(ranks)[EXPOSED] == pytest.approx(0.08 / 3)


def test_communication_that_all_ranks_wait_for_is_the_networks():
    ranks = [rank(n, step(exposed=0.04)) for n in range(3)]
    assert [finding.name for finding in findings(ranks)] == [EXPOSED]


def test_costs_come_by_size_and_a_leak_before_all():
    found = findings([rank(0, step(checkpointing=0.01, data_wait=0.03, logging=0.0005))])
    assert [finding.name for finding in found] == ["data wait", "checkpointing"]
    assert "data wait: 30% of the step" in found[0].evidence
    growing = [index * 5 * MB for index in range(10)]
    assert findings([rank(0, step(data_wait=0.03), held=growing)])[0].name == "leak"


@pytest.mark.parametrize(
    "held",
    [[0, 9, 0, 9, 0, 9], [0, 9 * MB, 0, 9 * MB, 0], [MB] * 9, [0, 9 * MB, 18 * MB, 27 * MB]],
)
def test_memory_that_does_not_keep_growing_is_no_leak(held):
    assert not findings([rank(0, step(), held=held)])


def test_memory_of_graphs_that_are_compiled_in_every_step_is_no_leak():
    held = [index * 5 * MB for index in range(10)]
    compiles = [Compile("f at m.py:3", f"L['x'] == {n}", 0.01) for n in range(17)]
    found = findings([rank(0, step(compilation=0.05), held=held, compiles=compiles)])
    assert [finding.name for finding in found] == ["compilation"]
    assert "17 compilations, 17 of them of f at m.py:3, its guard failed: L['x'] == 16" in (
        found[0].evidence
    )


def test_the_report_says_what_would_remove_glue():
    declined = [
        Declined("qk_norm_rope", f"blocks.{n}", "mul", "m.py:3", ("mask is in place",), "detach it")
        for n in range(3)
    ]
    report = Report(
        "optimize", "bf16", "cpu", (Applied("rms_norm", "b", 1, "", "", ""),), tuple(declined)
    )
    (found,) = findings([rank(0, step())], report)
    assert found.evidence == (
        "glue: 20% of the step; rule qk_norm_rope declined at 3 blocks (blocks.0 to blocks.2): "
        "mask is in place"
    )
    assert found.remedy == "detach it"


def test_declined_blocks_are_ranked_by_their_own_glue():
    declined = [
        Declined(rule, f"blocks.{n}", "mul", "m.py:3", reasons)
        for rule, reasons in (("rope", ("mask",)), ("norm", ("write", "user")))
        for n in (0, 0, 1)
    ]
    report = Report("optimize", "bf16", "cpu", (), tuple(declined))
    glue = {"blocks.0": (0.004, 6), "blocks.1": (0.006, 8), "blocks.10": (0.05, 99)}
    made = dataclasses.replace(step(data_wait=0.008), glue=glue)
    first, second = findings([rank(0, made)], report)
    assert (first.name, second.name) == ("declined", "data wait")
    assert first.seconds == pytest.approx(0.01)
    assert first.evidence == (
        "glue in the forward of these blocks: 10% of the step, 7 kernels or ops per block; "
        "rules rope, norm declined at 2 blocks (blocks.0 to blocks.1): mask; write"
    )


def test_allocations_from_the_device_are_named():
    counts = {"num_device_alloc": 3.0, "num_device_free": 0.0}
    made = dataclasses.replace(step(), allocating=0.02)
    (found,) = findings([rank(0, made, allocator=counts)])
    assert (found.name, found.seconds) == ("allocator", 0.02)
    assert "20% of the step in cudaMalloc and cudaFree" in found.evidence
    assert found.evidence.endswith("without the profiler: num_device_alloc 3")


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA allocator that notes what it is asked."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": 1, "other": 2})
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled="all": asked.append(enabled)
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: asked.append(Path(path).name)
    )
    return asked


def test_a_snapshot_is_taken_on_cuda_and_the_recording_ends(cuda, tmp_path):
    with snapshot(tmp_path / "memory.pickle"):
        assert cuda == ["all"]
    assert cuda == ["all", "memory.pickle", None]
    with pytest.raises(KeyError), snapshot(tmp_path / "memory.pickle"):
        raise KeyError
    assert cuda[3:] == ["all", None]
    counts = dict.fromkeys(("num_device_alloc", "num_device_free", "num_alloc_retries"), 0)
    assert allocator_counts() == counts | {"num_ooms": 1}


class Model(nn.Module):
    """Two blocks, each with a part of its own, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_parts_are_blocks_and_what_stands_beside_them():
    names = ["first", "last", "blocks.0", "blocks.1"]
    model = Model()
    assert [name for name, _ in parts(model)] == names
    wrapped = nn.Module()
    wrapped.module = model
    assert [name for name, _ in parts(wrapped)] == names
    assert not list(parts(torch.compile(model)))
    model.compile()
    assert not list(parts(model))


def test_marks_do_not_bring_back_what_fxopt_has_replaced():
    import fxopt

    torch.manual_seed(0)
    scale = Scale(num_double=1, num_single=1, num_heads=2, batch=2)
    model = fxopt.optimize(build_model(scale, 0))
    batch = next(batches(scale, 0))
    flow_loss(model, batch)
    with marked([model]), torch.profiler.profile() as profiler:
        flow_loss(model, batch)
    names = {event.name for event in profiler.events()}
    assert "fxopt.in single_transformer_blocks.0" in names
    assert "fxopt::norm_modulate" in names
    assert not any("hooks" in reason for d in fxopt.report(model).declined for reason in d.reasons)
    assert report_on([model]) == fxopt.report(model)


def test_a_leak_is_null_seconds_in_json():
    ranks = [rank(0, step(), held=[index * 5 * MB for index in range(10)])]
    found = findings(ranks)
    assert math.isinf(found[0].seconds)
    data = json.loads(profile_page.to_json(ranks, found))
    assert data["findings"][0]["seconds"] is None
    assert data["overhead"]["0"] == pytest.approx(0.1)
