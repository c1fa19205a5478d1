"""The `fxopt` command: `fxopt demo`, `explain`, `bench` and `profile`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from fxopt.errors import FxoptError
from fxopt.report import Report

BAR_WIDTH = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a mistake of the user's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from fxopt.diagnose import command

        return command.main(arguments[1:])
    if arguments[:1] == ["profile"]:
        from fxopt.diagnose import profile_command

        return profile_command.main(arguments[1:])
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "demo":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "demo":
            from fxopt import demo

            return demo.main(rest)
        return _explain(options)
    except FxoptError as error:
        print(f"fxopt: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from fxopt.hardware import TARGETS

    parser = argparse.ArgumentParser(
        prog="fxopt", description="Rewrites diffusion transformers to fused ops for training."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "demo",
        help="train a small FLUX through every door and compare; --help for its options",
        add_help=False,
    )
    commands.add_parser(
        "bench",
        help="measure two steps against each other and write a claim record; --help for more",
        add_help=False,
    )
    commands.add_parser(
        "profile",
        help="run a training script and say where the time of its steps went",
        add_help=False,
    )
    explain = commands.add_parser(
        "explain",
        help="what would be rewritten and what each block costs, without a GPU and weights",
    )
    explain.add_argument(
        "model",
        help="a preset (flux-dev, flux2-dev, sd3.5-large, qwen-image, wan2.1-14b, z-image, "
        "llama-3-8b) or FILE.py:FUNCTION, where FUNCTION() returns (model, inputs); build the "
        "model under torch.device('meta') and it takes no memory",
    )
    explain.add_argument("--target", default="h100", help=f"one of {', '.join(TARGETS)}")
    explain.add_argument("--recipe", default="bf16", help="name of a recipe (default: bf16)")
    explain.add_argument("--batch", type=positive, default=1, help="samples, for presets")
    explain.add_argument("--height", type=positive, help="pixels, for presets")
    explain.add_argument("--width", type=positive, help="pixels, for presets")
    writing = explain.add_argument
    writing("--html", metavar="PAGE", type=writable, help="also write a self-contained page")
    writing("--json", metavar="FILE", type=writable, help="also write JSON; - prints only that")
    return parser


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def writable(path: str) -> str:
    """An argument that names a file to write, looked at before the minutes that fill it."""
    file = Path(path)
    there = file if file.exists() else file.parent
    if path != "-" and (file.is_dir() or not os.access(there, os.W_OK)):
        raise argparse.ArgumentTypeError(f"cannot write {path}: give a file in a writable folder")
    return path


def _explain(options: argparse.Namespace) -> int:
    from fxopt.explanation import explain, load_example

    model, inputs = options.model, None
    with quiet():
        if ":" in options.model:
            model, inputs = load_example(options.model)
        report = explain(
            model,
            example_inputs=inputs,
            target=options.target,
            recipe=options.recipe,
            batch=options.batch,
            height=options.height,
            width=options.width,
            progress=Progress(),
        )
    try:
        _write(report, options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; nor may the interpreter flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"fxopt: cannot write the report: {error}", file=sys.stderr)
        return 2
    return 0


def _write(report: Report, options: argparse.Namespace) -> None:
    if options.html:
        Path(options.html).write_text(report.html(), encoding="utf-8")
    if options.json == "-":
        print(report.to_json())
        return
    if options.json:
        Path(options.json).write_text(report.to_json() + "\n", encoding="utf-8")
    print(report.text())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings of model libraries and of the capture off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


class Progress:
    """A bar on standard error: redrawn on a terminal, elsewhere one line per step after 2 s."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, done: int, total: int, step: str) -> None:
        elapsed = time.monotonic() - self.start
        filled = BAR_WIDTH * done // max(total, 1)
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        line = f"[{bar}] {done}/{total} {step} {elapsed:.0f} s"
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r\033[K{line}", end=end, file=sys.stderr, flush=True)
        elif elapsed > 2:
            print(line, file=sys.stderr, flush=True)
