"""The norms of two streams, text and image say, in one launch each way; likewise the activations.

They join where both are ready: at one depth, counted in products and attentions. Their linears
stay as they are, a product per stream, in the one autograd node. A compiler schedules kernels on
its own, so the rule serves eager execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.kernels.gated_activation_linear import (
    gated_activation_linear,
    gated_activation_linear_streams,
)
from fxopt.kernels.linears import linears
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_linears import (
    norm_modulate_linears,
    norm_modulate_linears_streams,
)
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.norm_modulate_segments_linears import norm_modulate_segments_linears
from fxopt.kernels.norm_modulate_streams import NUM_OPERANDS
from fxopt.kernels.quantized_composites import (
    gated_activation_quantized_linear,
    norm_modulate_quantized_linears,
)
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.passes import ir
from fxopt.passes.rule import Binding, Call, Reason, Rule

# Products and attentions: what makes a stream one step deeper, in whatever precision.
STEPS = (
    ir.LINEAR,
    ir.SDPA,
    linears,
    quantized_linears,
    gated_activation_linear,
    gated_activation_linear_streams,
    gated_activation_quantized_linear,
    norm_modulate_linears,
    norm_modulate_linears_streams,
    norm_modulate_segments_linears,
    norm_modulate_quantized_linears,
)


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    common = _common(anchor)
    if common is None:
        return
    depths = _depths(anchor.graph)
    calls: list[fx.Node] = []
    for node in anchor.graph.nodes:
        if depths[node] == depths[anchor] and _common(node) == common:
            calls += [node] if not _depends(node, set(calls), depths) else []
    if len(calls) > 1 and calls[0] is anchor:
        is_norm = calls[0].target is not gated_activation_linear
        yield _bind_norms([_norm(c) for c in calls]) if is_norm else _bind_activations(calls)


def _common(call: fx.Node) -> tuple[Any, ...] | None:
    """What the streams of a launch share; None where `call` is none that can be one of them."""
    if ir.is_call(call, norm_modulate, norm_modulate_linears):
        arguments = ir.arguments(call)
        x, norm, h_dtype, dtype = (arguments[k] for k in ("x", "norm", "h_dtype", "dtype"))
        has_linears = call.target is norm_modulate_linears
        width = ir.expression(ir.shape(x)[-1])
        return common_of_norms(norm, h_dtype, dtype, width, has_linears=has_linears)
    if ir.is_call(call, gated_activation_linear):
        gate, _, activation, packing = call.args[:4]
        width = ir.expression(ir.shape(gate)[-1])
        return common_of_activations(activation, packing, ir.dtype(gate), width)
    return None


def common_of_norms(
    norm: str, h_dtype: torch.dtype, dtype: torch.dtype, width: Any, *, has_linears: bool
) -> tuple[Any, ...] | None:
    """What norms of one launch share; None for one whose y is kept, for something else."""
    return ("norm", norm, h_dtype, dtype, width) if has_linears or norm == "none" else None


def common_of_activations(
    activation: str, packing: str, dtype: torch.dtype, width: Any
) -> tuple[Any, ...]:
    """What activations of one launch share."""
    return "activation", activation, packing, dtype, width


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


@dataclass(frozen=True)
class Norm:
    """A call of norm_modulate, with its linears or without a norm, and the nodes of its results."""

    call: fx.Node
    weights: list[fx.Node]
    biases: list[fx.Node | None]
    pieces: list[int]
    outs: dict[int, fx.Node]
    h: fx.Node | None

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.call.args[:NUM_OPERANDS]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """eps and the offsets."""
        return self.call.args[9:12]


def _norm(call: fx.Node) -> Norm:
    taken = ir.results(call)
    parameters: Any = call.args[14:] or ([], [], [])
    weights, biases, pieces = parameters
    outs = ir.results(taken[0]) if 0 in taken else {}
    return Norm(call, weights, biases, pieces, outs, taken.get(1))


def _bind_norms(norms: list[Norm]) -> Binding:
    listed = [n for s in norms for n in (*s.operands, *s.weights, *s.biases)]
    outputs = tuple(n for s in norms for n in (*s.outs.values(), s.h) if n is not None)

    def emit(call: Call, given: dict[Any, Any]) -> tuple[fx.Node, ...]:
        fields = [[given[n] for n in f] for f in zip(*(s.operands for s in norms), strict=True)]
        numbers = map(list, zip(*(s.numbers for s in norms), strict=True))
        norm, *dtypes = (norms[0].call.args[i] for i in (8, 12, 13))
        op = call(
            norm_modulate_linears_streams, *fields, norm, *numbers, *dtypes,
            [given[w] for s in norms for w in s.weights],
            [given[b] for s in norms for b in s.biases],
            [len(s.weights) for s in norms],
            [number for s in norms for number in s.pieces],
            [len(s.pieces) // 3 for s in norms],
        )  # fmt: skip
        outs, hs = (call(operator.getitem, op, i) for i in range(2))
        results: list[fx.Node] = []
        start = 0
        for i, s in enumerate(norms):
            results += [call(operator.getitem, outs, start + k) for k in s.outs]
            results += [call(operator.getitem, hs, i)] if s.h is not None else []
            start += len(s.pieces) // 3
        return tuple(results)

    return _binding("norm_modulate_streams", norms[0].call, listed, outputs, emit)


def _bind_activations(calls: list[fx.Node]) -> Binding:
    gates, ups, _, _, *others = map(list, zip(*(c.args for c in calls), strict=True))
    activation, packing = calls[0].args[2:4]
    listed = [n for field in (gates, ups, *others) for n in field]

    def emit(call: Call, given: dict[Any, Any]) -> tuple[fx.Node, ...]:
        fields = [[given[n] for n in field] for field in (gates, ups, *others)]
        settings = (*fields[:2], activation, packing, *fields[2:])
        op = call(gated_activation_linear_streams, *settings)
        return tuple(call(operator.getitem, op, i) for i in range(len(calls)))

    return _binding("gated_activation_streams", calls[0], listed, tuple(calls), emit)


def _binding(
    op: str,
    anchor: fx.Node,
    listed: list[Any],
    outputs: tuple[fx.Node, ...],
    emit: Callable[[Call, dict[Any, Any]], tuple[fx.Node, ...]],
) -> Binding:
    """`emit` takes what stands for each of the nodes in `listed`, some of which are None."""
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))

    def emit_from(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        return emit(call, dict(zip(inputs, nodes, strict=True)) | {None: None})

    # Grouped otherwise, not computed otherwise.
    return Binding(anchor, inputs, outputs, emit_from, op, regroups=True, carries=outputs)


def share_residual(graph: fx.Graph) -> None:
    """Let later ops read a norm's input from the norm's node, which then adds up its gradient."""
    for node in list(graph.nodes):
        if not ir.is_call(node, *NODES_OF_NORMS):
            continue
        is_one = not ir.is_call(node, norm_modulate_linears_streams)
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


NODES_OF_NORMS = (
    norm_modulate_linears,
    norm_modulate_linears_streams,
    norm_modulate_segments_linears,
    norm_modulate_quantized_linears,
)
FUSED_NORMS = (norm_modulate, norm_modulate_segments, *NODES_OF_NORMS)

RULE = Rule(
    name="merge_streams",
    version=1,
    anchors=(norm_modulate_linears, norm_modulate, gated_activation_linear),
    propose=propose,
    compiled=False,
    finish=share_residual,
)
