"""`python -m bench.tables`: bench/RESULTS.md from the results in bench/results/.

A result is one of two kinds of JSON: the rows of a command of `bench` (`rows.py`), of which the
table shows what has a target, or a claim record of `fxopt bench` or the demo.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contest import RESULTS
from fxopt.diagnose import record, tables
from fxopt.diagnose.record import write_text

PAGE = Path(__file__).parent / "RESULTS.md"
INTRODUCTION = """# Results

Made by `python -m bench.tables` from the files in `results/`, which hold all figures and where they
come from. **Bold** misses its target.
"""
SHOWN = ("device", "torch", "triton", "num_threads", "commit")


def page(folder: Path = RESULTS) -> str:
    """One section per file, by name."""
    return "\n".join([INTRODUCTION, *(section(path) for path in sorted(folder.glob("*.json")))])


def section(path: Path) -> str:
    """Where the figures come from, and their table."""
    found = json.loads(path.read_text())
    origin = ", ".join(f"{name} {found['environment'].get(name)}" for name in SHOWN)
    body = table(found["rows"]) if "rows" in found else tables.markdown(record.read(path))
    return f"## {path.stem}\n\n{origin}\n\n{body}\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per case and a column per metric that has a target; all metrics if none has.

    What was asked for and is not reached is shown as well, though what is reached is the target.
    """
    cases = {row["case"] for row in rows if row["target"]}
    asked = [row["case"] in cases and "(asked: " in row["metric"] for row in rows]
    shown = [row for row, also in zip(rows, asked, strict=True) if row["target"] or also] or rows
    targets: dict[str, set[str | None]] = {}
    for row in shown:
        targets.setdefault(row["metric"], set()).add(row["target"])
    # A target that is the same for all cases stands in the head of its column.
    common = {metric: found.pop() for metric, found in targets.items() if len(found) == 1}
    header = ["case", *(f"{m} ({common[m]})" if common.get(m) else m for m in targets)]
    cells = {(row["case"], row["metric"]): _cell(row, row["metric"] in common) for row in shown}
    lines = [header, ["---", *["---:"] * len(targets)]]
    for case in dict.fromkeys(row["case"] for row in shown):
        lines.append([case, *(cells.get((case, metric), "") for metric in targets)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any], is_common: bool) -> str:
    value = f"{row['value']:.3g}"
    value = f"**{value}**" if row["holds"] is False else value
    return value if is_common else f"{value} ({row['target']})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.parse_args(argv)
    write_text(page(), PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
