"""Where the time of a step went: phases that add up to it, gaps, overlap, kernels by kind.

Every instant of a step belongs to exactly one phase. While the device computes, to the one that
launched the kernel; while it only communicates, to exposed communication; while it is idle, to the
one that the host was in, innermost annotation first; else to "unaccounted".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fxopt.diagnose import intervals
from fxopt.diagnose.intervals import EMPTY, Intervals
from fxopt.diagnose.kinds import COMMUNICATION, GLUE, kind
from fxopt.diagnose.trace import COMPILING, MODULE, STEP, Columns, Trace
from fxopt.diagnose.work import by_kind, self_time, top

# Annotations of these names, behind PREFIX, mark the phases.
PREFIX = "fxopt."
PHASES = (
    *("data wait", "encoders", "host-to-device", "forward", "backward", "exposed communication"),
    *("optimizer", "checkpointing", "garbage collection", "logging", "compilation", "unaccounted"),
)
EXPOSED, UNACCOUNTED, COMPILATION = "exposed communication", "unaccounted", "compilation"
# Copies of this name count as their own phase, where no kernel hides them.
COPYING, TO_DEVICE = "host-to-device", "Memcpy HtoD"
# What PyTorch marks by itself.
MARKED = {"Optimizer.": "optimizer", "enumerate(DataLoader)#": "data wait"}


@dataclass(frozen=True)
class Phase:
    """One phase of one step, in seconds.

    Args:
        wall: part of the step that belongs to it.
        host: time the main thread spent in it.
        device: time in which kernels that it launched ran.
        idle: time the main thread spent in it while the device did nothing; 0 without a device.
        kinds: seconds of the kernels that it launched, by kind; without a device of host ops
            that began in it, without what they call.
    """

    wall: float
    host: float
    device: float
    idle: float
    kinds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Args:
        seconds: that it took.
        phases: by name; their `wall` adds up to `seconds`.
        kinds: seconds of kernels (without a device: of host ops, without what they call) by kind.
        top: the longest by name, seconds and calls.
        communication: seconds in which any communication ran.
        overlapped: part of it in which compute ran too.
        gaps: seconds of each stretch of the step in which the device was idle, longest first.
        allocating: seconds of the host in cudaMalloc and cudaFree, which wait for the device.
        timeline: (phase, part of the step) in order; each of `NUM_BINS` equal parts of the step
            counts as the phase that has most of it.
        glue: seconds and number of glue kernels (without a device: ops) that the forward of each
            marked module launched.
    """

    seconds: float
    phases: Mapping[str, Phase]
    kinds: Mapping[str, float]
    top: Sequence[tuple[str, float, int]]
    communication: float
    overlapped: float
    gaps: Sequence[float]
    allocating: float = 0.0
    timeline: Sequence[tuple[str, float]] = ()
    glue: Mapping[str, tuple[float, int]] = field(default_factory=dict)


NUM_GAPS = 10
NUM_BINS = 400
ALLOCATING = ("cudaMalloc", "cudaFree", "cuMem")
# While the main thread is in these, it does not wait for a collective.
OCCUPIED = ("data wait", "checkpointing", "garbage collection", "logging", COMPILATION)


def steps(trace: Trace) -> list[Step]:
    """Every marked step, in order."""
    return [analyse(trace, start, end) for start, end in step_spans(trace)]


def step_spans(trace: Trace) -> list[tuple[int, int]]:
    """Start and end of every marked step, in order."""
    marked = trace.annotations.where(_starting(trace.annotations, trace.names, STEP))
    return [(int(start), int(end)) for start, end in sorted(marked.spans.tolist())]


