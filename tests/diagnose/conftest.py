"""Fixtures of several tests of measurement."""

import pytest

from fxopt.presets import PRESETS, Preset
from tests.diagnose import small_block


@pytest.fixture
def small(monkeypatch):
    """A preset of this name: the narrow block."""
    monkeypatch.setitem(PRESETS, "small", Preset("small", 64, 64, small_block.blocks))
