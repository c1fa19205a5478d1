"""From the profiles of the ranks to files: each rank leaves its own, rank 0 puts them together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fxopt.diagnose import profile_page
from fxopt.diagnose.compiles import Compile
from fxopt.diagnose.errors import CannotWrite, RankEnded, RankMissing
from fxopt.diagnose.findings import findings
from fxopt.diagnose.holding import Peak
from fxopt.diagnose.phases import Phase, Step
from fxopt.diagnose.profiling import Profiled
from fxopt.diagnose.record import write_text
from fxopt.report import Report

# How long rank 0 waits for the others' results.
PATIENCE = 120.0  # seconds


def path_of(rank: int, out: Path) -> Path:
    """Where a rank leaves its result."""
    return out / f"rank{rank}.json"


def leave(result: Profiled, out: Path, report: Report | None) -> None:
    """Write this rank's result; rank 0 waits for all of them and publishes.

    Raises:
        RankMissing: if one does not come.
        RankEnded: if one failed.
        CannotWrite: if a file cannot be written.
    """
    write_text(json.dumps(dataclasses.asdict(result)), path_of(result.rank, out))
    if result.rank == 0:
        publish(list(_gather(out, int(os.environ.get("WORLD_SIZE", "1")))), out, report)


def fail(rank: int, error: str, out: Path) -> None:
    """Leave word for rank 0 that this rank has no result; on rank 0 say what the others left."""
    with contextlib.suppress(CannotWrite):  # the error itself matters more
        write_text(json.dumps({"error": error}), path_of(rank, out))
    if rank == 0:
        for other in range(1, int(os.environ.get("WORLD_SIZE", "1"))):
            with contextlib.suppress(OSError):
                data = json.loads(path_of(other, out).read_text())
                if "error" in data:
                    print(f"fxopt profile: {RankEnded(other, data['error'])}", file=sys.stderr)


def publish(ranks: Sequence[Profiled], out: Path, report: Report | None = None) -> None:
    """Print the profile and write `profile.json` and `profile.html` to `out`."""
    found = findings(ranks, report)
    write_text(profile_page.to_json(ranks, found), out / "profile.json")
    write_text(profile_page.html(ranks, found), out / "profile.html")
    print(profile_page.text(ranks, found))
    print(f"wrote {out}/profile.json and {out}/profile.html")


def _gather(out: Path, world_size: int) -> Iterator[Profiled]:
    """The results of all ranks, as they arrive.

    Files that are looked for again and again need neither a process group, which the script may
    have destroyed, nor a launcher of some kind.
    """
    deadline = time.monotonic() + PATIENCE
    for rank in range(world_size):
        path = path_of(rank, out)
        while not path.exists():
            if time.monotonic() > deadline:
                raise RankMissing(rank, PATIENCE)
            time.sleep(0.1)
        data = json.loads(path.read_text())
        if "error" in data:
            raise RankEnded(rank, data["error"])
        yield load(data)


def load(data: dict[str, Any]) -> Profiled:
    """The result that `dataclasses.asdict` came from."""
    steps = [
        Step(**step | {"phases": {name: Phase(**p) for name, p in step["phases"].items()}})
        for step in data["steps"]
    ]
    compiles = [Compile(**compile) for compile in data["compiles"]]
    peak = Peak(**data["peak"]) if data["peak"] else None
    return Profiled(**data | {"steps": steps, "compiles": compiles, "peak": peak})
