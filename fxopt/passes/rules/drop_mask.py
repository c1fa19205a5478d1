"""Attention under a mask that masks nothing, or no more than `is_causal` does, goes without it.

A mask costs more than its own bytes: with one, PyTorch's flash kernel does not serve. Only masks
that the graph itself makes, of one value or of positions, are dropped; reading the values of a mask
that comes in would have to wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.kernels.attention_call import ALL, CAUSAL
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.windows import window

# The value of each fill, or the name of the argument that holds it.
FILLS: dict[Any, int | str] = {
    aten.ones.default: 1,
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
    aten.zeros.default: 0,
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.full.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.full_like.default: "fill_value",
}


def propose(attention: fx.Node) -> Iterator[Binding | Reason]:
    named = ir.arguments(attention)
    mask = named["attn_mask"]
    if mask is None:
        return
    value = constant(mask)
    masks_nothing = value is not None and value.item() == (ir.dtype(mask) == torch.bool)
    seen = ALL if masks_nothing else window(mask)
    if seen not in (ALL, CAUSAL):
        return
    if named["dropout_p"]:
        yield Reason("with dropout, attention without a mask draws other numbers", attention)
        return
    qkv = [named[name] for name in ("query", "key", "value")]
    # Others may share the mask, so it is an input, which nothing reads then.
    inputs = tuple(dict.fromkeys((*qkv, mask)))

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True))
        options = {name: named[name] for name in ("scale", "enable_gqa")}
        if seen == CAUSAL:
            options["is_causal"] = True
        return call(ir.SDPA, *(given[n] for n in qkv), **options)

    # The value is the proof. A probe would need sizes of mask and keys that fit, and PyTorch's
    # kernels for the CPU do not check them.
    outputs = (attention,)
    yield Binding(attention, inputs, outputs, emit, "attention", regroups=True, carries=outputs)


def constant(node: fx.Node) -> Tensor | None:
    """The one value of all elements of `node`, `[]`, if the graph alone decides it."""
    if ir.tensor(node) is None or ir.is_written(node, node.graph):
        return None
    if ir.is_call(node, *FILLS):
        fill = FILLS[node.target]
        fill = ir.arguments(node)[fill] if isinstance(fill, str) else fill
        return (
            torch.tensor(fill).to(ir.dtype(node)) if isinstance(fill, (bool, int, float)) else None
        )
    if ir.is_call(node, *ir.VIEWS, *ir.COPIES, *ir.CASTS) and isinstance(node.args[0], fx.Node):
        value = constant(node.args[0])
        return None if value is None else value.to(ir.dtype(node))
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return None
    values = {n: constant(n) for n in node.all_input_nodes}
    if any(v is None for v in values.values()) or not values:
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


RULE = Rule(name="drop_mask", version=2, anchors=(ir.SDPA,), propose=propose)
