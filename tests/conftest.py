"""Kernel tests run the Triton providers in the interpreter, on CPU tensors; `-m gpu` on the GPU."""

import gc
import os

import pytest


def pytest_configure(config):
    asked = config.option.markexpr.replace("not gpu", "")
    if "gpu" not in asked:
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def collections_pass_over_what_was_there():
    """After some tests a process holds millions of objects; benchmarks collect at every round."""
    gc.collect()
    gc.freeze()