def analyse(trace: Trace, start: int, end: int) -> Step:
    """One stretch of a trace, in nanoseconds."""
    window = np.array([[start, end]])
    hosts = host_phases(trace, window)
    device = _within(trace.kernels, start, end)
    is_communication = _of_kind(device, trace.names, COMMUNICATION)
    is_copy = _starting(device, trace.names, TO_DEVICE)

    def covered(mask: np.ndarray) -> Intervals:
        return intervals.intersection(intervals.union(device.spans[mask]), window)

    moments = _launch_moments(device, trace.launches)
    owners = _owners(moments, hosts)
    is_compute = ~is_communication & ~is_copy
    launched = {name: covered(is_compute & (owners == i)) for i, name in enumerate(hosts)}
    launched[COPYING] = covered(is_copy)
    has_device = len(trace.kernels) > 0
    communicating = (
        covered(is_communication) if has_device else _host_communication(trace, window, hosts)
    )
    busy = intervals.joined([*launched.values(), communicating]) if has_device else window
    walls = partition(window, [*launched.items(), (EXPOSED, communicating), *hosts.items()])
    phases = {
        name: Phase(
            intervals.seconds(walls.get(name, EMPTY)),
            intervals.seconds(hosts.get(name, EMPTY)),
            intervals.seconds(launched.get(name, EMPTY)),
            intervals.seconds(intervals.difference(hosts.get(name, EMPTY), busy)),
        )
        for name in PHASES
    }
    # Without a device, its work is the host's.
    work, seconds = device, 1e-9 * (device.spans[:, 1] - device.spans[:, 0])
    if not has_device:
        work = _within(trace.host_ops, start, end)
        seconds, moments = 1e-9 * self_time(work), work.spans[:, 0]
        owners = _owners(moments, hosts)
    for index, name in enumerate(hosts):
        own = owners == index
        done = by_kind(work.where(own), seconds[own], trace.names)
        if name == COMPILATION and done:  # a compiler's own events say nothing of the step's work
            done = {COMPILATION: sum(done.values())}
        phases[name] = replace(phases[name], kinds=done)
    kinds: Counter[str] = Counter()
    for phase in phases.values():
        kinds.update(phase.kinds)
    idle = intervals.difference(window, busy)
    return Step(
        1e-9 * (end - start),
        phases,
        dict(kinds.most_common()),
        top(work, seconds, trace.names),
        intervals.seconds(communicating),
        intervals.seconds(intervals.intersection(communicating, covered(is_compute))),
        sorted((1e-9 * float(b - a) for a, b in idle), reverse=True)[:NUM_GAPS],
        intervals.seconds(intervals.intersection(_allocating(trace), window)),
        timeline(walls, start, end),
        _glue(trace, work, seconds, moments),
    )


def _glue(
    trace: Trace, work: Columns, seconds: np.ndarray, moments: np.ndarray
) -> dict[str, tuple[float, int]]:
    """Seconds and number of glue events by the marked module whose forward launched them."""
    is_glue, notes = _of_kind(work, trace.names, GLUE), trace.annotations
    found = {}
    for number in np.unique(notes.names):
        if trace.names[number].startswith(MODULE):
            spans = intervals.union(notes.spans[notes.names == number])
            own = is_glue & intervals.contains(spans, moments)
            name = trace.names[number].removeprefix(MODULE)
            found[name] = (float(seconds[own].sum()), int(own.sum()))
    return found


def _allocating(trace: Trace) -> Intervals:
    return intervals.union(
        trace.launches.where(_starting(trace.launches, trace.names, *ALLOCATING)).spans
    )


def timeline(walls: Mapping[str, Intervals], start: int, end: int) -> list[tuple[str, float]]:
    """Phases in order with their parts of [start, end], as far as `NUM_BINS` equal parts show."""
    edges = np.linspace(start, end, NUM_BINS + 1)
    names = list(walls)
    most = np.argmax([intervals.lengths_within(walls[name], edges) for name in names], axis=0)
    first = np.flatnonzero(np.r_[True, np.diff(most) != 0])
    parts = np.diff(np.r_[first, NUM_BINS]) / NUM_BINS
    return [(names[most[at]], float(part)) for at, part in zip(first, parts, strict=True)]


