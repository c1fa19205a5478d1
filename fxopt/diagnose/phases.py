"""Where the time of a step went: phases that add up to it, gaps, overlap, kernels by kind.

Every instant of a step belongs to exactly one phase. While the device computes, to the one that
launched the kernel; while it only communicates, to exposed communication; while it is idle, to the
one that the host was in, innermost annotation first; else to "unaccounted".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxopt.diagnose import intervals
from fxopt.diagnose.intervals import EMPTY, Intervals
from fxopt.diagnose.kinds import COMMUNICATION, kind
from fxopt.diagnose.trace import COMPILING, STEP, Columns, Trace

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
    """

    wall: float
    host: float
    device: float
    idle: float


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
    """

    seconds: float
    phases: Mapping[str, Phase]
    kinds: Mapping[str, float]
    top: Sequence[tuple[str, float, int]]
    communication: float
    overlapped: float
    gaps: Sequence[float]


NUM_TOP = 10
# While the main thread is in these, it does not wait for a collective.
OCCUPIED = ("data wait", "checkpointing", "garbage collection", "logging", COMPILATION)


def steps(trace: Trace) -> list[Step]:
    """Every marked step, in order."""
    numbers = [i for i, name in enumerate(trace.names) if name.startswith(STEP)]
    marked = trace.annotations.where(np.isin(trace.annotations.names, numbers))
    spans = marked.spans[np.argsort(marked.spans[:, 0])]
    return [analyse(trace, int(start), int(end)) for start, end in spans]


def analyse(trace: Trace, start: int, end: int) -> Step:
    """One stretch of a trace, in nanoseconds."""
    window = np.array([[start, end]])
    hosts = host_phases(trace, window)
    device = _within(trace.kernels, start, end)
    is_communication = _of_kind(device, trace.names, COMMUNICATION)
    is_copy = np.isin(
        device.names, [i for i, name in enumerate(trace.names) if name.startswith(TO_DEVICE)]
    )

    def covered(mask: np.ndarray) -> Intervals:
        return intervals.intersection(intervals.union(device.spans[mask]), window)

    owners = _owners(device, trace.launches, hosts)
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
    spent, calls = _spent(trace, device, start, end)
    kinds: Counter[str] = Counter()
    for name, seconds in spent.items():
        kinds[kind(name)] += seconds
    idle = intervals.difference(window, busy)
    return Step(
        1e-9 * (end - start),
        phases,
        dict(kinds.most_common()),
        [(name, seconds, calls[name]) for name, seconds in spent.most_common(NUM_TOP)],
        intervals.seconds(communicating),
        intervals.seconds(intervals.intersection(communicating, covered(is_compute))),
        sorted((1e-9 * float(b - a) for a, b in idle), reverse=True)[:NUM_TOP],
    )


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


def _owners(kernels: Columns, launches: Columns, hosts: Mapping[str, Intervals]) -> np.ndarray:
    """For each kernel the number of the phase in which the host launched it.

    A kernel whose launch is not in the trace belongs to the phase in which it starts.
    """
    order = np.argsort(launches.links)
    links, times = launches.links[order], launches.spans[order, 0]
    moments = kernels.spans[:, 0].copy()
    if len(links):
        at = np.minimum(np.searchsorted(links, kernels.links), len(links) - 1)
        known = (links[at] == kernels.links) & (kernels.links != 0)
        moments[known] = times[at[known]]
    owners = np.full(len(kernels), list(hosts).index(UNACCOUNTED))
    for index, own in enumerate(hosts.values()):
        if not len(own):
            continue
        at = np.searchsorted(own[:, 0], moments, side="right") - 1
        owners[(at >= 0) & (moments < own[np.maximum(at, 0), 1])] = index
    return owners


def _spent(
    trace: Trace, device: Columns, start: int, end: int
) -> tuple[Counter[str], Counter[str]]:
    """Seconds and calls by name: of kernels, or of host ops without what they call."""
    columns = device
    seconds = 1e-9 * (device.spans[:, 1] - device.spans[:, 0])
    if not len(trace.kernels):
        columns = _within(trace.host_ops, start, end)
        seconds = 1e-9 * self_time(columns)
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    totals = np.bincount(columns.names, seconds, len(trace.names)).tolist()
    counts = np.bincount(columns.names, minlength=len(trace.names)).tolist()
    for number in np.unique(columns.names):
        spent[trace.names[number]] = totals[number]
        calls[trace.names[number]] = counts[number]
    return spent, calls


def self_time(columns: Columns) -> np.ndarray:
    """Nanoseconds of each event without the events inside it on the same thread."""
    spans = columns.spans
    lasting = spans[:, 1] - spans[:, 0]
    own = lasting.copy()
    order = np.lexsort((-spans[:, 1], spans[:, 0], columns.places))
    stack: list[int] = []
    for index in order:
        while stack and (
            columns.places[stack[-1]] != columns.places[index]
            or spans[stack[-1], 1] <= spans[index, 0]
        ):
            stack.pop()
        if stack:
            own[stack[-1]] -= lasting[index]
        stack.append(index)
    return own
