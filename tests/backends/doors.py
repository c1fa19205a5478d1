"""The doors that need no compiler, for tests of what holds for both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import fxopt

DOORS: dict[str, Callable[..., nn.Module]] = {"optimize": fxopt.optimize, "swap": fxopt.swap}
doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
