"""What every bench command prints: rows of a measured value, its target and whether that holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.diagnose.environment import describe
from fxopt.diagnose.record import write_text

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One measured value.

    Args:
        case: what was measured, such as "flux-dev double".
        metric: which property of it, with its unit.
        value: the figure.
        at_most, at_least: the target, if there is one.
    """

    case: str
    metric: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str | None:
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return None if self.at_least is None else f">= {self.at_least:g}"

    @property
    def holds(self) -> bool | None:
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "metric": self.metric,
            "value": self.value,
            "target": self.target,
            "holds": self.holds,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every bench command shares."""
    parser.add_argument("--json", metavar="FILE", help="write JSON; - for standard output alone")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")


Samples = Mapping[str, Sequence[Sequence[float]]]


def document(
    rows: Sequence[Row], device: torch.device = CPU, samples: Samples | None = None
) -> str:
    """The rows as JSON, with where they come from; `samples` are raw seconds by comparison."""
    found = {"environment": describe(device), "rows": [row.as_dict() for row in rows]}
    return json.dumps(found | ({"samples": samples} if samples else {}), indent=1) + "\n"


def publish(
    args: argparse.Namespace,
    rows: Sequence[Row],
    device: torch.device = CPU,
    samples: Samples | None = None,
) -> int:
    """Print the rows, write them as `args.json` asks, and return the exit code of `args.check`."""
    text = document(rows, device, samples)
    if args.json == "-":
        print(text, end="")
    else:
        print(table(rows))
        if args.json:
            write_text(text, Path(args.json))
    missed = [row for row in rows if row.holds is False]
    if missed:
        print(f"{len(missed)} of {len(rows)} rows miss their target", file=sys.stderr)
    return int(bool(missed) and args.check)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, in aligned columns."""
    verdicts = {True: "holds", False: "MISSED", None: ""}
    cells = [("case", "metric", "value", "target", "")] + [
        (row.case, row.metric, f"{row.value:.4g}", row.target or "", verdicts[row.holds])
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
