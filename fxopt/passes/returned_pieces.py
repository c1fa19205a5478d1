"""Pieces that a graph returns stay tensors of their own, which the caller may write in place."""

from __future__ import annotations

import operator

from torch import fx

from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.passes import ir
from fxopt.passes.ir import aten

# Ops whose backward does not read what they returned.
FORGETTING = (aten.add.Tensor, aten.addcmul.default, aten.cat.default)
# Key in the `meta` of a split: whether the model wrote slices.
WERE_SLICES = "fxopt_were_slices"


def free_returned_pieces(gm: fx.GraphModule) -> None:
    """Autograd refuses writes to the parts of a split, which a model that returned slices may make.

    Where nothing else reads the whole, the parts need not be known as views of it, and still have
    one kernel for their gradient; elsewhere they are slices again.
    """
    for body in ir.graphs(gm):
        _free_pieces(body.graph)
        body.recompile()


def _free_pieces(graph: fx.Graph) -> None:
    returned = returned_nodes(graph)
    for split in graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        parts = list(split.users)
        if not split.meta.get(WERE_SLICES) or returned.isdisjoint(parts):
            continue
        x, sizes, dim = split.args
        if len(x.users) == 1 and _is_forgotten(x):
            split.target = aten.unsafe_split_with_sizes.default
            continue
        for part in parts:
            start, end = (0, sizes[0]) if part.args[1] == 0 else (sizes[0], 2**63 - 1)
            part.target, part.args = aten.slice.Tensor, (x, dim, start, end)
        graph.erase_node(split)


def returned_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What the graph returns, and what that is a view of."""
    found: set[fx.Node] = set()
    stack = list(graph.output_node().all_input_nodes)
    while stack:
        node = stack.pop()
        found.add(node)
        if ir.is_call(node, *ir.VIEWS, aten.contiguous.default):
            stack.append(node.args[0])
    return found


def _is_forgotten(x: fx.Node) -> bool:
    producer = x.args[0] if ir.is_call(x, operator.getitem) else x
    if ir.is_call(producer, norm_modulate):
        return ir.arguments(producer)["norm"] == "none"
    return ir.is_call(producer, *FORGETTING)
