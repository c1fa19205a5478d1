"""What held the memory when it was at its peak, from the allocator's events of one traced step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxopt.diagnose import intervals
from fxopt.diagnose.phases import host_phases, step_spans
from fxopt.diagnose.trace import MODULE, Columns, Trace

NUM_OWNERS = 12


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most memory was taken.

    Args:
        num_bytes: more than at the start of the step.
        at: part of the step that had passed.
        phase: that the main thread was in.
        reserved: by the allocator from the device; 0 where it has no pool, as on CPUs.
        owners: what was taken within the step and was alive: (phase, module or op, bytes), largest
            first. Numbers in names of modules are "*", so equal blocks are one line.
        num_allocations: in the whole step.
    """

    num_bytes: int
    at: float
    phase: str
    reserved: int
    owners: Sequence[tuple[str, str, int]]
    num_allocations: int


def peak(trace: Trace) -> Peak | None:
    """The peak within the first marked step; None if no allocation is in the trace."""
    (start, end), *_ = step_spans(trace)
    events = trace.allocations
    # What counts is the device's memory where there is a device.
    events = events.where(events.on_device == events.on_device.any())
    events = events.where((events.moments >= start) & (events.moments < end))
    if not len(events):
        return None
    events = events.where(np.argsort(events.moments, kind="stable"))
    running = np.cumsum(events.sizes)
    highest = int(np.argmax(running))
    alive: dict[int, int] = {}
    for index in range(highest + 1):
        if events.sizes[index] > 0:
            alive[int(events.addresses[index])] = index
        else:
            alive.pop(int(events.addresses[index]), None)
    held = events.where(np.array(sorted(alive.values()), dtype=np.int64))
    phases = _phases(trace, start, end, held.moments)
    names = _owners(trace, held.moments, held.places)
    owners: Counter[tuple[str, str]] = Counter()
    for phase, name, size in zip(phases, names, held.sizes.tolist(), strict=True):
        owners[phase, name] += size
    moment = events.moments[highest : highest + 1]
    return Peak(
        max(0, int(running[highest])),
        float(moment[0] - start) / (end - start),
        _phases(trace, start, end, moment)[0],
        int(events.reserved.max()),
        [(phase, name, size) for (phase, name), size in owners.most_common(NUM_OWNERS)],
        int((events.sizes > 0).sum()),
    )


def _phases(trace: Trace, start: int, end: int, moments: np.ndarray) -> list[str]:
    """The phase of the main thread at each moment."""
    found = [""] * len(moments)
    for name, own in host_phases(trace, np.array([[start, end]])).items():
        for index in np.flatnonzero(intervals.contains(own, moments)):
            found[index] = name
    return found


def _owners(trace: Trace, moments: np.ndarray, places: np.ndarray) -> list[str]:
    """The innermost module that was running, or else the outermost op."""
    modules = [i for i, name in enumerate(trace.names) if name.startswith(MODULE)]
    notes = trace.annotations.where(np.isin(trace.annotations.names, modules))
    inside = enclosing(notes, moments, places)
    ops = enclosing(trace.host_ops, moments, places)
    found = []
    for module, op in zip(inside, ops, strict=True):
        if module:
            name = trace.names[notes.names[module[-1]]].removeprefix(MODULE)
        else:
            name = trace.names[trace.host_ops.names[op[0]]].partition("|")[0] if op else "no op"
            name = name.removeprefix("autograd::engine::evaluate_function: ")
        found.append(re.sub(r"\b\d+\b", "*", name))
    return found


def enclosing(spans: Columns, moments: np.ndarray, places: np.ndarray) -> list[list[int]]:
    """For each moment on a thread the spans around it, outermost first.

    Args:
        spans: nested, as those of one thread always are.
        moments, places: [N].
    """
    found: list[list[int]] = [[] for _ in moments]
    order = np.lexsort((-spans.spans[:, 1], spans.spans[:, 0], spans.places))
    asked = np.lexsort((moments, places))
    stack: list[int] = []
    position = 0
    for question in asked:
        place, moment = places[question], moments[question]
        while position < len(order):
            at = order[position]
            if (spans.places[at], spans.spans[at, 0]) > (place, moment):
                break
            while stack and (
                spans.places[stack[-1]] != spans.places[at]
                or spans.spans[stack[-1], 1] <= spans.spans[at, 0]
            ):
                stack.pop()
            stack.append(int(at))
            position += 1
        while stack and (spans.places[stack[-1]] != place or spans.spans[stack[-1], 1] <= moment):
            stack.pop()
        found[question] = stack.copy()
    return found
