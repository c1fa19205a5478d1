"""A Kineto trace read as a stream, event by event, into columns of a few bytes each.

Memory: `CHUNK` bytes of text, one event, about `BYTES_PER_EVENT` per kept event, and each distinct
name once. A file of 1 GB holds some five million events.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fxopt.diagnose.errors import InvalidTrace

CHUNK = 4 << 20
# No event of Kineto's is near this; a file without an end of event would be read whole.
LONGEST_EVENT = 64 << 20
BYTES_PER_EVENT = 40
# Categories that say something about time; the rest (flow arrows, Python frames) is skipped.
ANNOTATIONS = ("user_annotation", "gpu_user_annotation")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
CATEGORIES = ("cpu_op", "user_annotation", *DEVICE, *LAUNCHES)
# Name of the allocator's events.
MEMORY = "[memory]"


def events(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of "traceEvents" in a .json or .json.gz file, in its order.

    Raises:
        InvalidTrace: if the file cannot be read, holds no events or ends within one.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield from _entries(path, file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidTrace(str(path), str(error)) from error


def _entries(path: Path, file: Any) -> Iterator[dict[str, Any]]:
    buffer = _until_events(path, file)
    decode = json.JSONDecoder().raw_decode
    position = 0
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if position < len(buffer) and buffer[position] == "]":
            return
        try:
            entry, position = decode(buffer, position)
            yield entry
        except json.JSONDecodeError as error:
            more = file.read(CHUNK)
            if not more or len(buffer) - position > LONGEST_EVENT:
                raise InvalidTrace(str(path), "it ends within an event") from error
            buffer, position = buffer[position:] + more, 0


def _until_events(path: Path, file: Any) -> str:
    """Text from the first event on."""
    key, buffer = '"traceEvents"', ""
    while more := file.read(CHUNK):
        buffer += more
        start = buffer.find(key)
        opening = buffer.find("[", start) if start >= 0 else -1
        if opening >= 0:
            return buffer[opening + 1 :]
        if start < 0:
            buffer = buffer[-len(key) :]
    raise InvalidTrace(str(path), "it holds no traceEvents")


@dataclass
class Names:
    """Distinct texts by number."""

    numbers: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        found = self.numbers.get(text)
        if found is None:
            found = self.numbers[text] = len(self.texts)
            self.texts.append(text)
        return found


@dataclass(frozen=True)
class Columns:
    """Events of one kind.

    Args:
        spans: [N, 2] start and end in whole nanoseconds.
        names: [N] numbers of names.
        places: [N] thread, or device stream, as one number per (pid, tid).
        links: [N] correlation of a kernel with its launch; 0 for none.
    """

    spans: np.ndarray
    names: np.ndarray
    places: np.ndarray
    links: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, mask: np.ndarray) -> Columns:
        return Columns(self.spans[mask], self.names[mask], self.places[mask], self.links[mask])


@dataclass(frozen=True)
class Allocations:
    """Events of the allocators; there are none unless the profiler was told to record memory.

    Args:
        moments: [N] nanoseconds.
        sizes: [N] bytes; negative where they are given back.
        addresses: [N].
        places: [N] thread.
        reserved: [N] bytes of the allocator's own pool.
        on_device: [N] whether the memory is a GPU's.
    """

    moments: np.ndarray
    sizes: np.ndarray
    addresses: np.ndarray
    places: np.ndarray
    reserved: np.ndarray
    on_device: np.ndarray

    def __len__(self) -> int:
        return len(self.moments)

    def where(self, mask: np.ndarray) -> Allocations:
        columns = (getattr(self, field.name)[mask] for field in dataclasses.fields(self))
        return Allocations(*columns)


@dataclass(frozen=True)
class Trace:
    """One rank's trace.

    Args:
        host_ops, annotations, kernels, launches: events by kind; copies and fills are kernels.
        allocations: of memory.
        names: texts of the numbers; of a kernel with metadata, "name|dtype" or "name|collective".
        main: place of the thread that holds the step annotations.
    """

    host_ops: Columns
    annotations: Columns
    kernels: Columns
    launches: Columns
    allocations: Allocations
    names: list[str]
    main: int


class _Collected:
    def __init__(self) -> None:
        self.spans = array("q")
        self.names, self.places, self.links = array("i"), array("i"), array("q")

    def add(self, start: int, end: int, name: int, place: int, link: int) -> None:
        self.spans.extend((start, end))
        self.names.append(name)
        self.places.append(place)
        self.links.append(link)

    def columns(self) -> Columns:
        return Columns(
            np.array(self.spans).reshape(-1, 2),
            *(np.array(column) for column in (self.names, self.places, self.links)),
        )


STEP = "ProfilerStep#"
# In front of the name of the module that is running.
MODULE = "fxopt.in "
# Dynamo marks what it times with this ending, as host ops.
COMPILING = "(dynamo_timed)"


def read(path: Path) -> Trace:
    """The trace at `path`.

    Raises:
        InvalidTrace: as `events`, and if no step is marked in it.
    """
    kinds = {
        "host": _Collected(),
        "note": _Collected(),
        "device": _Collected(),
        "launch": _Collected(),
    }
    names, places = Names(), Names()
    main: int | None = None
    memory = array("q")
    for event in events(path):
        category = event.get("cat")
        if event.get("ph") == "i" and event.get("name") == MEMORY:
            memory.extend(_allocation(event, places))
        if event.get("ph") != "X" or category not in CATEGORIES:
            continue
        name, arguments = event["name"], event.get("args", {})
        place = _place(event, places)
        if category == "user_annotation" and name.startswith(STEP):
            main = place
        kind = "note" if name.endswith(COMPILING) else _kind(category)
        # Kineto writes microseconds with three decimals.
        start = round(1e3 * event["ts"])
        end = start + round(1e3 * event.get("dur", 0))
        link = int(arguments.get("correlation", 0)) if kind in ("device", "launch") else 0
        kinds[kind].add(
            start, end, names.number(_described(name, category, arguments)), place, link
        )
    if main is None:
        raise InvalidTrace(str(path), f"no step is marked by {STEP}N; call profiler.step()")
    found = {kind: collected.columns() for kind, collected in kinds.items()}
    rows = np.array(memory).reshape(-1, 6).T
    return Trace(
        found["host"],
        found["note"],
        found["device"],
        found["launch"],
        Allocations(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5] != 0),
        names.texts,
        main,
    )


def _allocation(event: dict[str, Any], places: Names) -> tuple[int, ...]:
    """A row of `Allocations`."""
    arguments = event["args"]
    return (
        round(1e3 * event["ts"]),
        int(arguments["Bytes"]),
        int(arguments["Addr"]),
        _place(event, places),
        int(arguments.get("Total Reserved", 0)),
        int(arguments.get("Device Type", 0)),
    )


def _place(event: dict[str, Any], places: Names) -> int:
    return places.number(f"{event.get('pid')}/{event.get('tid')}")


def _kind(category: str) -> str:
    if category in DEVICE:
        return "device"
    if category in LAUNCHES:
        return "launch"
    return "note" if category in ANNOTATIONS else "host"


def _described(name: str, category: str, arguments: dict[str, Any]) -> str:
    """The name with what metadata says about it: a copy, a collective, the operands' dtype."""
    if category in ("gpu_memcpy", "gpu_memset"):
        return f"{name}|copy"
    if "Collective name" in arguments:
        return f"{name}|collective"
    types = arguments.get("Input type") or []
    dtype = next((t for t in types if t), "")
    return f"{name}|{dtype}" if dtype else name
