"""Write fxopt ops out as the plain ATen of their references, for compilers that fuse it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxopt.kernels.registration import REFERENCES
from fxopt.passes import ir


def inline_native(gm: fx.GraphModule) -> None:
    """Replace every op with a reference by the ATen that the reference is made of, in place."""
    for body in ir.graphs(gm):
        for node in list(body.graph.nodes):
            reference = REFERENCES.get(node.target) if node.op == "call_function" else None
            if reference is not None:
                _inline(body.graph, node, reference)
        body.graph.eliminate_dead_code()
        body.recompile()


def _inline(graph: fx.Graph, node: fx.Node, reference: Callable[..., Any]) -> None:
    inputs = list(node.all_input_nodes)

    def run(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args = map_arg(node.args, lambda n: given[n])
        result = reference(*args)
        return result if isinstance(result, (tuple, list)) else (result,)

    values = [n.meta["val"] for n in inputs]
    with detect_fake_mode(values) or nullcontext():
        traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    copies: dict[fx.Node, fx.Node] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True)
    )
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                copies[inner] = graph.node_copy(inner, lambda n: copies[n])
                copies[inner].meta |= {
                    k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta
                }
    results = map_arg(traced.graph.output_node().args[0], lambda n: copies[n])
    results = pytree.tree_leaves(results)
    if not isinstance(node.meta["val"], (tuple, list)):
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        if user.target is operator.getitem and user.users:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)
