"""Kernel tests run the Triton providers in the interpreter, on CPU tensors; `-m gpu` on the GPU."""

import gc
import os
from importlib.metadata import entry_points

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


@pytest.fixture(scope="session", autouse=True)
def backend_has_its_name():
    """Where the tests run in a tree of the source and fxopt is not installed."""
    if entry_points(group="torch_dynamo_backends", name="fxopt"):
        return
    from torch._dynamo import register_backend

    from fxopt.backends.dynamo import backend

    register_backend(backend, name="fxopt")


@pytest.fixture(scope="session", autouse=True)
def interpreter_is_quicker():
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from tests.interpreter import quicker

    with quicker():
        yield


@pytest.fixture(scope="module", autouse=True)
def collections_pass_over_what_was_there():
    """After some tests a process holds millions of objects; benchmarks collect at every round.

    Dynamo makes so many that last that a tenth of the time of its tests went into looking at them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def workers_share_the_memory(request):
    """PyTorch keeps for its own process what a test has freed."""
    yield
    if wants_gpu(request.config):
        import torch

        torch.cuda.empty_cache()
