"""`fxopt profile`: run a training script and say where the time of its steps went.

A step ends with the optimizer's. Under torchrun every rank profiles itself, and rank 0 puts the
results together.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.optim import optimizer

from fxopt.cli import positive
from fxopt.diagnose.errors import NotAReport, NotAScript
from fxopt.diagnose.profiling import Profile, Window
from fxopt.errors import FxoptError
from fxopt.report import Report


class WindowOver(Exception):
    """Ends the script once the profiled steps have run."""


def main(argv: Sequence[str]) -> int:
    """Run the command; 0, or 2 after a mistake, or 3 if it was interrupted."""
    options = _parser().parse_args(argv)
    try:
        return _profile(options)
    except FxoptError as error:
        print(f"fxopt profile: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxopt profile: interrupted, there is no profile", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxopt profile", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/profile"), help="folder")
    parser.add_argument("--steps", type=positive, default=Window.num_profiled, help="to profile")
    parser.add_argument("--skip", type=positive, default=Window.num_skipped, help="first steps")
    parser.add_argument(
        "--report",
        type=Path,
        help="fxopt's report on the model, as JSON (default: what the script's model has)",
    )
    parser.add_argument("script", help="train.py")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="of the script")
    return parser


def _profile(options: argparse.Namespace) -> int:
    if not Path(options.script).is_file():
        raise NotAScript(options.script)
    window = Window(options.skip, options.steps, options.steps)
    report = _report(options.report) if options.report else None
    with Profile(options.out, window, report) as profile:
        _run(options.script, options.args, profile)
    return 0 if profile.is_complete else 2


def _report(path: Path) -> Report:
    try:
        return Report.from_dict(json.loads(path.read_text()))
    except OSError as error:
        raise NotAReport(str(path), error.strerror or str(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotAReport(str(path), f"{type(error).__name__}: {error}") from error


def _run(script: str, arguments: Sequence[str], profile: Profile) -> None:
    """The script as `python script arguments` would run it, until the window is over."""
    saved = sys.argv, sys.path[:]
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    try:
        with _steps(profile):
            runpy.run_path(script, run_name="__main__")
    except WindowOver:
        pass
    finally:
        sys.argv, sys.path[:] = saved


@contextmanager
def _steps(profile: Profile) -> Iterator[None]:
    """Ends a step with each step of the first optimizer that takes one."""
    first: list[Any] = []

    def after(stepped: Any, *_: Any) -> None:
        first.append(stepped)
        if stepped is first[0]:
            profile.step()
        if profile.num_done >= profile.window.num_steps:
            raise WindowOver

    handle = optimizer.register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        handle.remove()