def partition(window: Intervals, claims: Sequence[tuple[str, Intervals]]) -> dict[str, Intervals]:
    """The window by name: each claim gets what those before it have left."""
    left, found = window, dict[str, Intervals]()
    for name, claim in claims:
        taken = intervals.intersection(left, claim)
        found[name] = intervals.joined([found.get(name, EMPTY), taken])
        left = intervals.difference(left, claim)
    return found


def host_phases(trace: Trace, window: Intervals) -> dict[str, Intervals]:
    """Instants of the main thread by phase, innermost annotation first; the rest unaccounted."""
    notes = trace.annotations
    notes = notes.where(notes.places == trace.main)
    named = [
        (phase_of(trace.names[name]), span)
        for name, span in zip(notes.names, notes.spans, strict=True)
    ]
    found: dict[str, list[Intervals]] = {}
    left = window
    inner_first = sorted((s[1] - s[0], i) for i, (phase, s) in enumerate(named) if phase)
    for _, index in inner_first:
        phase, span = named[index]
        own = span[None, :]
        if span[1] <= window[0, 0] or span[0] >= window[0, 1]:
            continue
        assert phase is not None
        found.setdefault(phase, []).append(intervals.intersection(left, own))
        left = intervals.difference(left, own)
    phases = {name: intervals.joined(found[name]) for name in PHASES if name in found}
    return phases | {UNACCOUNTED: left}


def phase_of(annotation: str) -> str | None:
    """The phase that an annotation marks, if any."""
    if annotation.endswith(COMPILING):
        return COMPILATION
    for start, phase in MARKED.items():
        if annotation.startswith(start):
            return phase
    name = annotation.removeprefix(PREFIX)
    return name if name != annotation and name in PHASES else None


def _within(columns: Columns, start: int, end: int) -> Columns:
    return columns.where((columns.spans[:, 1] > start) & (columns.spans[:, 0] < end))


def _starting(columns: Columns, names: Sequence[str], *starts: str) -> np.ndarray:
    numbers = [number for number, name in enumerate(names) if name.startswith(starts)]
    return np.isin(columns.names, numbers)


def _of_kind(columns: Columns, names: Sequence[str], wanted: str) -> np.ndarray:
    numbers = [n for n in np.unique(columns.names) if kind(names[n]) == wanted]
    return np.isin(columns.names, numbers)


def _host_communication(
    trace: Trace, window: Intervals, hosts: Mapping[str, Intervals]
) -> Intervals:
    """Where a collective runs on any thread while the main one computes nothing and could.

    The main thread shows no op while it waits for a collective.
    """
    ops, notes = trace.host_ops, trace.annotations
    is_communication = _of_kind(ops, trace.names, COMMUNICATION)
    anywhere = [
        ops.where(is_communication).spans,
        notes.where(_of_kind(notes, trace.names, COMMUNICATION)).spans,
    ]
    working = ops.where(~is_communication & (ops.places == trace.main)).spans
    occupied = [hosts[name] for name in OCCUPIED if name in hosts]
    waiting = intervals.difference(
        intervals.joined(anywhere), intervals.joined([working, *occupied])
    )
    return intervals.intersection(waiting, window)


def _launch_moments(kernels: Columns, launches: Columns) -> np.ndarray:
    """When the host launched each kernel; where that is not in the trace, when it starts."""
    order = np.argsort(launches.links)
    links, times = launches.links[order], launches.spans[order, 0]
    moments = kernels.spans[:, 0].copy()
    if len(links):
        at = np.minimum(np.searchsorted(links, kernels.links), len(links) - 1)
        known = (links[at] == kernels.links) & (kernels.links != 0)
        moments[known] = times[at[known]]
    return moments


def _owners(moments: np.ndarray, hosts: Mapping[str, Intervals]) -> np.ndarray:
    """For each moment the number of the phase that the host was in."""
    owners = np.full(len(moments), list(hosts).index(UNACCOUNTED))
    for index, own in enumerate(hosts.values()):
        owners[intervals.contains(own, moments)] = index
    return owners
