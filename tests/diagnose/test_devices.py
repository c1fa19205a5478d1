"""How a GPU is timed, with a GPU that stands in: its clock and its queue are simulated."""

from __future__ import annotations

import pytest
import torch

from fxopt.diagnose import devices
from fxopt.diagnose.devices import HEAD_START, LONGEST_HEAD_START, TorchDevice, this_device

HERTZ = 1e9


class Gpu:
    """A queue that the host fills and one clock for both, in seconds."""

    def __init__(self) -> None:
        self.host = self.idle_from = 0.0
        self.calls: list[str] = []

    def run(self, seconds: float) -> None:
        self.idle_from = max(self.idle_from, self.host) + seconds

    def sleep(self, cycles: int) -> None:
        self.calls.append("sleep")
        self.run(cycles / HERTZ)

    def synchronize(self, *_: object) -> None:
        self.host = max(self.host, self.idle_from)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.idle_from, self.gpu.host)

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    return gpu


@pytest.fixture
def device(gpu, monkeypatch):
    device = TorchDevice(torch.device("cpu"))
    device.device = torch.device("cuda", 0)
    monkeypatch.setattr(device, "_flush", lambda: gpu.calls.append("flush"))
    return device


@pytest.mark.parametrize("launching", [1e-6, 2e-3])
def test_what_the_host_takes_to_launch_is_not_timed(gpu, device, launching):
    def step():
        gpu.host += launching / 2
        gpu.run(10e-6)
        gpu.host += launching / 2
        gpu.run(20e-6)

    # Differences of a clock of some milliseconds.
    assert device.seconds(step, 3, flush=True) == pytest.approx(30e-6, rel=1e-6)
    assert gpu.calls[:2] == ["flush", "sleep"]  # the flush belongs to no step


def test_a_step_that_waits_for_the_gpu_ends_the_search(gpu, device):
    def step():
        gpu.run(10e-6)
        gpu.synchronize()

    assert device.seconds(step, 1, flush=True) > 0
    doublings = LONGEST_HEAD_START // HEAD_START
    assert gpu.calls.count("sleep") == doublings.bit_length()


def test_the_device_that_is_measured_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(devices, "TorchDevice", lambda device, ranks: device)
    assert this_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
