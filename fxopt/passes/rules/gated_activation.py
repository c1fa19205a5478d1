"""GELU, SiLU and their gated forms (SwiGLU, GEGLU), composite or decomposed, as one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.kernels.gated_activation import gated_activation
from fxopt.passes import algebra, ir
from fxopt.passes.ir import aten
from fxopt.passes.regions import between, is_closed, side_inputs
from fxopt.passes.rule import Binding, Call, Reason, Rule

DECOMPOSED = {
    aten.tanh.default: "gelu_tanh",
    aten.erf.default: "gelu_erf",
    aten.special_ndtr.default: "gelu_erf",
    aten.sigmoid.default: "silu",
}
MAX_CHAIN = 8


@dataclass(frozen=True)
class Activation:
    name: str
    x: fx.Node
    out: fx.Node


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    for activation in _activations(anchor):
        x = activation.x
        if len(ir.shape(x)) < 3:
            continue  # one row per sample: an embedding, not an MLP
        product = _gated(activation.out)
        if isinstance(product, Reason):
            yield product
        elif product is not None:
            node, up = product
            if ir.dtype(up) != ir.dtype(x) or ir.dtype(node) != ir.dtype(x):
                yield Reason(f"gate is {ir.dtype(x)}, the other half {ir.dtype(up)}", node)
            else:
                yield _bind(anchor, activation, node, up)
        if feeds_a_linear(activation.out) or anchor.target in DECOMPOSED:
            yield _bind(anchor, activation, activation.out, None)


def _activations(anchor: fx.Node) -> Iterator[Activation]:
    x = anchor.args[0]
    if not isinstance(x, fx.Node) or not ir.is_floating(x):
        return
    if anchor.target in DECOMPOSED:
        yield from _decomposed(anchor)
        return
    name = "silu"
    if anchor.target is aten.gelu.default:
        name = "gelu_tanh" if ir.arguments(anchor)["approximate"] == "tanh" else "gelu_erf"
    out = algebra.through_casts(anchor)
    if out is not anchor:
        yield Activation(name, algebra.skip_upcasts(x), out)
    yield Activation(name, x, anchor)


def _decomposed(anchor: fx.Node) -> Iterator[Activation]:
    """Chains of scalars around tanh, erf or sigmoid that start and end at one shape."""
    sources: list[Any] = [anchor.args[0]]
    frontier = list(sources)
    while frontier and len(sources) < MAX_CHAIN:
        node = frontier.pop(0)
        for source in node.all_input_nodes if node.op == "call_function" else ():
            if source not in sources and ir.is_floating(source):
                sources.append(source)
                frontier.append(source)
    ends: list[fx.Node] = []
    node = anchor
    while len(node.users) == 1 and len(ends) < MAX_CHAIN:
        node = next(iter(node.users))
        if not ir.is_call(node, aten.mul.Tensor, aten.add.Tensor, *ir.CASTS):
            break
        ends.append(node)
    (name,) = (n for op, n in DECOMPOSED.items() if op is anchor.target)
    for end in reversed(ends):
        for x in sources:
            region = between(x, end)
            if anchor not in region or not is_closed(region) or side_inputs(region, x):
                continue
            if _multiplies(x, region, anchor):
                yield Activation(name, x, end)


def _multiplies(x: fx.Node, region: list[fx.Node], anchor: fx.Node) -> bool:
    """Whether `x` reaches the end of the region past the anchor as well: every activation here is
    x times a function of x, and tanh(x / c) * c, which caps logits, is none."""
    behind = {anchor}
    for node in region:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    inputs = {i for node in behind - {anchor} for i in node.all_input_nodes}
    return not (inputs - behind).isdisjoint({x, *region})


def _gated(out: fx.Node) -> tuple[fx.Node, fx.Node] | Reason | None:
    """(product, up) if the activation is multiplied with a tensor of its own shape."""
    products = [u for u in out.users if _gate_of(u, out) is not None]
    if not products:
        return None
    if len(out.users) != 1:
        other = next(u for u in out.users if u is not products[0])
        return Reason(f"the activation is also used by {other.name} and is kept for it", out)
    up = _gate_of(products[0], out)
    assert up is not None
    return algebra.through_casts(products[0]), algebra.skip_upcasts(up)


def _gate_of(product: fx.Node, out: fx.Node) -> fx.Node | None:
    pair = algebra.factors(product)
    if pair is None or pair.count(out) != 1:
        return None
    up = pair[1] if pair[0] is out else pair[0]
    return up if ir.tensor(up) is not None and ir.same(ir.shape(up), ir.shape(out)) else None


def feeds_a_linear(out: fx.Node) -> bool:
    """Whether a linear reads `out`, or a copy of it, alone or beside something else."""
    for user in out.users:
        if ir.is_call(user, ir.LINEAR):
            return True
        if ir.is_call(user, aten.cat.default, *ir.COPIES) and feeds_a_linear(user):
            return True
    return False


def _bind(anchor: fx.Node, activation: Activation, out: fx.Node, up: fx.Node | None) -> Binding:
    x = activation.x
    halves = _halves(x, up) if up is not None else None
    if halves is not None:
        base, packing = halves
        inputs: tuple[fx.Node, ...] = (base,)
    else:
        packing = "none"
        inputs = (x,) if up is None else (x, up)

    def emit(call: Call, gate: fx.Node, up: fx.Node | None = None) -> fx.Node:
        return call(gated_activation, gate, up, activation.name, packing)

    return Binding(anchor, inputs, (out,), emit, "gated_activation")


def _halves(gate: fx.Node, up: fx.Node) -> tuple[fx.Node, str] | None:
    """(base, packing) if both are halves of one tensor's last dim."""
    parts = _half(gate), _half(up)
    if parts[0] is None or parts[1] is None or parts[0][0] is not parts[1][0]:
        return None
    packing = {(0, 1): "gate_up", (1, 0): "up_gate"}.get((parts[0][1], parts[1][1]))
    return (parts[0][0], packing) if packing else None


def _half(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(base, i) if `node` is half i of base's last dim."""
    if ir.is_call(node, operator.getitem):
        split, index = node.args
        if not ir.is_call(split, *ir.SPLITS):
            return None
        base = split.args[0]
        start = None if index not in (0, 1) else index
    elif ir.is_call(node, aten.slice.Tensor):
        base, a = node.args[0], ir.arguments(node)
        size = ir.shape(base)[-1]
        begin = a["start"] or 0
        start = {0: 0, size // 2: 1}.get(begin) if isinstance(size, int) else None
    else:
        return None
    whole, part = ir.shape(base), ir.shape(node)
    halves = ir.same(whole[:-1], part[:-1]) and whole[-1] == 2 * part[-1]
    return (base, start) if halves and start is not None else None


RULE = Rule(
    name="gated_activation",
    version=1,
    anchors=(aten.gelu.default, aten.silu.default, *DECOMPOSED),
    propose=propose,
)
