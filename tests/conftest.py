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
def inductor_writes_scalar_code(request):
    """Vectors are not ours to test, and a C++ compiler takes twice as long for them."""
    if not wants_gpu(request.config):
        import torch._inductor.config

        torch._inductor.config.cpp.simdlen = 1


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_its_language_once_a_launch():
    """Triton's does so again at every call of a function in a kernel: two fifths of its time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def launched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(fn):
        # By the file of the function: the language is what its globals hold of it.
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield


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
