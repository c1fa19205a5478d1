"""What a rule would replace if the model did not write in place.

Regions with writes are left as they are. So that this is said, each graph that writes has a twin
that does not, on which the rules are asked again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import fx

from fxopt.passes import ir
from fxopt.passes.legality import obstacles, region
from fxopt.passes.rule import Binding, Reason, Rule

REMEDY = "write it out of place: autograd keeps what it needs either way"


def blocked(gm: fx.GraphModule, rules: Sequence[Rule]) -> dict[str, dict[fx.Node, Reason]]:
    """By rule and anchor of `gm`, the write without which the rule would have a region there."""
    found: dict[str, dict[fx.Node, Reason]] = defaultdict(dict)
    if not any(ir.mutates(n) for n in gm.graph.nodes):
        return found
    twin, originals = _without_writes(gm)
    for rule in rules:
        for node in twin.nodes:
            if node.op == "call_function" and node.target in rule.anchors:
                write = _write_inside(twin, rule, node, originals)
                if write is not None:
                    why = f"{write.target} writes in place"
                    found[rule.name][originals[node]] = Reason(why, write, REMEDY)
    return found


def _write_inside(
    twin: fx.Graph, rule: Rule, anchor: fx.Node, originals: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    for proposal in rule.propose(anchor):
        if isinstance(proposal, Binding) and not obstacles(twin, proposal):
            writes = (originals[n] for n in sorted(region(proposal)[0]) if n in originals)
            return next((w for w in writes if ir.mutates(w)), None)
    return None


def _without_writes(gm: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The graph with each write as the op that it is out of place, where there is one; by node of
    this twin the node of `gm`. Readers of a view that was taken before a write read what was there
    before, so the twin is to be looked at, not to be run.
    """
    twin = fx.Graph(gm)
    copies: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, fx.Node] = {}

    def current(node: fx.Node) -> fx.Node:
        while node in written:
            node = written[node]
        return copies[node]

    for node in gm.graph.nodes:
        copies[node] = twin.node_copy(node, current)
        op = _out_of_place(node)
        if op is not None:
            copies[node].target = op
            written[node.args[0]] = node
    return twin, {copy: node for node, copy in copies.items()}


def _out_of_place(node: fx.Node) -> Any:
    """The op that computes what `node` writes over its first argument; None if there is none."""
    if not ir.mutates(node) or ir.written(node) != [node.args[0]]:
        return None
    packet, _, overload = str(node.target).removeprefix("aten.").rpartition(".")
    named = getattr(ir.aten, packet.removesuffix("_"), None)
    op = getattr(named, overload, None)
    if op is None or op is node.target or ir.tensor(node) is None:
        return None
    return op
