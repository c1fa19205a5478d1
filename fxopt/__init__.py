"""Fused kernels for the training of unmodified diffusion transformers.

Three doors to one catalogue: `optimize(model)`, `torch.compile(model, backend="fxopt")` and
`swap(model)`. The doors load when they are first used: `import fxopt` itself costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxopt.errors import FxoptError
from fxopt.recipes import Recipe
from fxopt.schedule import at_step

if TYPE_CHECKING:
    from fxopt.backends.eager import swap
    from fxopt.backends.exported import optimize
    from fxopt.backends.state import report, restore
    from fxopt.backends.telemetry import telemetry
    from fxopt.explanation import explain
    from fxopt.kernels.weight_casts import cast_weights_once

__version__ = "0.1.0"
__all__ = [
    "FxoptError",
    "Recipe",
    "at_step",
    "cast_weights_once",
    "explain",
    "optimize",
    "report",
    "restore",
    "swap",
    "telemetry",
]

_LAZY = {
    "cast_weights_once": "fxopt.kernels.weight_casts",
    "explain": "fxopt.explanation",
    "optimize": "fxopt.backends.exported",
    "report": "fxopt.backends.state",
    "restore": "fxopt.backends.state",
    "swap": "fxopt.backends.eager",
    "telemetry": "fxopt.backends.telemetry",
}
# A submodule is bound to its name at its first import, which is to be the function's.
importlib.import_module("fxopt.report")
globals().pop("report")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
