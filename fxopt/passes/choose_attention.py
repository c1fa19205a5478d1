"""Attentions of a rewritten graph, on the backend that a recipe asks for.

It is the last pass: rules look for scaled_dot_product_attention, and find it as it came.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import fx

from fxopt.kernels.attention import Choice, attention, choose, named, steers
from fxopt.kernels.attention_backends import Call
from fxopt.passes import ir

NO_CALL = "it calls no scaled_dot_product_attention that {!r} could run"


def choose_attention(gm: fx.GraphModule, asked: str, target: str | None = None) -> list[Choice]:
    """Who runs each attention; where that may be another kernel than PyTorch's own choice, the
    node becomes `fxopt::attention`.

    A backend that is named and has nothing to run in the graph is a choice too, for the report.

    Args:
        asked: `Recipe.asked_attention`.
        target: a device that the graph is planned for and will not run on; nothing is changed.
    """
    choices = []
    for body in ir.graphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=ir.SDPA):
            arguments = ir.arguments(node)
            call: dict[str, Any] = {
                name: ir.tensor(a) if isinstance(a, fx.Node) else a for name, a in arguments.items()
            }
            choices.append(choose(asked, partial(Call.of, **call), target))
            if target is None and steers(asked, call["query"].device):
                in_order = (arguments[a.name] for a in ir.SDPA._schema.arguments)
                node.target, node.args, node.kwargs = attention, (*in_order, asked), {}
        body.recompile()
    if not choices and named(asked) is not None:
        choices.append(Choice("pytorch", NO_CALL.format(named(asked))))
    return choices
