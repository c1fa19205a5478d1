"""What held the memory at its peak: by hand, and in a real step."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fxopt.diagnose.holding import Peak, peak
from fxopt.diagnose.profiling import Profile, Window
from fxopt.diagnose.trace import read
from tests.diagnose.traces import AUTOGRAD, Written


def found(written: Written, folder: Path) -> Peak | None:
    return peak(read(written.to(folder / "memory.json")))


def step() -> Written:
    """Forward of two blocks, backward on a thread of its own."""
    return (
        Written()
        .step(0, 100)
        .phase("forward", 0, 50)
        .phase("backward", 50, 100)
        .add("user_annotation", "fxopt.in blocks.0", 0, 20)
        .add("user_annotation", "fxopt.in blocks.1", 20, 40)
        .add("user_annotation", "fxopt.in blocks.1.ff", 25, 30)
        .op("autograd::engine::evaluate_function: MmBackward0", 60, 80, place=AUTOGRAD)
        .op("aten::mm", 65, 75, place=AUTOGRAD)
        .op("aten::mse_loss", 42, 44)
    )


def test_what_is_alive_at_the_peak_by_phase_and_module(tmp_path):
    written = step()
    written.memory(5, 100, 1).memory(22, 200, 2).memory(26, 400, 3).memory(28, -400, 3)
    written.memory(43, 10, 4).memory(70, 1000, 5, place=AUTOGRAD).memory(72, -100, 1)
    written.memory(90, 50, 3)
    assert found(written, tmp_path) == Peak(
        num_bytes=1310,
        at=0.7,
        phase="backward",
        reserved=0,
        owners=[
            ("backward", "MmBackward0", 1000),
            ("forward", "blocks.*", 300),
            ("forward", "aten::mse_loss", 10),
        ],
        num_allocations=6,
    )


def test_an_address_that_is_used_again_is_the_later_ones(tmp_path):
    written = step().memory(5, 100, 1).memory(7, -100, 1).memory(26, 300, 1)
    assert found(written, tmp_path).owners == [("forward", "blocks.*.ff", 300)]


def test_on_a_gpu_its_own_memory_counts(tmp_path):
    written = step().memory(5, 10_000, 1).memory(22, 200, 2, device=1).memory(24, -200, 2, device=1)
    result = found(written, tmp_path)
    assert (result.num_bytes, result.reserved) == (200, 4096)


def test_memory_that_was_there_before_and_is_given_back_makes_room(tmp_path):
    written = step().memory(5, -500, 9).memory(22, 200, 2)
    assert found(written, tmp_path).num_bytes == 0


def test_other_steps_do_not_count(tmp_path):
    assert found(step().memory(150, 200, 2), tmp_path) is None


def test_a_real_step(tmp_path):
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    x = torch.randn(1000, 64)
    profile = Profile(tmp_path, Window(1, 1, 1))
    with profile:
        while not profile.is_complete:
            model.zero_grad()
            model(x).square().mean().backward()
            profile.step()
    result = profile.result().peak
    hidden = 4 * 1000 * 512
    # Both sides of the GELU, kept for backward, and at least the gradient of one of them.
    assert result.num_bytes >= 3 * hidden
    assert result.phase == "backward"
    held = {(phase, name): size for phase, name, size in result.owners}
    # Modules 0 and 1 are both "*".
    assert held["forward", "*"] == pytest.approx(2 * hidden, rel=0.01)
