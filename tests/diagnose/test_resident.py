"""The most memory that the process held: since it was asked to forget, and of none but itself."""

from __future__ import annotations

import mmap
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import pytest

from fxopt.diagnose import resident
from fxopt.diagnose.devices import this_device
from fxopt.diagnose.protocol import WarmUp
from fxopt.diagnose.tables import details
from tests.diagnose.test_record import claim

MB = 1 << 20
# What the interpreter and malloc may take or give back meanwhile.
SLACK = 16 * MB


def hold(num_bytes: int) -> None:
    """For a moment; from the system, as an allocator may have held some that is free."""
    with mmap.mmap(-1, num_bytes) as memory:
        for page in range(0, num_bytes, mmap.PAGESIZE):
            memory[page] = 1


def test_what_was_before_is_forgotten() -> None:
    device = this_device("cpu")
    hold(256 * MB)
    assert device.forget_held() == ""
    begun = device.held_bytes()
    hold(64 * MB)
    assert abs(device.held_bytes() - begun - 64 * MB) < SLACK
    hold(32 * MB)
    assert abs(device.held_bytes() - begun - 64 * MB) < SLACK
    assert device.forget_held() == ""
    assert abs(device.held_bytes() - begun) < SLACK


def _grow(found: Any) -> None:
    device = this_device("cpu")
    device.forget_held()
    begun = device.held_bytes()
    hold(64 * MB)
    found.send(device.held_bytes() - begun)


def test_a_child_does_not_inherit_its_parents() -> None:
    hold(512 * MB)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_grow, args=(sender,))
    child.start()
    assert receiver.poll(60)
    assert abs(receiver.recv() - 64 * MB) < SLACK
    child.join()


def test_where_it_cannot_be_forgotten_the_claim_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "CLEAR", Path("/proc/self/no_such_file"))
    device = this_device("cpu")
    why = device.forget_held()
    assert "/proc/self/no_such_file cannot be written (No such file or directory)" in why
    assert device.held_bytes() > 0
    made = claim()
    made.samples.warmup = WarmUp("evidence", 9, 1.5, 0, why)
    assert any(why in line for line in details(made))


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "STATUS", Path("/no/such/file"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    monkeypatch.setattr("sys.platform", "linux")
    assert resident.largest() == 1024 * usage.ru_maxrss
    monkeypatch.setattr("sys.platform", "darwin")  # where it is in bytes
    assert resident.largest() == usage.ru_maxrss
