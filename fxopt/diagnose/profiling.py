"""Profiles some steps of a training loop: three lines in it, or none with `fxopt profile`.

    with Profile("out") as profile:
        for batch in loader:
            ...
            profile.step()

First some steps run without the profiler, so that its own cost can be stated. Then the profiler
runs, phases marked. In one more step it records every allocation, which would cost too much in the
others. The traces are analysed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.diagnose.compiles import Compile, compiles
from fxopt.diagnose.errors import CannotWrite, EmptyWindow, TooFewSteps
from fxopt.diagnose.holding import Peak, peak
from fxopt.diagnose.marking import marked, outermost_modules
from fxopt.diagnose.phases import Step, steps
from fxopt.diagnose.trace import read
from fxopt.errors import FxoptError, NotReported
from fxopt.report import Report


@dataclass(frozen=True)
class Window:
    """Which steps are looked at.

    Args:
        num_skipped: first steps, which compile and allocate.
        num_plain: timed without the profiler.
        num_profiled: traced; behind them allocations are recorded in one more.

    Raises:
        EmptyWindow: if one of them is below 1.
    """

    num_skipped: int = 3
    num_plain: int = 8
    num_profiled: int = 8

    def __post_init__(self) -> None:
        if min(self.num_skipped, self.num_plain, self.num_profiled) < 1:
            raise EmptyWindow(self.num_skipped, self.num_plain, self.num_profiled)

    @property
    def num_steps(self) -> int:
        """Of the loop, all in all; one warms the profiler up each time that it starts."""
        return self.num_skipped + self.num_plain + 1 + self.num_profiled + 1 + 1


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
        compiles: in the plain and profiled steps.
        peak: of memory, in the step behind them.
        allocator: what the CUDA allocator did in the plain steps, by name, per step.
        trace: path of the trace.
        snapshot: path of the CUDA allocator's snapshot, for pytorch.org/memory_viz; "" on a CPU.
    """

    rank: int
    steps: Sequence[Step]
    plain_s: float
    profiled_s: float
    held_bytes: Sequence[int]
    compiles: Sequence[Compile]
    peak: Peak | None
    allocator: Mapping[str, float]
    trace: str
    snapshot: str


