"""Fixtures of several tests of doors."""

import importlib

import pytest


@pytest.fixture
def fresh():
    """Nothing is compiled yet."""
    # Not above: pytest reads this file before ../conftest.py can tell Triton to interpret.
    import torch

    from fxopt.backends import compiled_graphs

    torch._dynamo.reset()
    compiled_graphs.GRAPHS.clear()


@pytest.fixture
def attention_backends(monkeypatch):
    """`set_attention_backend` sets it for all models to come as well: not for other tests."""
    registry = importlib.import_module("diffusers.models.attention_dispatch")
    active = registry._AttentionBackendRegistry
    monkeypatch.setattr(active, "_active_backend", active._active_backend)
