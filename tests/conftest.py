"""Kernel tests run the Triton providers in the interpreter, on CPU tensors; `-m gpu` on the GPU."""

import os


def pytest_configure(config):
    asked = config.option.markexpr.replace("not gpu", "")
    if "gpu" not in asked:
        os.environ.setdefault("TRITON_INTERPRET", "1")
