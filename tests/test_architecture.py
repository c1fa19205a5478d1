"""Who may import whom, what `import fxopt` costs, and how long files and functions get."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxopt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fxopt"
# A layer may import itself and what stands before it.
LAYERS = ("kernels", "passes", "backends")
# Extras, and Triton, which only its provider needs.
LAZY = (
    *("diffusers", "transformers", "torchao", "triton", "peft"),
    *("matplotlib", "sklearn", "rich", "pydantic"),
)
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*FILES, *sorted((ROOT / "bench").rglob("*.py"))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(node: ast.AST) -> Iterator[str]:
    """Modules that the code imports, at any depth; imports for type checkers aside."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the whole path"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


def layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "fxopt" and len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_dependencies_point_from_backends_to_passes_to_kernels(path: Path):
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:
        return  # the leaves and the command line stand beside the layers
    upward = LAYERS[LAYERS.index(own) + 1 :]
    found = [name for name in imports(ast.parse(path.read_text())) if layer(name) in upward]
    assert not found, f"{own} imports {found}"


@pytest.mark.parametrize(
    "name",
    [
        *("recipes", "gemms", "schedule", "roles", "recipe_errors", "torchao_recipes"),
        *("report", "errors", "hardware", "cost", "all_gather"),
    ],
)
def test_leaves_import_no_layer(name: str):
    found = list(imports(ast.parse((PACKAGE / f"{name}.py").read_text())))
    assert not [module for module in found if layer(module)]


def test_nothing_lazy_is_imported_at_the_top_of_a_file():
    for path in FILES:
        if path.name.startswith("triton_") or "demo" in path.parts:
            continue  # imported by the provider alone, by the demo alone
        tree = ast.parse(path.read_text())
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        found = [m for m in imports(ast.Module(top, [])) if m.split(".")[0] in LAZY]
        assert not found, f"{relative(path)} imports {found}"


def loaded(statement: str) -> set[str]:
    """Modules in a fresh interpreter after `statement`."""
    code = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(result.stdout))


def test_the_public_names_are_ten_at_most():
    assert len(fxopt.__all__) <= 10
    assert all(hasattr(fxopt, name) for name in fxopt.__all__)


def test_importing_fxopt_loads_little_more_than_torch():
    added = loaded("import fxopt") - loaded("import torch, torch.utils.flop_counter")
    heavy = sorted(m for m in added if m.split(".")[0] in LAZY)
    assert not heavy
    # A third of torch's own modules would show in the time; this is 1 in 20.
    assert len(added) < 0.05 * len(loaded("import torch")), sorted(added)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_short(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
