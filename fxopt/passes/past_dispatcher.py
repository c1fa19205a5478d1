"""Graphs that are run as they are: to convert their arguments takes the dispatcher a while."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

from fxopt.kernels.registration import ops


def past_dispatcher(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` that calls fxopt's ops as `registration.ops` has them."""
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        op = node.target
        if isinstance(op, OpOverload) and op.namespace == "fxopt" and not node.kwargs:
            node.target = getattr(ops, op._opname, op)
    return fx.GraphModule(gm, graph)
