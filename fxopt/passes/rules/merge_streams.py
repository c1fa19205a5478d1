"""The norms of two streams, text and image say, in one launch each way; likewise the activations
and the casts of quantized linears.

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
from fxopt.kernels.gated_activation_quantized_linear import (
    gated_activation_quantized_linear,
    gated_activation_quantized_linear_streams,
)
from fxopt.kernels.linears import linears
from fxopt.kernels.norm_modulate_streams import NUM_OPERANDS
from fxopt.kernels.quantized_linears import (
    fuses,
    op_of,
    quantized_linears,
    quantized_linears_streams,
)
from fxopt.kernels.silu_linears import silu_linears
from fxopt.passes import ir, norm_ops
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.share_residual import share_residual
from fxopt.recipes import Recipe, find

# Products and attentions: what makes a stream one step deeper, in whatever precision.
STEPS = (
    ir.LINEAR,
    ir.SDPA,
    linears,
    silu_linears,
    quantized_linears,
    quantized_linears_streams,
    gated_activation_linear,
    gated_activation_linear_streams,
    gated_activation_quantized_linear,
    gated_activation_quantized_linear_streams,
    *norm_ops.WITH_LINEARS,
)
OTHER_FORMATS = "{} is normed, activated or cast at the same time, but in other formats"


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    common = _common(anchor)
    if common is None:
        return
    depths = _depths(anchor.graph)
    ready = {n: c for n in anchor.graph.nodes if depths[n] == depths[anchor] and (c := _common(n))}
    calls: list[fx.Node] = []
    for node, own in ready.items():
        if own == common:
            calls += [node] if not _depends(node, set(calls), depths) else []
    if len(calls) > 1 and calls[0] is anchor:
        yield _bind(calls)
    elif len(calls) == 1:
        others = [n for n, (_, *own) in ready.items() if own == [*common[1:]] and n is not anchor]
        yield from (Reason(OTHER_FORMATS.format(n.name), anchor) for n in others[:1])


def _common(call: fx.Node) -> tuple[Any, ...] | None:
    """What the streams of a launch share, the key of a recipe or None first; None where `call` is
    none that can be one of them."""
    arguments = ir.arguments(call) if ir.is_call(call, *RULE.anchors) else {}
    recipe = arguments.get("recipe")
    if ir.is_call(call, *norm_ops.ALONE):
        x, norm, h_dtype, dtype = (arguments[k] for k in ("x", "norm", "h_dtype", "dtype"))
        has_linears = "weights" in arguments
        width = ir.expression(ir.shape(x)[-1])
        common = common_of_norms(norm, h_dtype, dtype, width, has_linears=has_linears)
        return None if common is None else (recipe, *common)
    if ir.is_call(call, gated_activation_linear, gated_activation_quantized_linear):
        gate, _, activation, packing = call.args[:4]
        width = ir.expression(ir.shape(gate)[-1])
        return recipe, *common_of_activations(activation, packing, ir.dtype(gate), width)
    if ir.is_call(call, quantized_linears):
        return recipe, *common_of_linears(arguments["keeps_x"])
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


def common_of_linears(keeps_x: bool) -> tuple[Any, ...]:
    """What quantized linears share whose casts are one launch, beside the recipe."""
    return "linears", keeps_x


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


def _bind(calls: list[fx.Node]) -> Binding:
    if ir.is_call(calls[0], quantized_linears):
        return _bind_linears(calls)
    if ir.is_call(calls[0], gated_activation_linear, gated_activation_quantized_linear):
        return _bind_activations(calls)
    return _bind_norms([_norm(c) for c in calls])


@dataclass(frozen=True)
class Norm:
    """A call of norm_modulate, with its linears or without a norm, and the nodes of its results.

    reading: by segment the index, and whether the shift is per token.
    settings: those of norm_modulate.
    recipe: the key of the one that quantizes its linears, or none. pieces: numbers of `linears`.
    """

    call: fx.Node
    reading: tuple[Any, bool]
    settings: tuple[Any, ...]
    weights: list[fx.Node]
    biases: list[fx.Node | None]
    recipe: list[str]
    pieces: list[int]
    outs: dict[int, fx.Node]
    h: fx.Node | None

    @property
    def num_outs(self) -> int:
        return len(self.pieces) // 3

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.call.args[:NUM_OPERANDS]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """eps and the offsets."""
        return self.settings[1:4]


def _norm(call: fx.Node) -> Norm:
    taken, reading = ir.results(call), (None, False)
    args: Any = call.args[NUM_OPERANDS:]
    if ir.is_call(call, *norm_ops.BY_SEGMENT):
        reading, args = args[:2], args[2:]
    settings, parameters = args[:6], args[6:]
    weights, biases, *recipe, pieces = parameters or ([], [], [])
    outs = ir.results(taken[0]) if 0 in taken else {}
    return Norm(call, reading, settings, weights, biases, recipe, pieces, outs, taken.get(1))


def _bind_norms(norms: list[Norm]) -> Binding:
    indices, per_token = map(list, zip(*(s.reading for s in norms), strict=True))
    listed = [n for s in norms for n in (*s.operands, *s.weights, *s.biases)] + indices
    outputs = tuple(n for s in norms for n in (*s.outs.values(), s.h) if n is not None)

    def emit(call: Call, given: dict[Any, Any]) -> tuple[fx.Node, ...]:
        fields = [[given[n] for n in f] for f in zip(*(s.operands for s in norms), strict=True)]
        numbers = map(list, zip(*(s.numbers for s in norms), strict=True))
        norm, *_, h_dtype, dtype = norms[0].settings
        by_segment = any(index is not None for index in indices)
        if by_segment:
            fields += [[given[n] for n in indices], per_token]
        recipe = norms[0].recipe
        made = call(
            (norm_ops.QUANTIZED_STREAMS if recipe else norm_ops.STREAMS)[by_segment],
            *fields, norm, *numbers, h_dtype, dtype,
            [given[w] for s in norms for w in s.weights],
            [given[b] for s in norms for b in s.biases],
            [len(s.weights) for s in norms],
            *recipe,
            [number for s in norms for number in s.pieces],
            [s.num_outs for s in norms],
        )  # fmt: skip
        outs, hs = (call(operator.getitem, made, i) for i in range(2))
        results: list[fx.Node] = []
        start = 0
        for i, s in enumerate(norms):
            results += [call(operator.getitem, outs, start + k) for k in s.outs]
            results += [call(operator.getitem, hs, i)] if s.h is not None else []
            start += s.num_outs
        return tuple(results)

    return _binding("norm_modulate", norms[0].call, listed, outputs, emit)


def _bind_activations(calls: list[fx.Node]) -> Binding:
    gates, ups, names, packings, *others = map(list, zip(*(c.args for c in calls), strict=True))
    recipe = [others.pop()[0]] if ir.is_call(calls[0], gated_activation_quantized_linear) else []
    streams_op = (
        gated_activation_quantized_linear_streams if recipe else gated_activation_linear_streams
    )
    listed = [n for field in (gates, ups, *others) for n in field]

    def emit(call: Call, given: dict[Any, Any]) -> tuple[fx.Node, ...]:
        fields = [[given[n] for n in field] for field in (gates, ups, *others)]
        settings = (*fields[:2], names[0], packings[0], *fields[2:], *recipe)
        op = call(streams_op, *settings)
        return tuple(call(operator.getitem, op, i) for i in range(len(calls)))

    return _binding("gated_activation", calls[0], listed, tuple(calls), emit)


def _bind_linears(calls: list[fx.Node]) -> Binding:
    xs, weights, biases, recipes, keeps_x, pieces = zip(*(c.args for c in calls), strict=True)
    num_linears, num_pieces = [len(own) for own in weights], [len(p) // 3 for p in pieces]
    taken = [ir.results(c) for c in calls]
    listed = [*xs, *(w for own in weights for w in own), *(b for own in biases for b in own)]
    outputs = tuple(n for own in taken for n in own.values())

    def emit(call: Call, given: dict[Any, Any]) -> tuple[fx.Node, ...]:
        each = ([given[n] for own in field for n in own] for field in (weights, biases))
        flat = [number for own in pieces for number in own]
        rest = num_linears, recipes[0], keeps_x[0], flat, num_pieces
        op = call(quantized_linears_streams, [given[x] for x in xs], *each, *rest)
        starts = [sum(num_pieces[:i]) for i in range(len(calls))]
        each_taken = zip(starts, taken, strict=True)
        return tuple(
            call(operator.getitem, op, start + i) for start, own in each_taken for i in own
        )

    return _binding("linears", calls[0], listed, outputs, emit)


def streams_op_of(name: str, recipe: Recipe | None) -> str:
    """The op behind `name` that launches for all streams, whose linears run by `recipe`.

    name: norm_modulate, gated_activation, or linears for the casts of quantized ones.
    """
    if recipe is None:
        return f"{name}_streams"
    if name == "linears":
        return "quantize_together" if fuses(recipe) else "quantize"
    return f"{op_of(name, recipe)}_{'together' if fuses(recipe) else 'streams'}"


def _binding(
    name: str,
    anchor: fx.Node,
    listed: list[Any],
    outputs: tuple[fx.Node, ...],
    emit: Callable[[Call, dict[Any, Any]], tuple[fx.Node, ...]],
) -> Binding:
    """`emit` takes what stands for each of the nodes in `listed`, some of which are None."""
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))

    def emit_from(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        return emit(call, dict(zip(inputs, nodes, strict=True)) | {None: None})

    recipe = ir.arguments(anchor).get("recipe")
    op = streams_op_of(name, None if recipe is None else find(recipe))
    # Grouped otherwise, not computed otherwise.
    return Binding(anchor, inputs, outputs, emit_from, op, regroups=True, carries=outputs)


RULE = Rule(
    name="merge_streams",
    version=3,
    anchors=(
        *norm_ops.ALONE,
        gated_activation_linear,
        gated_activation_quantized_linear,
        quantized_linears,
    ),
    propose=propose,
    compiled=False,
    finish=share_residual,
)
