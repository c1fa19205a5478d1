"""Propose, check, prove, replace, count: one loop for all rules and all doors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.node import map_aggregate, map_arg

from fxopt.kernels.attention import Choice
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.registration import provider
from fxopt.passes import ir, writes
from fxopt.passes.autocast import suspended
from fxopt.passes.legality import is_size, obstacles, placeholders, region
from fxopt.passes.meter import Meter
from fxopt.passes.prove import Runnable, Sizes, Spec, prove
from fxopt.passes.rule import Binding, Reason, Rule
from fxopt.passes.symbols import node_of
from fxopt.passes.windows import link_bodies
from fxopt.report import Applied, Attention, Declined, Report


@dataclass
class Outcome:
    """What a rewrite did to a graph, and what the graph now relies on."""

    applied: list[Applied] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    # Placeholders that must not require a gradient: the ops that read them produce none.
    constants: set[str] = field(default_factory=set)
    # Who runs the attentions of the graph.
    attentions: list[Choice] = field(default_factory=list)

    def report(self, door: str, recipe: str, target: str) -> Report:
        """The report on this one graph."""
        attentions = tuple(Attention(*choice, "") for choice in dict.fromkeys(self.attentions))
        applied, declined = tuple(self.applied), tuple(self.declined)
        return Report(door, recipe, target, applied, declined, attentions=attentions)


def rewrite(
    gm: fx.GraphModule,
    rules: Sequence[Rule],
    *,
    device: torch.device,
    parameters: frozenset[str] = frozenset(),
    meter: Meter | None = None,
    capability: tuple[int, int] | None = None,
) -> Outcome:
    """Apply `rules` in order to `gm` and the bodies in it, in place.

    Args:
        gm: a canonical graph whose nodes carry FakeTensors.
        rules: the catalogue, or part of it.
        device: where the graph will run; decides the provider.
        parameters: names of placeholders that are trained.
        meter: of `gm`, to say what each substitution saves; None to leave that open.
        capability: of a device that is not there, as `provider` takes it.
    """
    outcome = Outcome()
    if meter is not None:
        meter.read()
    link_bodies(gm)
    # The graph's casts are written out; probes are run on the CPU, whatever the default device.
    with suspended(device.type), torch.device("cpu"):
        for body in ir.graphs(gm):
            rewriter = _Rewriter(body, device, parameters, outcome, meter, capability)
            blocked = writes.blocked(body, rules)
            for rule in rules:
                rewriter.apply(rule, blocked.get(rule.name, {}))
            rewriter.finish()
    return outcome


class _Rewriter:
    def __init__(
        self,
        gm: fx.GraphModule,
        device: torch.device,
        parameters: frozenset[str],
        outcome: Outcome,
        meter: Meter | None,
        capability: tuple[int, int] | None,
    ) -> None:
        self.gm, self.graph, self.device, self.capability = gm, gm.graph, device, capability
        self.parameters, self.outcome, self.meter = parameters, outcome, meter
        self.fake_mode = detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes])
        self.sizes = Sizes(gm.graph.nodes)
        self.standing: list[tuple[Applied, tuple[fx.Node, ...]]] = []

    def apply(self, rule: Rule, blocked: Mapping[fx.Node, Reason]) -> None:
        missed: list[tuple[fx.Node, list[Reason]]] = []
        for node in list(self.graph.nodes):
            is_anchor = node.op == "call_function" and node.target in rule.anchors
            reasons = self.apply_at(rule, node) if is_anchor else []
            if not reasons and node in blocked:
                reasons = [blocked[node]]
            if reasons:
                missed.append((node, reasons))
        if rule.finish is not None:
            rule.finish(self.graph)
        ir.eliminate_dead_code(self.graph)
        if rule.finish is not None and self.meter is not None:
            self.meter.read()
        alive = set(self.graph.nodes)
        self.outcome.declined += [_declined(rule, n, r) for n, r in missed if n in alive]

    def apply_at(self, rule: Rule, node: fx.Node) -> list[Reason]:
        """Replace all that `rule` finds at `node`; the reasons why more was not."""
        while node.users:
            reasons: list[Reason] = []
            for proposal in rule.propose(node):
                if isinstance(proposal, Reason):
                    reasons.append(proposal)
                    continue
                found = obstacles(self.graph, proposal, self.parameters) or self.disprove(proposal)
                if not found:
                    self.replace(rule, proposal)
                    break
                reasons += found
            else:
                return reasons
        return []  # the anchor was part of what was replaced

    def disprove(self, binding: Binding) -> list[Reason]:
        """Run the region and the replacement; the reason why they differ, or nothing."""
        if binding.regroups:
            return []
        original, replacement = self.extract(binding), self.build(binding)
        constants = set(binding.constants)
        specs = []
        for node in binding.inputs:
            value = ir.tensor(node)
            assert value is not None
            shape = tuple(self.sizes(s) for s in value.shape)
            specs.append(Spec(shape, value.dtype, ir.is_floating(node) and node not in constants))
        verdict = prove(original, replacement, specs)
        return [Reason(verdict, binding.anchor)] if verdict else []

    def extract(self, binding: Binding) -> Runnable:
        """The region as a graph of its own, symbolic sizes made concrete."""
        members, _ = region(binding)
        graph = fx.Graph()
        copies = {n: graph.placeholder(f"input_{i}") for i, n in enumerate(binding.inputs)}

        def argument(node: fx.Node) -> Any:
            return self.sizes(node.meta["val"]) if is_size(node) else copies[node]

        for node in self.graph.nodes:
            if node in members:
                copy = graph.node_copy(node, lambda n: n)
                copy.args = map_arg(node.args, argument)
                copy.kwargs = map_arg(node.kwargs, argument)
                copies[node] = copy
        graph.output(tuple(copies[n] for n in binding.outputs))
        return Runnable(self.gm, graph)

    def build(self, binding: Binding) -> Runnable:
        """The replacement as a graph of its own."""
        graph = fx.Graph()
        inputs = [graph.placeholder(f"input_{i}") for i in range(len(binding.inputs))]

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            def argument(value: Any) -> Any:
                if isinstance(value, fx.Node):
                    return self.sizes(value.meta["val"]) if value.graph is self.graph else value
                return self.sizes(value) if isinstance(value, torch.SymInt) else value

            return graph.call_function(target, map_aggregate(args, argument), kwargs)

        graph.output(_as_tuple(binding.emit(call, *inputs)))
        return Runnable(self.gm, graph)

    def replace(self, rule: Rule, binding: Binding) -> None:
        anchor = binding.anchor
        members, _ = region(binding)

        def argument(value: Any) -> Any:
            is_size = isinstance(value, torch.SymInt)
            return node_of(value, self.graph, call) if is_size else value

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            args = map_aggregate(args, argument)
            node = self.graph.call_function(target, args, kwargs)
            node.meta = {
                k: anchor.meta[k] for k in ("nn_module_stack", "stack_trace") if k in anchor.meta
            }
            values = map_arg(args, lambda n: n.meta["val"])
            # Shapes and dtypes are the same in all formats, and a capture is of no step. The C++ of
            # a linear without a bias would take sizes for numbers in PyTorch 2.11.
            fake_mode = self.fake_mode or nullcontext()
            with fake_mode, enable_python_dispatcher(), torch.no_grad(), high_precision():
                node.meta["val"] = target(*values, **kwargs)
            return node

        with self.graph.inserting_before(anchor):
            replacements = _as_tuple(binding.emit(call, *binding.inputs))
        for old, new in zip(binding.outputs, replacements, strict=True):
            new.meta = {**old.meta, **new.meta}
            old.replace_all_uses_with(new)
        ir.toposort(self.graph)
        ir.eliminate_dead_code(self.graph)
        for node in binding.constants:
            self.outcome.constants |= placeholders(node)
        applied = Applied(
            rule=rule.name,
            fqn=ir.fqn(anchor),
            count=binding.count,
            provider=provider(binding.op, self.device, self.capability),
            tier=rule.tier,
            source=ir.source(anchor),
        )
        carried = set(binding.carries)
        self.standing = [
            (a, replacements if carried & set(nodes) else nodes) for a, nodes in self.standing
        ]
        alive = set(self.graph.nodes)
        taken = [a for a, nodes in self.standing if not alive & set(nodes)]
        self.standing = [(a, nodes) for a, nodes in self.standing if alive & set(nodes)]
        if self.meter is not None:
            applied = self.meter.credit(applied, members, taken)
        self.standing.append((applied, replacements))

    def finish(self) -> None:
        """Record what still stands: a later rule may have taken an earlier one's op in."""
        ir.eliminate_dead_code(self.graph)
        self.gm.recompile()
        alive = set(self.graph.nodes)
        self.outcome.applied += [a for a, nodes in self.standing if alive & set(nodes)]


def _declined(rule: Rule, node: fx.Node, reasons: Sequence[Reason]) -> Declined:
    unique = dict.fromkeys(r.why for r in reasons)
    remedy = next((r.remedy for r in reasons if r.remedy), "")
    return Declined(rule.name, ir.fqn(node), node.name, ir.source(node), tuple(unique), remedy)


def _as_tuple(nodes: fx.Node | tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    return nodes if isinstance(nodes, tuple) else (nodes,)
