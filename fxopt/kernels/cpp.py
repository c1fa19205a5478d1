"""Loops in C++, for what fp32 tensors on a CPU go through: compiled once on each machine.

A native provider in plain ATen is a dozen calls and as many temporaries; where tensors are small
that takes longer than the ops it replaces. Each loop of `csrc` is one call, by one struct. Without
a compiler the providers stay plain ATen; `why_not` says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# By what PyTorch has found the CPU to be capable of.
CAPABILITY_FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}
TYPES = (Tensor, torch.nn.Parameter)  # others may have no memory of their own
Triple = tuple[int, int, int]
ABSENT: Triple = (0, 0, 0)


class Loop:
    """One function of `csrc` and the struct of its arguments, of 8 bytes each."""

    def __init__(self, name: str, fields: str) -> None:
        self.name, self._struct = name, Struct(fields)

    def __call__(self, *arguments: float) -> None:
        library = compiled()
        assert library is not None
        getattr(library, self.name)(self._struct.pack(*arguments))


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether there are loops, and all of these are what they read: fp32 in memory of a CPU."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype is not torch.float32 or not t.is_cpu or type(t) not in TYPES or t.is_neg():
            return False
    return compiled() is not None


def have_shape(shape: tuple[int, ...], *tensors: Tensor | None) -> bool:
    """Whether a loop that goes by `shape` stays inside of all that are not None."""
    return all(t is None or t.shape == shape for t in tensors)


def pointer(t: Tensor | None) -> int:
    """0 for none, and for one without elements, which stands for none."""
    return 0 if t is None else t.data_ptr()


def compiled() -> ctypes.CDLL | None:
    """The loops, compiled if they have not been; None if they cannot be."""
    return _compiled()[0]


def why_not() -> str | None:
    """Why the native providers are plain ATen, or None where they have loops."""
    return _compiled()[1]


@functools.cache
def _compiled() -> tuple[ctypes.CDLL | None, str | None]:
    cxx = compiler()
    if sys.platform != "linux":
        return None, f"loops in C++ are for Linux, and this is {sys.platform}"
    if not cxx:
        return None, "no C++ compiler for loops: install one, or name it in CXX"
    try:
        return ctypes.CDLL(str(_built(cxx))), None
    except subprocess.CalledProcessError as error:
        first = next(iter(error.stderr.splitlines()), f"exit status {error.returncode}")
        return None, f"{cxx} does not compile the loops: {first}"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home for a cache
        return None, f"the loops cannot be built or loaded: {error}"


def compiler() -> str:
    """Path of the C++ compiler that CXX names, or of c++; "" for none."""
    return shutil.which(os.environ.get("CXX") or "c++") or ""


def _built(cxx: str) -> Path:
    """The library in the user's cache, by the hash of all that it is made of."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = (*FLAGS, *CAPABILITY_FLAGS.get(capability, ()))
    files = sorted(SOURCES.iterdir())
    made_of = [cxx, *flags, *(f.read_text() for f in files)]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxopt"
    library = folder / f"loops_{capability}_{key}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        objects = [f"{room}/{f.stem}.o" for f in files if f.suffix == ".cpp"]
        for o in objects:
            _run(cxx, *flags, "-c", str(SOURCES / f"{Path(o).stem}.cpp"), "-o", o)
        # Without -fopenmp: its runtime is PyTorch's own, which is loaded. A second one would have
        # threads of its own.
        _run(cxx, "-shared", *objects, "-o", f"{room}/loops.so")
        os.replace(f"{room}/loops.so", library)  # whole, whoever else makes it
    return library


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
