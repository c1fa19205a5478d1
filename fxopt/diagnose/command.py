"""`fxopt bench`: measure two steps against each other, compare and show claim records.

Exit codes: 0 pass, 1 slower or wrong, 2 usage or environment, 3 inconclusive or interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fxopt.cli import positive, quiet
from fxopt.diagnose import environment, record, tables
from fxopt.diagnose.case import Case, Run, Settings
from fxopt.diagnose.devices import TorchDevice, this_device
from fxopt.diagnose.numerics import FACTOR
from fxopt.diagnose.protocol import Plan
from fxopt.diagnose.ranks import PATIENCE, Ranks, joined
from fxopt.diagnose.record import Claim, Record
from fxopt.diagnose.suites import Sweep, function_cases, preset_cases
from fxopt.diagnose.verdict import MARGIN
from fxopt.errors import FxoptError, UnknownOption

COMMANDS = ("step", "preset", "kernels", "compare", "show")
# Of several claims the worst decides: environment, regression, inconclusive, pass.
SEVERITY = (2, 1, 3, 0)
DTYPES = ("bfloat16", "float16", "float32", "float64")
SWEPT = ("batch", "tokens", "height", "width", "recipe", "ac", "door")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = list(argv)
    if arguments and arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        arguments.insert(0, "step")
    options = _parser().parse_args(arguments)
    try:
        if options.command == "compare":
            return _compare(options)
        if options.command == "show":
            return _show(options)
        if options.world_size and "RANK" not in os.environ:
            return _launch(options.world_size, options.out, argv)
        with joined(options.patience) as ranks:
            return ranks.leave(_measure_together(options, ["fxopt", "bench", *argv], ranks))
    except FxoptError as error:
        print(f"fxopt bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxopt bench: interrupted before anything was measured", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxopt bench",
        description="FILE.py:FUNCTION --candidate FILE.py:FUNCTION measures two steps of yours; "
        "each FUNCTION returns step, (step, model) or (step, model, inputs). "
        + (__doc__ or "").splitlines()[-1],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    step = commands.add_parser("step", help="two steps: FILE.py:FUNCTION (the default command)")
    step.add_argument("baseline", help="FILE.py:FUNCTION")
    step.add_argument("--candidate", required=True, help="FILE.py:FUNCTION")
    preset = commands.add_parser("preset", help="blocks of a published model, through a door")
    preset.add_argument("name", help="such as flux-dev-block, flux-dev-double, wan2.1-14b")
    kernels = commands.add_parser("kernels", help="fxopt's ops against eager ops, caches cold")
    kernels.add_argument("--only", default="", metavar="NAME", help="ops that contain NAME")
    for command in (step, preset, kernels):
        _add_measuring(command)
    compare = commands.add_parser("compare", help="two records of one thing: did it get slower?")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    show = commands.add_parser("show", help="a record as a table, page or pictures")
    show.add_argument("record", type=Path)
    show.add_argument("--markdown", action="store_true", help="as a Markdown table")
    show.add_argument("--html", metavar="PAGE", type=Path, help="write a self-contained page")
    show.add_argument("--plots", metavar="STEM", type=Path, help="write STEM-*.png and STEM-*.svg")
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    sweep = parser.add_argument_group("swept; several values give one claim per combination")
    for name in ("batch", "tokens", "height", "width"):
        sweep.add_argument(f"--{name}", type=positive, nargs="+", default=())
    for name in ("recipe", "ac", "door"):
        sweep.add_argument(f"--{name}", nargs="+", default=())
    parser.add_argument("--dtype", default="bfloat16", help="of presets and kernels")
    parser.add_argument("--out", type=Path, default=Path("claim.json"), help="the record")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=above_zero, default=Plan.seconds, help="of timing per case"
    )
    parser.add_argument("--margin", type=above_zero, default=MARGIN, help="below it, all is SAME")
    parser.add_argument(
        "--tolerance",
        type=above_zero,
        help="largest relative L2 error of outputs against the baseline",
    )
    parser.add_argument(
        "--float64",
        action=argparse.BooleanOptionalAction,
        help=f"judge against float64, at most {FACTOR:g} times the baseline's error (default for "
        "presets and kernels)",
    )
    parser.add_argument("--world-size", type=positive, help="processes, started with torchrun")
    parser.add_argument(
        "--patience", type=above_zero, default=PATIENCE, help="seconds to wait for another rank"
    )


def above_zero(text: str) -> float:
    """An argument that measures something."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


