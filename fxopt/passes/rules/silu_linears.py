"""AdaLN: the SiLU of one row per sample and the linears on it become one autograd node.

A compiler fuses what lies around products by itself, so the rule serves eager execution only.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxopt.kernels.silu_linears import silu_linears
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Reason, Rule
from fxopt.passes.rules.merge_linears import (
    bind_linears,
    has_matrix,
    is_stored_by_output,
    linears_on,
)


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    activated = anchor.args[0]
    if not ir.is_call(activated, aten.silu.default) or len(ir.shape(activated)) != 2:
        return
    group = linears_on(activated)
    if min(group) is not anchor or not all(has_matrix(n) and is_stored_by_output(n) for n in group):
        return
    yield bind_linears(activated.args[0], group, silu_linears, "silu_products", of_rows=True)


RULE = Rule(
    name="silu_linears",
    version=1,
    anchors=(ir.LINEAR,),
    propose=propose,
    compiled=False,
)
