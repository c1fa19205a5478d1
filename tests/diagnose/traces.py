"""Traces whose answer is known: written event by event, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAIN, AUTOGRAD = 1, 2
COMPUTE_STREAM, COMM_STREAM = 7, 20


class Written:
    """A trace under construction."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.num_launches = 0

    def add(
        self, category: str, name: str, start: float, end: float, place: int = MAIN, **args: Any
    ) -> Written:
        self.events.append(
            {
                **{"ph": "X", "cat": category, "name": name, "pid": 100, "tid": place},
                **{"ts": 1e3 * start, "dur": 1e3 * (end - start), "args": args},
            }
        )
        return self

    def step(self, start: float, end: float, number: int = 0) -> Written:
        return self.add("user_annotation", f"ProfilerStep#{number}", start, end)

    def phase(self, name: str, start: float, end: float) -> Written:
        return self.add("user_annotation", f"fxopt.{name}", start, end)

    def op(self, name: str, start: float, end: float, place: int = MAIN) -> Written:
        return self.add("cpu_op", name, start, end, place)

    def kernel(
        self,
        name: str,
        launched: float,
        start: float,
        end: float,
        stream: int = COMPUTE_STREAM,
        thread: int = MAIN,
        **args: Any,
    ) -> Written:
        self.num_launches += 1
        link = {"correlation": self.num_launches}
        self.add("cuda_runtime", "cudaLaunchKernel", launched, launched + 0.01, thread, **link)
        return self.add("kernel", name, start, end, stream, **link, **args)

    def memory(
        self, moment: float, size: int, address: int, place: int = MAIN, device: int = 0
    ) -> Written:
        """An event of the allocator."""
        self.events.append(
            {
                **{"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 100},
                **{"tid": place, "ts": 1e3 * moment},
                "args": {
                    **{"Bytes": size, "Addr": address, "Device Type": device},
                    "Total Reserved": 4096 * device,
                },
            }
        )
        return self

    def to(self, path: Path) -> Path:
        # What Kineto writes around the events, and entries that are no durations.
        others = [{"ph": "M", "name": "process_name", "pid": 100, "args": {"name": "python"}}]
        document = {
            "schemaVersion": 1,
            "deviceProperties": [{"id": 0, "name": "GPU"}],
            "traceEvents": others + self.events,
            "traceName": str(path),
        }
        path.write_text(json.dumps(document, indent=2))
        return path
