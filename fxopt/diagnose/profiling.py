"""Profiles some steps of a training loop: three lines in it, or none with `fxopt profile`.

    with Profile("out") as profile:
        for batch in loader:
            ...
            profile.step()

First some steps run without the profiler, so that its own cost can be stated. Then the profiler
runs, phases marked, and its trace is analysed at the end.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.diagnose.errors import TooFewSteps
from fxopt.diagnose.marking import marked, outermost_modules
from fxopt.diagnose.phases import Step, steps
from fxopt.diagnose.trace import read
from fxopt.report import Report


@dataclass(frozen=True)
class Window:
    """Which steps are looked at.

    Args:
        num_skipped: first steps, which compile and allocate.
        num_plain: timed without the profiler.
        num_profiled: traced; one more before them warms the profiler up.
    """

    num_skipped: int = 3
    num_plain: int = 8
    num_profiled: int = 8

    @property
    def num_steps(self) -> int:
        """Of the loop, all in all."""
        return self.num_skipped + self.num_plain + 1 + self.num_profiled


@dataclass(frozen=True)
class Profiled:
    """What one rank showed.

    Args:
        rank: of the process.
        steps: analysed, one per profiled step.
        plain_s: median seconds of a step without the profiler.
        profiled_s: median seconds with it; the difference is the profiler's own cost.
        held_bytes: by the allocator (on a CPU: by the process) after each plain step, in order; the
            profiler's own buffers grow in the others.
        num_compiled: graphs compiled in the plain and profiled steps.
        trace: path of the trace.
    """

    rank: int
    steps: Sequence[Step]
    plain_s: float
    profiled_s: float
    held_bytes: Sequence[int]
    num_compiled: int
    trace: str


class Profile:
    """Context manager around a training loop; `step()` ends a step of it.

    Args:
        out: folder of what it writes.
        window: which steps are looked at.
        report: fxopt's report on the model; its reasons then appear among the costs.
    """

    def __init__(
        self, out: Path | str, window: Window | None = None, report: Report | None = None
    ) -> None:
        self.window, self.out, self.report = window or Window(), Path(out), report
        self.rank = int(os.environ.get("RANK", "0"))
        self.path = self.out / f"rank{self.rank}_trace.json.gz"
        self.num_done = 0
        self.ends: list[float] = []
        self.held: list[int] = []
        self.compiled: list[int] = []
        self._undo = contextlib.ExitStack()
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> Profile:
        from fxopt.diagnose.profile_results import path_of

        self.out.mkdir(parents=True, exist_ok=True)
        # Rank 0 must not take an earlier run's file for this one's.
        path_of(self.rank, self.out).unlink(missing_ok=True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Write and print the profile; only say so if the loop was too short for one."""
        from fxopt.diagnose.profile_results import leave

        self._finish()
        if kind is not None:
            return
        try:
            leave(self.result(), self.out, self.report)
        except TooFewSteps as error:
            print(f"fxopt profile: {error}", file=sys.stderr)

    def step(self) -> None:
        """The end of a step."""
        self.num_done += 1
        if self.num_done > self.window.num_steps:
            self._finish()
            return
        synchronize()
        self.ends.append(time.perf_counter())
        self.held.append(held_bytes())
        self.compiled.append(num_compiled())
        if self._profiler is not None:
            self._profiler.step()
        elif self.num_done == self.window.num_skipped + self.window.num_plain:
            self._start()

    @property
    def is_complete(self) -> bool:
        """Whether all steps of the window have run."""
        return self.num_done >= self.window.num_steps

    def _start(self) -> None:
        def export(profiler: torch.profiler.profile) -> None:
            profiler.export_chrome_trace(str(self.path))

        # Kineto otherwise writes to standard error for every profile.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._undo.enter_context(marked(outermost_modules()))
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=0, warmup=1, active=self.window.num_profiled, repeat=1
            ),
            on_trace_ready=export,
            record_shapes=True,
        )
        self._undo.enter_context(self._profiler)

    def _finish(self) -> None:
        self._undo.close()
        self._profiler = None

    def result(self) -> Profiled:
        """What the steps showed, once the loop has ended.

        Raises:
            TooFewSteps: if the loop ended before the last profiled step.
            InvalidTrace: if the trace cannot be read.
        """
        self._finish()
        window = self.window
        if len(self.ends) < window.num_steps:
            raise TooFewSteps(len(self.ends), window.num_steps)
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        first = window.num_skipped - 1
        plain = seconds[first : first + window.num_plain]
        return Profiled(
            self.rank,
            steps(read(self.path)),
            statistics.median(plain),
            statistics.median(seconds[-window.num_profiled :]),
            self.held[first : first + window.num_plain + 1],
            self.compiled[-1] - self.compiled[first],
            str(self.path),
        )


def synchronize() -> None:
    """Wait for the device, so that a step's time holds its kernels."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def held_bytes() -> int:
    """What the CUDA allocator has given out, or else what the process holds in memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def num_compiled() -> int:
    """Graphs that Dynamo has compiled in this process."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    return sys.modules["torch._dynamo.utils"].counters["stats"]["unique_graphs"]
