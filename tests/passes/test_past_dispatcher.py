"""Graphs that are run as they are: fxopt's ops are functions in them, and nothing else changes."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxopt.kernels.registration import ops
from fxopt.passes.past_dispatcher import past_dispatcher


def graph() -> fx.GraphModule:
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        settings = "none", 0.0, 0.0, 0.0, torch.float32, torch.float32
        _, h, _, _ = torch.ops.fxopt.norm_modulate.default(
            x, x, None, None, None, None, None, weight, *settings
        )
        return torch.ops.aten.relu.default(h), h

    return fx.symbolic_trace(forward)


def test_only_ops_of_fxopt_are_called_in_another_way():
    gm = graph()
    before = [n.target for n in gm.graph.nodes]
    found = past_dispatcher(gm)
    op = torch.ops.fxopt.norm_modulate.default
    assert before.count(op) == 1 and [n.target for n in gm.graph.nodes] == before
    expected = [ops.norm_modulate if target is op else target for target in before]
    assert [n.target for n in found.graph.nodes] == expected
    given = torch.randn(2, 3, 8), torch.randn(8)
    assert all(map(torch.equal, found(*given), gm(*given)))


def test_calls_by_keyword_stay_as_they_are():
    gm = graph()
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fxopt.norm_modulate.default)
    node.args, node.kwargs = node.args[:-1], {"dtype": torch.float32}
    found = past_dispatcher(gm)
    assert [n.target for n in found.graph.nodes] == [n.target for n in gm.graph.nodes]
