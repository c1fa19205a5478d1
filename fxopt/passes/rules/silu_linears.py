"""AdaLN: the SiLU of one row per sample and the linears on it become one autograd node.

A compiler fuses what lies around products by itself, so the rule serves eager execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from fxopt.kernels.silu_linears import silu_linears
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.rules.merge_linears import (
    has_matrix,
    linears_on,
    parameters,
    split_outputs,
)


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    activated = anchor.args[0]
    if not ir.is_call(activated, aten.silu.default) or len(ir.shape(activated)) != 2:
        return
    group = linears_on(activated)
    if min(group) is not anchor or not all(map(has_matrix, group)):
        return
    x, (weights, biases) = activated.args[0], parameters(group)
    products, pieces = split_outputs(group, of_rows=True)
    inputs = tuple(dict.fromkeys(n for n in (x, *weights, *biases) if n is not None))

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        w, b = [given[w] for w in weights], [given[b] for b in biases]
        outs = call(silu_linears, given[x], w, b, pieces)
        return tuple(call(operator.getitem, outs, i) for i in range(len(products)))

    yield Binding(anchor, inputs, tuple(products), emit, "silu_products", regroups=True)


RULE = Rule(
    name="silu_linears",
    version=1,
    anchors=(ir.LINEAR,),
    propose=propose,
    compiled=False,
)
