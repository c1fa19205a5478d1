"""What kernels take in tuples, so that Triton 3.6 compiles them as later ones do."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import fxopt.kernels
from fxopt.kernels.triton_sizes import LAST

pytest.importorskip("triton", reason="needs Triton")
MODULES = sorted(path.stem for path in Path(fxopt.kernels.__path__[0]).glob("triton_*.py"))
# Tuples without None.
WHOLE = {
    *("BLOCKS", "sums", "parts of sum_kernel", "matrices"),
    *("pieces of load_pieces", "rows of load", "t of load", "t of _operand_tile"),
}


def functions(name: str) -> list[ast.FunctionDef]:
    """Those that Triton compiles."""
    tree = ast.parse(inspect.getsource(import_module(f"fxopt.kernels.{name}")))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [f for f in found if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


@pytest.mark.parametrize("name", MODULES)
def test_kernels_ask_for_no_length_of_a_tuple_that_may_hold_none(name: str) -> None:
    for function in functions(name):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
                asked = ast.unparse(node.args[0])
                assert {asked, f"{asked} of {function.name}"} & WHOLE, function.name


@pytest.mark.parametrize(
    "where",
    [
        *("gated_activation_kernels.Forward", "gated_activation_kernels.Backward"),
        *("norm_modulate_kernels.Forward", "norm_modulate_sums.Reduce"),
        *("norm_modulate_quantize_kernels.Stream", "qk_norm_rope_kernels.Inputs"),
        "quantize_group.Part",
    ],
)
def test_tuples_of_tuples_end_with_a_constant(where: str) -> None:
    module, name = where.split(".")
    kind = getattr(import_module(f"fxopt.kernels.triton_{module}"), name)
    assert kind._field_defaults[kind._fields[-1]] is LAST
