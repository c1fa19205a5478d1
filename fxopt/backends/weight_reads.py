"""Which parameters of a captured graph reach nothing but quantized products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import fx
from torch.utils import _pytree as pytree

from fxopt.kernels.origins import cast
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.recipes import Recipe, find

Name = TypeVar("Name")
# A recipe by which all products of a weight read it, or what reads it otherwise.
Read = Recipe | str
CAST = "autocast casts it: let FSDP2's param_dtype do that"
QUANTIZED = tuple(
    f"fxopt.{name}{suffix}.default"
    for name in (
        "quantized_linears",
        "norm_modulate_quantized_linears",
        "norm_modulate_segments_quantized_linears",
        "gated_activation_quantized_linear",
    )
    for suffix in ("", "_streams")
)


def parameters_read(gm: fx.GraphModule, slots: Sequence[tuple[str, Any]]) -> dict[str, list[Read]]:
    """Who reads each of the parameters of `gm`, by FQN.

    Args:
        slots: what the leading placeholders are, as in `Plan`.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        target: [read for user in node.users for read in _reads_by(user, node)]
        for (kind, target), node in zip(slots, placeholders, strict=False)
        if kind == "parameter" and node.users
    }


def keep_origins(gm: fx.GraphModule) -> None:
    """Have casts that quantized products read know what they are casts of."""
    for body in ir.graphs(gm):
        casts = body.graph.find_nodes(op="call_function", target=aten.to.dtype)
        read = [c for c in casts if any(str(u.target) in QUANTIZED for u in c.users)]
        for node in read:
            named = ir.arguments(node)
            node.target, node.args, node.kwargs = cast, (named["self"], named["dtype"]), {}
        if read:
            body.recompile()


def merged(reads: Iterable[Read]) -> Read:
    """Several reads of one weight as one."""
    found = list(dict.fromkeys(reads))
    other = [read for read in found if isinstance(read, str)]
    if other or len(found) == 1:
        return other[0] if other else found[0]
    return "its products are of several recipes"


def quantized(reads: Iterable[Mapping[Name, Iterable[Read]]]) -> dict[Name, Read]:
    """The weights that any of several graphs or calls quantizes, and how all of them read those."""
    by_name: dict[Name, list[Read]] = {}
    for of_graph in reads:
        for name, of_weight in of_graph.items():
            by_name.setdefault(name, []).extend(of_weight)
    return {
        name: merged(found)
        for name, found in by_name.items()
        if any(isinstance(read, Recipe) for read in found)
    }


def _reads_by(user: fx.Node, weight: fx.Node) -> Iterator[Read]:
    if ir.is_call(user, cast) or ir.skip_casts(user) is weight:
        through = {read for other in user.users for read in _reads_by(other, user)}
        if any(isinstance(read, Recipe) for read in through):
            yield from (read for read in through if isinstance(read, Recipe))
            yield CAST
            return
    if str(user.target) in QUANTIZED:
        given = ir.arguments(user)
        recipe = find(given.pop("recipe"))
        weights = pytree.tree_leaves(given.pop("weights", None) or given.pop("weight"))
        if weight in weights and weight not in pytree.tree_leaves(list(given.values())):
            yield recipe
            return
    yield f"{user.target} reads it as well"
