"""Fused kernels for the training of unmodified diffusion transformers."""

from fxopt.backends.exported import optimize
from fxopt.backends.state import report, restore
from fxopt.errors import FxoptError
from fxopt.recipes import Recipe
from fxopt.report import Report

__version__ = "0.1.0"
__all__ = ["FxoptError", "Recipe", "Report", "optimize", "report", "restore"]
