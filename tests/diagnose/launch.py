"""The `fxopt` command in processes of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def fxopt(folder: Path, *words: str, num_ranks: int = 1) -> subprocess.CompletedProcess:
    """`fxopt <words>` in this folder, or under torchrun, until it ends."""
    torchrun = "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"
    return subprocess.run(
        [sys.executable, "-m", *(torchrun if num_ranks > 1 else ()), "fxopt", *words],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def start(folder: Path, *words: str, **options) -> subprocess.Popen:
    """`fxopt <words>` in this folder, still running; `options` are those of Popen."""
    return subprocess.Popen(
        [sys.executable, "-m", "fxopt", *words],
        cwd=folder,
        **{"env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True} | options,
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]
