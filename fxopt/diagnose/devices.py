"""The machine under the measurement: how it keeps time, flushes, multiplies and what it tells."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.diagnose import resident
from fxopt.diagnose.errors import NoSuchDevice
from fxopt.diagnose.protocol import Step
from fxopt.diagnose.ranks import ALONE, Ranks

# Elements per side of the reference product: some milliseconds on a CPU core.
REFERENCE_SIDE = {"cpu": 320, "cuda": 4096}
REFERENCE_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Where the size of the last cache is not known, as on CPUs: larger than that of most.
CPU_CACHE = 64 << 20  # bytes
# Of the GPU, for which it waits ahead of a call, so that the host is done when the clock starts:
# first and most. A step that waits for the GPU itself is never done before.
HEAD_START, LONGEST_HEAD_START = 1 << 17, 1 << 24  # cycles


class TorchDevice:
    """A device of this process as the protocol needs it.

    Times of steps are wall time between two synchronizations of the whole device, which catches
    side streams; with `flush`, on a GPU, they are those of events, and the GPU is kept waiting
    until the host has launched the step, which leaves the host's time out.

    Args:
        device: "cpu" or a CUDA device.
        ranks: with whom to decide.
    """

    def __init__(self, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.device, self.ranks = device, ranks
        side, dtype = REFERENCE_SIDE[device.type], REFERENCE_DTYPE[device.type]
        generator = torch.Generator(device).manual_seed(0)
        self._operands = torch.randn(2, side, side, generator=generator, device=device).to(dtype)
        self._cache: Tensor | None = None
        self._head_start = HEAD_START

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, step: Step, num_calls: int, flush: bool) -> float:
        if flush:
            return sum(self._cold_seconds(step) for _ in range(num_calls)) / num_calls
        self.synchronize()
        start = time.perf_counter()
        for _ in range(num_calls):
            step()
        self.synchronize()
        return (time.perf_counter() - start) / num_calls

    def _cold_seconds(self, step: Step) -> float:
        if self.device.type != "cuda":
            self._flush()
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        while True:
            self._flush()
            torch.cuda._sleep(self._head_start)
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            step()
            end_event.record()
            is_ahead = not start_event.query()
            self.synchronize()
            if is_ahead or self._head_start >= LONGEST_HEAD_START:
                return 1e-3 * start_event.elapsed_time(end_event)
            self._head_start *= 2

    def _flush(self) -> None:
        """Write more than the last cache holds."""
        if self._cache is None:
            num_bytes = 2 * self.cache_bytes()
            self._cache = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self._cache.zero_()

    def cache_bytes(self) -> int:
        """Size of the last cache; a guess on CPUs."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).L2_cache_size
        return CPU_CACHE

    def reference(self) -> float:
        a, b = self._operands
        return self.seconds(lambda: a @ b, 1, False)

    def readings(self) -> dict[str, float]:
        """SM clock (MHz), power (W) and temperature (C), where the driver tells; no root needed."""
        if self.device.type != "cuda":
            return {}
        sources: dict[str, Callable[[torch.device], float]] = {
            "clock_mhz": torch.cuda.clock_rate,
            "power_w": lambda device: torch.cuda.power_draw(device) / 1000,
            "temperature_c": torch.cuda.temperature,
        }
        found = {}
        for name, read in sources.items():
            # Each needs NVML, its Python package and a driver that supports the query.
            with contextlib.suppress(Exception):
                found[name] = float(read(self.device))
        return found

    def num_recompiles(self) -> int:
        if "torch._dynamo.utils" not in sys.modules:
            return 0
        return sys.modules["torch._dynamo.utils"].counters["stats"]["unique_graphs"]

    def held_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return resident.largest()

    def forget_held(self) -> str:
        return "" if self.device.type == "cuda" else resident.forget()

    def agree(self, values: list[float]) -> list[float]:
        return self.ranks.agree(values)


def this_device(name: str | None = None, ranks: Ranks = ALONE) -> TorchDevice:
    """`name`, or the CUDA device of this process, or else the CPU; a CUDA device becomes the
    current one, on which events are recorded.

    Raises:
        NoSuchDevice: if there is none of this name, or none that can be measured.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in (None, "cuda" if len(known) > 1 else "cpu", *known):
        raise NoSuchDevice(str(name), ", ".join(known))
    device = torch.device(name or default)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return TorchDevice(device, ranks)
