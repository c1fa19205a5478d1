"""Where in a graph of Dynamo's autograd is off: what computes the same there is not the same."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.passes import ir


def grad_modes(graph: fx.Graph) -> dict[fx.Node, bool | None]:
    """For each node whether it runs with gradients; None where that is up to the caller."""
    found: dict[fx.Node, bool | None] = {}
    mode: bool | None = None
    for node in graph.nodes:
        if ir.is_call(node, torch._C._set_grad_enabled):
            mode = bool(node.args[0])
        found[node] = mode
    return found
