"""Kernel tests run the Triton providers in the interpreter, on CPU tensors; `-m gpu` on the GPU."""

import os


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
