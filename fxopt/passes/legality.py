"""Whether a region may be replaced: who else reads it, who writes it, what it is computed from.

Asked once for all rules and all doors; that it also computes the same is for `prove`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxopt.passes import ir
from fxopt.passes.rule import Binding, Reason


def obstacles(
    graph: fx.Graph, binding: Binding, parameters: frozenset[str] = frozenset()
) -> list[Reason]:
    """All structural reasons why the region of `binding` may not be replaced.

    Args:
        parameters: names of placeholders that are trained.
    """
    found, reasons = region(binding)
    outputs, inputs = set(binding.outputs), set(binding.inputs)
    kept = _kept(found, inputs | outputs)
    inner = found - kept - set(binding.stays)
    segments = ir.segments(graph)
    for node in sorted(inner - outputs):
        strangers = [u for u in node.users if u not in found]
        if strangers and ir.tensor(node) is not None:
            why = f"{node.name} is also used by {strangers[0].name} ({strangers[0].target})"
            reasons.append(Reason(why, node))
    reasons += _overwritten(graph, binding, found)
    if len({segments[n] for n in found - kept}) > 1:
        why = "a write, a random number or a change of grad mode stands inside the region"
        reasons.append(Reason(why, binding.anchor))
    after = _descendants(inner) - found
    if after & inputs:
        reasons.append(Reason("an input of the region depends on its output", binding.anchor))
    for node in binding.constants:
        learned = placeholders(node) & parameters
        if learned:
            why = f"{sorted(learned)[0]} is trained, and the op gives it no gradient"
            reasons.append(Reason(why, node, "freeze it, or leave this region as it is"))
    return reasons


def region(binding: Binding) -> tuple[set[fx.Node], list[Reason]]:
    """The nodes between the binding's inputs and outputs, and what it reads unannounced."""
    found: set[fx.Node] = set()
    reasons: list[Reason] = []
    stack = list(binding.outputs)
    while stack:
        node = stack.pop()
        if node in found or node in binding.inputs or is_size(node):
            continue
        if node.op == "placeholder":
            reasons.append(Reason(f"the region also reads {node.name}", node))
            continue
        found.add(node)
        stack += node.all_input_nodes
    return found, reasons


def _overwritten(graph: fx.Graph, binding: Binding, region: set[fx.Node]) -> list[Reason]:
    """What is read at the anchor, or moved ahead of it, is not written before or after."""
    writes = [(w, ir.memory(t)) for w in graph.nodes for t in ir.written(w)]
    if not writes:
        return []
    read = {*region, *binding.inputs, *binding.outputs}
    stack = [i for i in binding.inputs if i > binding.anchor]
    while stack:
        sources = set(stack.pop().all_input_nodes) - read
        read |= sources
        stack += [i for i in sources if i > binding.anchor]
    reasons = []
    for node in sorted(read):
        memory = ir.memory(node)
        later = next((w for w, written in writes if written is memory and w > node), None)
        if later is not None:
            reasons.append(Reason(f"{node.name} is written in place by {later.name}", node))
        elif ir.mutates(node) and (node in region or node > binding.anchor):
            reasons.append(Reason(f"{node.target} writes in place", node))
    return reasons


def _kept(region: set[fx.Node], ends: set[fx.Node]) -> set[fx.Node]:
    """What stays for others at next to no cost: casts, views, one row per sample."""
    kept: set[fx.Node] = set()
    for node in sorted(region - ends):
        if all(i in ends or i in kept or is_size(i) for i in node.all_input_nodes) and (
            ir.is_call(node, *ir.CASTS, *ir.VIEWS) or _is_row(node)
        ):
            kept.add(node)
    return kept


def _is_row(node: fx.Node) -> bool:
    sizes = ir.shape(node) if ir.tensor(node) is not None else ()
    return bool(sizes) and (len(sizes) < 3 or ir.same(sizes[-2], 1)) and not ir.mutates(node)


def is_size(node: fx.Node) -> bool:
    """Whether `node` computes a size, not a tensor."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack.append(user)
    return found


def placeholders(node: fx.Node) -> set[str]:
    """Names of the placeholders that `node` is computed from."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found.add(str(current.target))
        stack += [i for i in current.all_input_nodes if not is_size(i)]
    return found
