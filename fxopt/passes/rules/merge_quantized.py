"""Quantized linears become one autograd node with the op that makes their input.

The op then writes codes, and neither its result nor the codes are kept for backward. As for
`merge_linears`, a compiler does without.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from fxopt.kernels.gated_activation_quantized_linear import gated_activation_quantized_linear
from fxopt.kernels.norm_modulate_quantized_linears import norm_modulate_quantized_linears
from fxopt.kernels.norm_modulate_segments_quantized_linears import (
    norm_modulate_segments_quantized_linears,
)
from fxopt.kernels.quantized_linears import op_of, quantized_linears
from fxopt.passes import ir
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.rules.merge_linears import (
    activation_operands,
    norm_operands,
    segment_operands,
)
from fxopt.recipes import find


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    shared = anchor.args[0]
    assert isinstance(shared, fx.Node)
    segments, activation = segment_operands(shared), activation_operands(shared)
    norm = segments or norm_operands(shared)
    if norm is None and activation is None:
        return
    others = [u for u in shared.users if u is not anchor]
    if others:
        why = f"what is quantized is also used by {others[0].name} and is kept for it"
        yield Reason(why, shared)
    elif norm is not None:
        by_segment = "norm_modulate_segments", norm_modulate_segments_quantized_linears, 9
        plain = "norm_modulate", norm_modulate_quantized_linears, 8
        yield _bind_norm(anchor, shared, norm, *(by_segment if segments else plain))
    elif activation is not None and len(_list(anchor.args[5])) == 3:  # one linear, not split
        yield _bind_activation(anchor, *activation)


def _list(argument: Any) -> list[Any]:
    assert isinstance(argument, Sequence)
    return list(argument)


def _bind_norm(
    anchor: fx.Node,
    y: fx.Node,
    operands: tuple[Any, ...],
    name: str,
    composite: Any,
    num_tensors: int,
) -> Binding:
    weights, biases, recipe = _list(anchor.args[1]), _list(anchor.args[2]), anchor.args[3]
    pieces = anchor.args[5]
    tensors, settings = operands[:num_tensors], operands[num_tensors:]
    products = ir.results(anchor)
    h = ir.results(y.args[0]).get(1) if ir.is_call(y, operator.getitem) else None
    inputs = _inputs(*tensors, *weights, *biases)

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        x, w, b = ([given[n] for n in listed] for listed in (tensors, weights, biases))
        op = call(composite, *x, *settings, w, b, recipe, pieces)
        outs = call(operator.getitem, op, 0)
        results = [call(operator.getitem, outs, i) for i in products]
        return (*results, *([] if h is None else [call(operator.getitem, op, 1)]))

    made = [y] if h is None else [y, h]
    outputs = (*products.values(), *made[1:])
    carries = (*made, *products.values())
    return _binding(anchor, name, inputs, outputs, emit, carries)


def _bind_activation(anchor: fx.Node, activation: fx.Node, beside: fx.Node | None) -> Binding:
    gate, up, name, packing = _list(activation.args)  # `fuse_bias` gave it none
    (weight,), (bias,) = _list(anchor.args[1]), _list(anchor.args[2])
    listed, recipe = (gate, up, beside, weight, bias), anchor.args[3]
    products, inputs = tuple(ir.results(anchor).values()), _inputs(*listed)

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        gate, up, beside, weight, bias = (given[n] for n in listed)
        operands = (gate, up, name, packing, beside, weight, bias)
        return call(gated_activation_quantized_linear, *operands, recipe)

    carries = (activation, *products)
    return _binding(anchor, "gated_activation", inputs, products, emit, carries)


def _inputs(*nodes: Any) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(n for n in nodes if n is not None))


def _binding(
    anchor: fx.Node,
    op: str,
    inputs: tuple[fx.Node, ...],
    outputs: tuple[fx.Node, ...],
    emit: Any,
    carries: tuple[fx.Node, ...],
) -> Binding:
    recipe = anchor.args[3]
    assert isinstance(recipe, str)
    name = op_of(op, find(recipe))
    return Binding(anchor, inputs, outputs, emit, name, regroups=True, carries=carries)


RULE = Rule(
    name="merge_quantized",
    version=2,
    anchors=(quantized_linears,),
    propose=propose,
    tier="low_precision",
    compiled=False,
)
