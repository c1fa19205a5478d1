"""Kernel tests run the Triton providers in the interpreter, on CPU tensors; `-m gpu` on the GPU."""

import gc
import os

import pytest


def wants_gpu(config):
    return "gpu" in config.option.markexpr.replace("not gpu", "")


def pytest_configure(config):
    if not wants_gpu(config):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_ignore_collect(collection_path, config):
    """Files without a test for a GPU: they may import what its machine does not have."""
    if wants_gpu(config) and collection_path.suffix == ".py":
        return True if "pytest.mark.gpu" not in collection_path.read_text() else None
    return None


@pytest.fixture(scope="module", autouse=True)
def collections_pass_over_what_was_there():
    """After some tests a process holds millions of objects; benchmarks collect at every round."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def workers_share_the_memory(request):
    """PyTorch keeps for its own process what a test has freed."""
    yield
    if wants_gpu(request.config):
        import torch

        torch.cuda.empty_cache()
