"""The least glue traffic that fusion can reach, from AOTAutograd's graphs of a block.

The block's joint graph is cut by the min-cut partitioner. Then every connected region of glue in
the forward and in the backward graph counts as one perfect kernel, which reads each tensor from
outside once and writes each tensor that is used outside once. No compiler reaches that everywhere:
regions join through reductions over different dims.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from fxopt.fakes import faked
from fxopt.traffic import kind


@dataclass(frozen=True)
class Floor:
    """Bytes of glue under perfect fusion, and bytes that min-cut keeps for backward.

    `saved` leaves out parameters and the block's own inputs, which min-cut takes to be kept anyway.
    """

    glue: int
    saved: int


class Source(NamedTuple):
    """A tensor behind views: output `position` of `node`, or its only output."""

    node: fx.Node
    position: int | None


def count(block: nn.Module, inputs: dict[str, Any], num_outputs: int) -> Floor:
    """Trace the block on fake tensors, partition and count.

    Args:
        block: on any device, meta included.
        inputs: keyword arguments of its forward.
        num_outputs: tensors that its forward returns.
    """
    graphs: list[fx.Graph] = []

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)
        graphs.extend((forward.graph, backward.graph))
        return forward, backward

    def call(parameters: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
        return functional_call(block, parameters, kwargs=inputs)

    traced = aot_function(call, lambda graph, _: graph, lambda graph, _: graph, partition)
    with faked(block, (), inputs) as (_, fake_inputs):
        traced(dict(block.named_parameters()), fake_inputs)
    forward, backward = graphs
    return Floor(fused_bytes(forward) + fused_bytes(backward), saved_bytes(forward, num_outputs))


def fused_bytes(graph: fx.Graph) -> int:
    """Bytes that cross the border between the graph's glue and everything else."""
    region = regions(graph)
    reads: dict[tuple[fx.Node, Source], int] = {}
    writes: dict[Source, int] = {}
    for node in graph.nodes:
        if is_view(node):
            continue
        for argument in node.all_input_nodes:
            read = source(argument)
            if node in region and read.node not in region:
                key = (region[node], read)
                size = min(num_bytes(read), num_bytes(Source(argument, None)))
                reads[key] = max(reads.get(key, 0), size)
            elif node not in region and read.node in region:
                writes[read] = num_bytes(read)
    return sum(reads.values()) + sum(writes.values())


def regions(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each glue node with one representative of its connected region."""
    parent: dict[fx.Node, fx.Node] = {node: node for node in graph.nodes if is_glue(node)}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in parent:
        for argument in node.all_input_nodes:
            producer = source(argument).node
            if producer in parent:
                parent[find(node)] = find(producer)
    return {node: find(node) for node in parent}


def saved_bytes(forward: fx.Graph, num_outputs: int) -> int:
    """Bytes of what the forward graph returns beyond the block's outputs."""
    returned: Any = forward.output_node().args[0]
    saved = {source(node) for node in returned[num_outputs:] if isinstance(node, fx.Node)}
    return sum(num_bytes(tensor) for tensor in saved if tensor.node.op != "placeholder")


def source(node: fx.Node) -> Source:
    """The tensor that `node` is a view of."""
    while is_view(node):
        viewed: Any = node.args[0]
        if node.target is operator.getitem and not is_view(viewed):
            position: Any = node.args[1]
            return Source(viewed, position)
        node = viewed
    return Source(node, None)


def is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or kind_of(node) == "view"


def is_glue(node: fx.Node) -> bool:
    """Whether fusion may take the node; a fill is part of the kernel that uses it."""
    return kind_of(node) in ("glue", "allocation")


def kind_of(node: fx.Node) -> str | None:
    return kind(node.target) if isinstance(node.target, OpOverload) else None


def num_bytes(tensor: Source) -> int:
    value: Any = tensor.node.meta.get("val")
    if tensor.position is not None:
        value = value[tensor.position]
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))
