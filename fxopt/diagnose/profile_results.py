"""From the profiles of the ranks to files: each rank leaves its own, rank 0 puts them together."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fxopt.diagnose import profile_page
from fxopt.diagnose.errors import RankMissing
from fxopt.diagnose.findings import findings
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
        CannotWrite: if a file cannot be written.
    """
    write_text(json.dumps(dataclasses.asdict(result)), path_of(result.rank, out))
    if result.rank == 0:
        publish(list(_gather(out, int(os.environ.get("WORLD_SIZE", "1")))), out, report)


def publish(ranks: Sequence[Profiled], out: Path, report: Report | None = None) -> None:
    """Print the profile and write `profile.json` and `profile.html` to `out`."""
    found = findings(ranks, report)
    write_text(profile_page.to_json(ranks, found), out / "profile.json")
    write_text(profile_page.html(ranks, found), out / "profile.html")
    print(profile_page.text(ranks, found))
    print(f"wrote {out}/profile.json and {out}/profile.html")


def _gather(out: Path, world_size: int) -> Iterator[Profiled]:
    """The results of all ranks, as they arrive."""
    deadline = time.monotonic() + PATIENCE
    for rank in range(world_size):
        path = path_of(rank, out)
        while not path.exists():
            if time.monotonic() > deadline:
                raise RankMissing(rank, PATIENCE)
            time.sleep(0.1)
        yield load(json.loads(path.read_text()))


def load(data: dict[str, Any]) -> Profiled:
    """The result that `dataclasses.asdict` came from."""
    steps = [
        Step(**step | {"phases": {name: Phase(**p) for name, p in step["phases"].items()}})
        for step in data["steps"]
    ]
    return Profiled(**data | {"steps": steps})
