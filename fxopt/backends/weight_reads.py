"""Which parameters of a captured graph reach nothing but quantized products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import fx
from torch.utils import _pytree as pytree

from fxopt.passes import ir
from fxopt.recipes import Recipe, find

Name = TypeVar("Name")
# A recipe by which all products of a weight read it, or what reads it otherwise.
Read = Recipe | str
QUANTIZED = (
    "fxopt.quantized_linears.default",
    "fxopt.norm_modulate_quantized_linears.default",
    "fxopt.gated_activation_quantized_linear.default",
)


def parameters_read(gm: fx.GraphModule, slots: Sequence[tuple[str, Any]]) -> dict[str, Read]:
    """How `gm` reads each of its parameters, by FQN.

    Args:
        slots: what the leading placeholders are, as in `Plan`.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        target: merged(_read_by(user, node) for user in node.users)
        for (kind, target), node in zip(slots, placeholders, strict=False)
        if kind == "parameter" and node.users
    }


def merged(reads: Iterable[Read]) -> Read:
    """Several reads of one weight as one."""
    found = list(dict.fromkeys(reads))
    other = [read for read in found if isinstance(read, str)]
    if other or len(found) == 1:
        return other[0] if other else found[0]
    return "its products are of several recipes"


def quantized(reads: Iterable[Mapping[Name, Read]]) -> dict[Name, Read]:
    """The weights that any of several graphs or calls quantizes, and how all of them read those."""
    by_name: dict[Name, list[Read]] = {}
    for of_graph in reads:
        for name, read in of_graph.items():
            by_name.setdefault(name, []).append(read)
    return {
        name: merged(found)
        for name, found in by_name.items()
        if any(isinstance(read, Recipe) for read in found)
    }


def _read_by(user: fx.Node, weight: fx.Node) -> Read:
    if str(user.target) in QUANTIZED:
        given = ir.arguments(user)
        recipe = find(given.pop("recipe"))
        weights = given.pop("weights", None) or [given.pop("weight")]
        if weight in weights and weight not in pytree.tree_leaves(list(given.values())):
            return recipe
    return f"{user.target} reads it as well"
