"""Heads that a model has transposed for its attention are read as they were before."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.passes import ir
from fxopt.passes.ir import aten


def cancel_permutes(graph: fx.Graph) -> None:
    """Take out permutes that only undo a transposition, or another permute."""
    for node in graph.find_nodes(op="call_function", target=aten.permute.default):
        before, dims = node.args
        inner = _dims(before)
        if inner is not None and [inner[dim] for dim in dims] == list(range(len(inner))):
            node.replace_all_uses_with(before.args[0])
            graph.erase_node(node)


def _dims(node: Any) -> list[int] | None:
    """Which dim of its input each dim of a permute or a transposition is; None of anything else."""
    num_dims = len(ir.shape(node))
    if ir.is_call(node, aten.permute.default):
        return [dim % num_dims for dim in node.args[1]]
    if not ir.is_call(node, aten.transpose.int):
        return None
    found = list(range(num_dims))
    i, j = node.args[1:]
    found[i], found[j] = j % num_dims, i % num_dims
    return found