def _launch(world_size: int, out: Path, argv: Sequence[str]) -> int:
    """The same command in `world_size` processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
    command += ["--standalone", "-m", "fxopt", "bench", *argv]
    before = out.stat().st_mtime_ns if out.exists() else None
    interrupted = False
    with subprocess.Popen(command) as torchrun:
        try:
            torchrun.wait()
        except KeyboardInterrupt:  # reaches torchrun as well; the ranks write what they have
            interrupted = True
            torchrun.wait()
    # torchrun's own code is 1 whenever a worker's is not 0.
    failed = torchrun.returncode and not interrupted
    if failed or not out.exists() or out.stat().st_mtime_ns == before:
        return 2
    return _worst(record.read(out).claims)


def _measure_together(options: argparse.Namespace, command: Sequence[str], ranks: Ranks) -> int:
    """Rank 0 alone decides the exit code: torchrun stops it as soon as another rank fails."""
    try:
        code = _measure(options, command, ranks)
    except FxoptError as error:
        ranks.fail(str(error), "")
        rank = f", rank {ranks.rank}" if ranks.rank else ""
        print(f"fxopt bench{rank}: {error}", file=sys.stderr)
        return 0 if ranks.rank else 2
    return 0 if ranks.rank or options.world_size else code


def _measure(options: argparse.Namespace, command: Sequence[str], ranks: Ranks) -> int:
    device = this_device(options.device, ranks)
    settings = Settings(
        Plan(seconds=options.seconds), options.seed, options.margin, options.tolerance
    )
    with quiet():
        cases = list(_cases(options, device))
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    place = environment.describe(device.device)
    claims: list[Claim] = []
    error: FxoptError | None = None
    for index, case in enumerate(cases, start=1):

        def progress(phase: str, label: str = f"[{index}/{len(cases)}] {case.name}") -> None:
            print(f"{label}: {phase}", file=sys.stderr, flush=True)

        try:
            with quiet():
                claims.append(Run(case, device, settings)(progress))
        except FxoptError as raised:
            error = raised
        stopped = error is not None or claims[-1].status == "interrupted"
        # After a failure the ranks are no longer at the same collective.
        if stopped or (claims[-1].status == "failed" and ranks.world_size > 1):
            break
    made = Record(record.VERSION, started, tuple(command), place, tuple(claims))
    if claims and not ranks.rank:
        _publish(made, options.out)
    if error is not None:
        raise error
    return _worst(claims)


def _worst(claims: Sequence[Claim]) -> int:
    return min((exit_code(claim) for claim in claims), key=SEVERITY.index)


def _cases(options: argparse.Namespace, device: TorchDevice) -> Iterator[Case]:
    if options.dtype not in DTYPES:
        raise UnknownOption(options.dtype, DTYPES)
    sweep = Sweep(dtype=options.dtype, **{name: getattr(options, name) for name in SWEPT})
    if options.command == "step":
        yield from function_cases(
            options.baseline, options.candidate, sweep, options.seed, bool(options.float64)
        )
        return
    in_float64 = options.float64 is not False
    if options.command == "preset":
        yield from preset_cases(options.name, sweep, device.device, options.seed, in_float64)
        return
    from fxopt.diagnose.kernel_suite import kernel_cases

    yield from kernel_cases(options.only, sweep, device.device, options.seed, in_float64)


def exit_code(claim: Claim) -> int:
    """0 pass, 1 slower or wrong, 2 failed, 3 inconclusive or interrupted."""
    if claim.status != "complete" or claim.verdict is None:
        return 2 if claim.status == "failed" else 3
    return claim.verdict.label.exit_code


def _publish(made: Record, path: Path) -> None:
    """Print the table first, so that a full disk does not take it along."""
    digest = record.digest(dataclasses.asdict(made))
    print(tables.text(dataclasses.replace(made, digest=digest)))
    record.write(made, path)
    print(f"wrote {path}")


def _show(options: argparse.Namespace) -> int:
    found = record.read(options.record)
    if options.html:
        from fxopt.diagnose import plots

        record.write_text(tables.html(found, plots.svg(found)), options.html)
    if options.plots:
        from fxopt.diagnose import plots

        for path in plots.save(found, options.plots):
            print(f"wrote {path}", file=sys.stderr)
    print(tables.markdown(found) if options.markdown else tables.text(found))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from fxopt.diagnose import compare

    changes = compare.compare(record.read(options.old), record.read(options.new))
    print(compare.text(changes))
    return min((change.label.exit_code for change in changes), key=SEVERITY.index)
