"""The norms of two streams, text and image say, in one launch each way.

They join where both are ready: at one depth, counted in products and attentions. Their linears
stay as they are, a product per stream, in the one autograd node. A compiler schedules kernels on
its own, so the rule serves eager execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.kernels.linears import as_pieces, gated_activation_linear, linears
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_linears import (
    norm_modulate_linears,
    norm_modulate_linears_streams,
)
from fxopt.passes import ir
from fxopt.passes.rule import Binding, Call, Reason, Rule

NUM_OPERANDS = 8
# Products and attentions: what makes a stream one step deeper.
STEPS = (
    ir.LINEAR,
    ir.SDPA,
    linears,
    gated_activation_linear,
    norm_modulate_linears,
    norm_modulate_linears_streams,
)


@dataclass(frozen=True)
class Stream:
    """A call of norm_modulate, with its linears or without a norm, and the nodes of its results."""

    call: fx.Node
    weights: list[fx.Node]
    biases: list[fx.Node | None]
    pieces: tuple[tuple[int, int, int], ...]
    outs: dict[int, fx.Node]
    h: fx.Node | None

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.call.args[:NUM_OPERANDS]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """eps and the offsets."""
        return self.call.args[9:12]

    @property
    def common(self) -> tuple[Any, ...]:
        """What streams share: the norm, the dtypes, the number of features."""
        num_features = ir.expression(ir.shape(self.operands[0])[-1])
        return self.call.args[8], *self.call.args[12:14], num_features


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    first = _stream(anchor)
    if first is None:
        return
    depths = _depths(anchor.graph)
    streams: list[Stream] = []
    for node in anchor.graph.nodes:
        stream = _stream(node) if depths[node] == depths[anchor] else None
        if stream is not None and stream.common == first.common:
            calls = {s.call for s in streams}
            streams += [stream] if not _depends(node, calls, depths) else []
    if len(streams) > 1 and streams[0].call is anchor:
        yield _bind(streams)


def _depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node the steps on the longest way to it, itself included."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = max((found[i] for i in node.all_input_nodes), default=0)
        found[node] = before + ir.is_call(node, *STEPS)
    return found


def _depends(node: fx.Node, others: set[fx.Node], depths: dict[fx.Node, int]) -> bool:
    """Whether `node` depends on one of `others`, all at its own depth."""
    stack = [node]
    while stack:
        inputs = stack.pop().all_input_nodes
        if others.intersection(inputs):
            return True
        stack += [i for i in inputs if depths[i] == depths[node]]
    return False


def _stream(call: fx.Node) -> Stream | None:
    if ir.is_call(call, norm_modulate_linears):
        weights, biases, pieces = call.args[14:]
        results = {u.args[1]: u for u in call.users}
        outs = {u.args[1]: u for u in results[0].users} if 0 in results else {}
        return Stream(call, weights, biases, as_pieces(pieces), outs, results.get(1))  # type: ignore[arg-type]
    if ir.is_call(call, norm_modulate) and call.args[NUM_OPERANDS] == "none":
        return Stream(call, [], [], (), {}, next(iter(call.users)))
    return None


def _bind(streams: list[Stream]) -> Binding:
    listed = [n for s in streams for n in (*s.operands, *s.weights, *s.biases)]
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))
    outputs = [n for s in streams for n in (*s.outs.values(), s.h) if n is not None]

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given: dict[Any, Any] = dict(zip(inputs, nodes, strict=True)) | {None: None}
        fields = [[given[n] for n in f] for f in zip(*(s.operands for s in streams), strict=True)]
        numbers = map(list, zip(*(s.numbers for s in streams), strict=True))
        norm, *dtypes, _ = streams[0].common
        op = call(
            norm_modulate_linears_streams, *fields, norm, *numbers, *dtypes,
            [given[w] for s in streams for w in s.weights],
            [given[b] for s in streams for b in s.biases],
            [len(s.weights) for s in streams],
            [number for s in streams for piece in s.pieces for number in piece],
            [len(s.pieces) for s in streams],
        )  # fmt: skip
        outs, hs = (call(operator.getitem, op, i) for i in range(2))
        results: list[fx.Node] = []
        start = 0
        for i, s in enumerate(streams):
            results += [call(operator.getitem, outs, start + k) for k in s.outs]
            results += [call(operator.getitem, hs, i)] if s.h is not None else []
            start += len(s.pieces)
        return tuple(results)

    # Grouped otherwise, not computed otherwise.
    anchor, outs = streams[0].call, tuple(outputs)
    return Binding(anchor, inputs, outs, emit, "norm_modulate_streams", regroups=True, carries=outs)


def share_residual(graph: fx.Graph) -> None:
    """Let later ops read a norm's input from the norm's node, which then adds up its gradient."""
    for node in list(graph.nodes):
        if not ir.is_call(node, norm_modulate_linears, norm_modulate_linears_streams):
            continue
        is_one = ir.is_call(node, norm_modulate_linears)
        xs, residuals = ([a] if is_one else a for a in node.args[:2])
        for i, (x, residual) in enumerate(zip(xs, residuals, strict=True)):
            readers = [u for u in x.users if u > node and ir.is_call(u, *FUSED_NORMS)]
            if residual is None and readers and not ir.is_written(x, graph):
                with graph.inserting_after(node):
                    h = graph.call_function(operator.getitem, (node, 1))
                if not is_one:
                    with graph.inserting_after(h):
                        h = graph.call_function(operator.getitem, (h, i))
                h.meta = dict(x.meta)
                for reader in readers:
                    reader.replace_input_with(x, h)


FUSED_NORMS = (norm_modulate, norm_modulate_linears, norm_modulate_linears_streams)

RULE = Rule(
    name="merge_streams",
    version=1,
    anchors=(norm_modulate_linears, norm_modulate),
    propose=propose,
    compiled=False,
    finish=share_residual,
)
