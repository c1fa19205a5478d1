"""What runs under torch.func's transforms (vmap, grad, jvp) as one node of Dynamo's graph.

Their tensors are wrapped and their ops not those of the IR. As the body of a `wrap`, which only
runs it, such a stretch stays as it came, and the rest of the graph can be retraced.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch
from torch._higher_order_ops.wrap import wrap


class Transformed(torch.nn.Module):
    """A stretch of a graph. No GraphModule: in one, nobody seems to use that a level is entered."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Any) -> Any:
        return self.body(*inputs)


def _named(ending: str) -> frozenset[Any]:
    """The functions by which the level of a transform is entered or left, for Dynamo and in C++."""
    modules = (predispatch, torch._C._functorch)
    return frozenset(getattr(m, n) for m in modules for n in dir(m) if n.endswith(ending))


ENTER, LEAVE = _named("_increment_nesting"), _named("_decrement_nesting")


def outline_transforms(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` itself if it has none, or a copy with a node for each outermost transform."""
    if not any(n.target in ENTER for n in gm.graph.nodes):
        return gm
    names = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    attributes = {name: operator.attrgetter(name)(gm) for name in names}
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    stretch: list[fx.Node] = []
    depth = 0
    for node in gm.graph.nodes:
        depth += (node.target in ENTER) - (node.target in LEAVE)
        if depth > 0 or stretch:
            stretch.append(node)
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        if stretch and depth == 0:
            name = f"transformed_{len(attributes)}"
            attributes[name] = _outline(gm, stretch, name, graph, copies)
            stretch = []
    outlined = fx.GraphModule(attributes, graph)
    outlined.meta = gm.meta
    return outlined


def _outline(
    gm: fx.GraphModule,
    stretch: list[fx.Node],
    name: str,
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
) -> Transformed:
    """Write a call of the body `name` into `graph`; the body, made of the nodes of `stretch`."""
    inside = set(stretch)
    inputs = list(dict.fromkeys(i for n in stretch for i in n.all_input_nodes if i not in inside))
    outputs = [n for n in stretch if any(u not in inside for u in n.users)]
    body = fx.Graph()
    own = {n: body.placeholder(n.name) for n in inputs}
    for node in stretch:
        own[node] = body.node_copy(node, lambda n: own[n])
    body.output(tuple(own[n] for n in outputs))
    called = graph.call_function(wrap, (graph.get_attr(name), *(copies[n] for n in inputs)))
    called.meta = {k: v for k, v in stretch[0].meta.items() if k != "example_value"}
    for index, node in enumerate(outputs):
        copies[node] = graph.call_function(operator.getitem, (called, index))
    return Transformed(fx.GraphModule(gm, body))
