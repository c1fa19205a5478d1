"""Pieces of a graph between two nodes."""

from __future__ import annotations

from torch import fx

from fxopt.passes import ir


def between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes on the paths from `start` to `end` in graph order, `end` included, `start` not."""
    depends: dict[fx.Node, bool] = {start: True}
    stack = [end]
    while stack:
        node = stack[-1]
        inputs = [i for i in node.all_input_nodes if i not in depends and i > start]
        if inputs:
            stack += inputs
            continue
        stack.pop()
        depends.setdefault(node, any(depends.get(i, False) for i in node.all_input_nodes))
    return sorted(n for n, yes in depends.items() if yes and n is not start)


def side_inputs(region: list[fx.Node], start: fx.Node) -> list[fx.Node]:
    """Tensors that enter `region` other than through `start`, in order of use."""
    members = {start, *region}
    sides = (i for n in region for i in n.all_input_nodes if i not in members)
    return [s for s in dict.fromkeys(sides) if ir.tensor(s) is not None]


def is_closed(region: list[fx.Node]) -> bool:
    """Whether only the last node of `region` is used outside of it."""
    members = set(region)
    return all(u in members for n in region[:-1] for u in n.users)
