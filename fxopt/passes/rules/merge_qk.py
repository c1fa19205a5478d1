"""The queries and keys of one attention become one call, with the biases of their linears.

`qk_norm_rope` finds each on its own. Together they are one launch each way, and the gradients of
the biases that the call takes over come out of its backward. A compiler fuses both on its own, so
the rule serves eager execution only.

Shapes: B batch, S tokens, H heads, d head dim, N = H * d.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.kernels.qk_norm_rope import qk_norm_rope
from fxopt.kernels.qk_norm_rope_arguments import Arguments
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.rules.attention import SOFTMAX
from fxopt.passes.rules.qk_norm_rope import operands, result

# Views that show every element once.
REARRANGING = (
    aten.reshape.default,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
)


@dataclass(frozen=True)
class Biased:
    """A linear whose bias the op can add, and the views of it up to the op's x."""

    linear: fx.Node
    views: tuple[fx.Node, ...]

    @property
    def operands(self) -> list[fx.Node]:
        """Its input, weight and bias."""
        named = ir.arguments(self.linear)
        return [named[name] for name in ("input", "weight", "bias")]

    def emit(self, call: Call, x: fx.Node, weight: fx.Node) -> fx.Node:
        """The same tensor less the bias."""
        node = call(ir.LINEAR, x, weight)
        for view in self.views:
            node = call(view.target, node, *view.args[1:], **view.kwargs)
        return node


def propose(attention: fx.Node) -> Iterator[Binding | Reason]:
    results = (result(operand) for operand, _ in operands(attention))
    outs = list(dict.fromkeys(out for out in results if out is not None))
    outs = [out for out in outs if len(_arguments(out).joined) == 1]
    if len(outs) == 2 and _agree(*map(_arguments, outs)):
        yield _bind(attention, outs)
    for out in outs:
        if any(_biased(x) for x in _arguments(out).x):
            yield _bind(attention, [out])


def _arguments(out: fx.Node) -> Arguments:
    (op,) = out.all_input_nodes
    return Arguments._make(op.args)


def _agree(q: Arguments, k: Arguments) -> bool:
    rotations = {(a.rotation, a.tables, a.rotated) for a in (q, k) if a.rotation != "none"}
    same = all(
        getattr(q, name) == getattr(k, name)
        for name in ("norm", "weight_offset", "across_heads", "dtype")
    )
    return same and len(rotations) <= 1


def _biased(x: Any) -> Biased | None:
    """The linear behind `x`, if its bias is one value per element of a token's heads."""
    views: list[fx.Node] = []
    node = x
    while ir.is_call(node, *REARRANGING) and len(node.users) == 1:
        views.insert(0, node)
        node = node.args[0]
    if not ir.is_call(node, ir.LINEAR) or len(node.users) != 1:
        return None
    if ir.arguments(node)["bias"] is None or not _is_row_by_row(node):
        return None
    value = ir.tensor(x)
    assert value is not None
    (_, _, num_heads, head_dim), strides = ir.shape(x), value.stride()
    whole = ir.same(ir.shape(node)[-1], num_heads * head_dim)
    return Biased(node, tuple(views)) if whole and strides[2:] == (head_dim, 1) else None


def _is_row_by_row(linear: fx.Node) -> bool:
    """Whether the output is contiguous: whole rows of N then tile the memory."""
    value = ir.tensor(linear)
    assert value is not None
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not ir.same(stride, expected):
            return False
        expected = expected * size
    return True


def _bind(attention: fx.Node, outs: Sequence[fx.Node]) -> Binding:
    """One call for the calls that make `outs`."""
    calls = [_arguments(out) for out in outs]
    joined = [count for a in calls for count in a.joined]
    tensors = [
        [t for field in fields for t in field]
        for fields in zip(*(a[:6] for a in calls), strict=True)
    ]
    biased = [_biased(x) for x in tensors[0]]
    listed = [*(x for x, b in zip(tensors[0], biased, strict=True) if b is None)]
    listed += [t for field in tensors[1:] for t in field]
    for b in biased:
        listed += b.operands if b is not None else []
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given: dict[Any, Any] = dict(zip(inputs, nodes, strict=True)) | {None: None}
        fields = [[given.get(t) for t in field] for field in tensors]
        for i, b in enumerate(biased):
            if b is not None:
                x, weight, bias = (given[n] for n in b.operands)
                fields[0][i], fields[1][i] = b.emit(call, x, weight), bias
        rotated = next((a for a in calls if a.rotation != "none"), calls[0])
        settings = rotated._replace(eps=[eps for a in calls for eps in a.eps])[7:]
        op = call(qk_norm_rope, *fields, joined, *settings)
        return tuple(call(operator.getitem, op, i) for i in range(len(outs)))

    outputs = tuple(outs)
    return Binding(attention, inputs, outputs, emit, "qk_norm_rope", regroups=True, carries=outputs)


RULE = Rule(
    name="merge_qk",
    version=2,
    anchors=(ir.SDPA, *SOFTMAX),
    propose=propose,
    compiled=False,
)
