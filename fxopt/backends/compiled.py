"""`optimize(execution="compile")`: each block compiled in place by the second door.

In place means `module.compile`: an `OptimizedModule` wrapper around a block would make FSDP2 skip
its hooks, and would change the keys of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxopt.backends import state
from fxopt.backends.dynamo import backend
from fxopt.recipes import Recipe
from fxopt.report import Declined, Report


class CompiledBlocks:
    """One use of `optimize(execution="compile")` on a model."""

    forwards = ()

    def __init__(self, settings: state.Settings, outside: tuple[Declined, ...]) -> None:
        self.settings = settings
        recipe, blocks = settings.recipe, settings.blocks
        self.empty = Report("optimize", recipe.name, "cpu", declined=outside)
        self.reports: dict[str, list[Report]] = {fqn: [] for fqn in blocks}
        self.blocks = dict(blocks)
        self.replaced = {fqn: m._compiled_call_impl for fqn, m in blocks.items()}
        for fqn, module in blocks.items():
            module.compile(backend=_backend_for(recipe, fqn, self.reports[fqn]))

    def restore(self, model: nn.Module) -> None:
        for fqn, module in self.blocks.items():
            module._compiled_call_impl = self.replaced[fqn]

    def report(self) -> Report:
        merged = self.empty
        for fqn, reports in self.reports.items():
            kind = type(self.blocks[fqn]).__name__
            # A block recompiled for other sizes is still one block: the last graph counts.
            for report in reports[-1:]:
                merged = merged.merge(state.with_fqn(report, fqn, kind))
        return merged


def _backend_for(recipe: Recipe, fqn: str, reports: list[Report]) -> Callable[..., Any]:
    def compile_block(gm: Any, example_inputs: Any, **settings: Any) -> Any:
        options = {"recipe": recipe}
        return backend(gm, example_inputs, options=options, reports=reports, block=fqn, **settings)

    return compile_block
