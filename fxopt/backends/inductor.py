"""Hand a rewritten graph to Inductor, with caches that know the catalogue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxopt import kernels, recipes
from fxopt.errors import UnknownOption, nearest
from fxopt.passes.rules import CATALOGUE


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    settings: dict[str, Any],
) -> Callable[..., Any]:
    """Compile `gm` with Inductor under `mode` and `settings`, which patch its configuration."""
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **settings}
    installed = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    patches["joint_custom_pre_pass"] = CatalogueIdentity(installed)
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return cast("Callable[..., Any]", compiled)


def check_options(names: Iterable[str], own: Sequence[str]) -> None:
    """Raise UnknownOption on a name that Inductor's configuration does not have, nor `own`."""
    from torch._inductor import list_options

    known = list_options()
    for name in names:
        if name not in known:  # of which there are hundreds
            raise UnknownOption(name, [*own, *nearest(name, known)])


class CatalogueIdentity(CustomGraphPass):
    """Changes nothing but the key of Inductor's and AOTAutograd's caches.

    The caches know the graph, not the Python behind an op's backward: without this, a graph
    compiled before a backward was changed would go on with the old gradients.
    """

    def __init__(self, installed: Any = None) -> None:
        self.installed = installed

    def __call__(self, graph: fx.Graph) -> None:
        if self.installed is not None:
            self.installed(graph)

    def uuid(self) -> Any:
        inner = self.installed.uuid() if self.installed is not None else None
        return (catalogue_hash(), inner)


@cache
def catalogue_hash() -> str:
    """Hash of the rules' versions and of the source of all kernels and recipes."""
    digest = hashlib.sha256(torch.__version__.encode())
    for rule in CATALOGUE:
        digest.update(f"{rule.name}:{rule.version}".encode())
    for path in [Path(recipes.__file__), *sorted(Path(kernels.__file__).parent.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