class Profile:
    """Context manager around a training loop; `step()` ends a step of it.

    Args:
        out: folder of what it writes.
        window: which steps are looked at.
        report: fxopt's report on the model, if it is not to be found by itself; its reasons
            appear among the costs.
    """

    def __init__(
        self, out: Path | str, window: Window | None = None, report: Report | None = None
    ) -> None:
        self.window, self.out, self.report = window or Window(), Path(out), report
        self.rank = int(os.environ.get("RANK", "0"))
        self.path = self.out / f"rank{self.rank}_trace.json.gz"
        self.memory_path = self.out / f"rank{self.rank}_memory.json.gz"
        self.snapshot_path = self.out / f"rank{self.rank}_memory.pickle"
        self.num_done = 0
        self.ends: list[float] = []
        self.held: list[int] = []
        self.allocator: list[Mapping[str, int]] = []
        self.compiles: list[Compile] = []
        self.num_compiled: list[int] = []
        self._undo = contextlib.ExitStack()
        self._tracing = contextlib.ExitStack()
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> Profile:
        from fxopt.diagnose.profile_results import path_of

        try:
            self.out.mkdir(parents=True, exist_ok=True)
            # Rank 0 must not take an earlier run's file for this one's.
            path_of(self.rank, self.out).unlink(missing_ok=True)
        except OSError as error:
            raise CannotWrite(str(self.out), error.strerror or str(error)) from error
        self.compiles = self._undo.enter_context(compiles())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """Write and print the profile; only say so if the loop failed or was too short for one."""
        from fxopt.diagnose.profile_results import fail, leave

        self._finish()
        if error is not None and not isinstance(error, SystemExit):
            fail(self.rank, f"{kind.__name__}: {error}", self.out)
            return
        try:
            leave(self.result(), self.out, self.report)
        except FxoptError as mistake:
            fail(self.rank, str(mistake), self.out)
            if not isinstance(mistake, TooFewSteps):
                raise
            print(f"fxopt profile: {mistake}", file=sys.stderr)

    def step(self) -> None:
        """The end of a step.

        Raises:
            CannotWrite: if there is no room for a trace.
        """
        window = self.window
        self.num_done += 1
        if self.num_done > window.num_steps:
            return
        synchronize()
        self.ends.append(time.perf_counter())
        self.held.append(held_bytes())
        self.allocator.append(allocator_counts())
        self.num_compiled.append(len(self.compiles))
        last_timed = window.num_steps - 2
        if self._profiler is not None:
            if self.num_done == last_timed:
                self._profiler.add_metadata_json("fxopt profile", json.dumps(self._seconds()))
            self._profiler.step()
        if self.num_done == window.num_skipped + window.num_plain:
            self._trace(self.path, window.num_profiled)
        elif self.num_done == last_timed:
            self._trace(self.memory_path, 1, with_memory=True)
        elif self.num_done == window.num_steps:
            self._finish()

    @property
    def is_complete(self) -> bool:
        """Whether all steps of the window have run."""
        return self.num_done >= self.window.num_steps

    def _trace(self, path: Path, num_steps: int, with_memory: bool = False) -> None:
        """Record the next steps but one, with phases marked, and leave their trace at `path`.

        The step between must stay: what a profiler has seen begin (the optimizer's step, inside of
        which this may run) must not end under another one, which would write to freed memory.
        """

        def export(profiler: torch.profiler.profile) -> None:
            try:
                profiler.export_chrome_trace(str(path))
            except OSError as error:
                raise CannotWrite(str(path), error.strerror or str(error)) from error

        self._tracing.close()
        # Kineto otherwise writes to standard error for every profile.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        models = outermost_modules()
        self.report = self.report or report_on(models)
        self._tracing.enter_context(marked(models))
        if with_memory:
            self._tracing.enter_context(snapshot(self.snapshot_path))
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=export,
            record_shapes=not with_memory,
            profile_memory=with_memory,
            acc_events=True,  # the alternative warns, for what only summaries read
        )
        self._tracing.enter_context(self._profiler)

    def _finish(self) -> None:
        self._tracing.close()
        self._undo.close()
        self._profiler = None

    def _seconds(self) -> dict[str, float]:
        """Median seconds of a step without and with the profiler."""
        window = self.window
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        first = window.num_skipped - 1
        profiled = first + window.num_plain + 1
        return {
            "plain_s": statistics.median(seconds[first : first + window.num_plain]),
            "profiled_s": statistics.median(seconds[profiled : profiled + window.num_profiled]),
        }

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
        first, last = window.num_skipped - 1, window.num_skipped - 1 + window.num_plain
        before, after = self.allocator[first], self.allocator[last]
        return Profiled(
            rank=self.rank,
            steps=steps(read(self.path)),
            held_bytes=self.held[first : last + 1],
            compiles=self.compiles[self.num_compiled[first] : self.num_compiled[-3]],
            peak=peak(read(self.memory_path)),
            allocator={name: (after[name] - before[name]) / window.num_plain for name in after},
            trace=str(self.path),
            snapshot=str(self.snapshot_path) if self.snapshot_path.exists() else "",
            **self._seconds(),
        )


def report_on(models: Sequence[nn.Module]) -> Report | None:
    """fxopt's report on the first model that went through a door, wrapped or not."""
    if "fxopt.backends.state" not in sys.modules:
        return None
    from fxopt.backends import state

    for model in models:
        for candidate in (model, *model.children()):
            with contextlib.suppress(NotReported):
                return state.report(candidate)
    return None


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


# What costs time, of the CUDA allocator's statistics: it asks the device for memory, gives it back,
# or had to give it back to go on.
COUNTED = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_ooms")


def allocator_counts() -> dict[str, int]:
    """How often the CUDA allocator has done what costs time; empty where there is no CUDA."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    counts = torch.cuda.memory_stats()
    return {name: counts.get(name, 0) for name in COUNTED}


@contextlib.contextmanager
def snapshot(path: Path) -> Iterator[None]:
    """Inside, the CUDA allocator notes every event; then its snapshot is at `path`."""
    path.unlink(missing_ok=True)
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        yield
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
