"""Fixtures of several tests of measurement."""

import pytest


@pytest.fixture
def small(monkeypatch):
    """A preset of this name: the narrow block."""
    # Not above: pytest reads this file before ../conftest.py can tell Triton to interpret.
    from fxopt.presets import PRESETS, Preset
    from tests.diagnose import small_block

    monkeypatch.setitem(PRESETS, "small", Preset("small", 64, 64, small_block.blocks))
