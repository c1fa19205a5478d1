"""residual + gate * branch -> norm -> (1 + scale) * n + shift, or any part of it, as one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.passes import algebra, ir
from fxopt.passes.algebra import Norm
from fxopt.passes.ir import aten
from fxopt.passes.lookup import Lookup, is_piece, lookup
from fxopt.passes.regions import between
from fxopt.passes.rule import Binding, Call, Reason, Rule


@dataclass(frozen=True)
class GatedResidual:
    """h = residual + gate * branch; `out` is the node that holds h."""

    out: fx.Node
    residual: fx.Node
    branch: fx.Node
    gate: fx.Node | None


@dataclass(frozen=True)
class Modulation:
    """out = n * (scale_offset + scale) + shift."""

    out: fx.Node
    scale: fx.Node | None = None
    scale_offset: float = 0.0
    shift: fx.Node | None = None


def propose(node: fx.Node) -> Iterator[Binding | Reason]:
    if ir.is_call(node, aten.add.Tensor, aten.addcmul.default):
        yield from _propose_gated_residual(node)
        return
    norm = algebra.as_norm(_output(node))
    if norm is None:
        return
    before = gated_residual(algebra.skip_upcasts(norm.x), gate_required=False)
    users = _starts(norm.out)
    after = [m for u in users for m in modulations(norm.out, u)]
    if len(users) > 1 and after:
        # One norm under several modulations: each op norms anew, if all of them do.
        heads = [next(iter(modulations(norm.out, u)), None) for u in users]
        if None in heads or any(u.op == "output" for u in norm.out.users):
            yield Reason("the normed tensor has a user that does not modulate it", norm.out)
            return
        yield bind(norm, None, tuple(h for h in heads if h is not None))
        return
    for modulation in after:
        if before is not None:
            yield bind(norm, before, (modulation,))
        yield bind(norm, None, (modulation,))
    out = algebra.through_casts(norm.out)
    if before is not None:
        yield bind(norm, before, (Modulation(out),))
    elif norm.kind == "layer" and (out is not norm.out or ir.is_call(norm.x, *ir.CASTS)):
        yield bind(norm, None, (Modulation(out),))  # a norm in a wider dtype, and back


def _output(node: fx.Node) -> fx.Node:
    """The normed tensor of a norm anchor: some ops return a tuple."""
    if node.target in (norm_modulate, aten.native_layer_norm.default):
        return ir.results(node).get(0, node)
    return node


def _propose_gated_residual(node: fx.Node) -> Iterator[Binding | Reason]:
    found = gated_residual(algebra.through_casts(node), gate_required=True)
    if found is None or _feeds_a_norm(node) or len(ir.shape(node)) > 3:
        return
    if found.residual is found.branch:
        return  # n * scale + n: a modulation, of a norm that was declined

    operands = (found.branch, found.residual, found.gate)
    inputs = tuple(dict.fromkeys(n for n in operands if n is not None))

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        h_dtype = ir.dtype(found.out)
        args = (*(given[n] for n in operands), None, None, None, None, None)
        op = call(norm_modulate, *args, "none", 0.0, 0.0, 0.0, h_dtype, h_dtype)
        return call(operator.getitem, op, 1)

    yield Binding(node, inputs, (found.out,), emit, "norm_modulate")


def _feeds_a_norm(node: fx.Node) -> bool:
    """Whether a norm reads the sum, so that the norm's own binding takes it in."""
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if ir.is_call(user, *ir.CASTS, *ir.COPIES):
            stack += user.users
        elif algebra.as_norm(_output(user)) is not None:
            return True
    return False


def gated_residual(h: fx.Node, *, gate_required: bool) -> GatedResidual | None:
    """Read h = residual + gate * branch backwards from the node that holds h."""
    total = ir.skip_casts(h)
    if ir.tensor(total) is None:
        return None
    found = algebra.sum_with_product(total)
    if found is not None:
        residual, a, b = found
        for gate, branch in ((a, b), (b, a)):
            whole = ir.same(ir.shape(branch), ir.shape(total))
            if whole and _is_gate(gate, total) and algebra.broadcasts_into(gate, branch):
                return _whole(h, total, residual, branch, gate)
    pair = algebra.terms(total)
    if gate_required or pair is None or not all(ir.tensor(p) is not None for p in pair):
        return None
    return _whole(h, total, pair[0], pair[1], None)


def _whole(
    h: fx.Node, total: fx.Node, residual: fx.Node, branch: fx.Node, gate: fx.Node | None
) -> GatedResidual | None:
    residual, branch = algebra.skip_upcasts(residual), algebra.skip_upcasts(branch)
    if not all(ir.same(ir.shape(n), ir.shape(total)) for n in (residual, branch)):
        return None
    return GatedResidual(h, residual, branch, gate)


def _is_gate(factor: fx.Node, total: fx.Node) -> bool:
    """Whether tokens share the factor; or have each its own, looked up or part of a modulation."""
    if not ir.same(ir.shape(factor), ir.shape(total)):
        return True
    return isinstance(lookup(factor), Lookup) or is_piece(factor)


def _starts(n: fx.Node) -> list[fx.Node]:
    """Users of `n`, but for the sum in n * scale + n, which the product leads to."""
    users = [u for u in n.users if u.op != "output"]
    inner = {m.out for u in users for m in modulations(n, u) if m.out is not u}
    return [u for u in users if u not in inner]


def modulations(n: fx.Node, user: fx.Node) -> Iterator[Modulation]:
    """Affine chains that start with `user` of the normed tensor `n`, the longest first."""
    found = [Modulation(n)]
    while True:
        last = found[-1]
        step = _step(last, n, user)
        if step is None:
            break
        found.append(step)
        users = list(step.out.users)
        if len(users) != 1:
            break
        user = users[0]
    # A chain that only casts is no modulation.
    yield from (m for m in found[:0:-1] if m.scale is not None or m.shift is not None)


def _step(last: Modulation, n: fx.Node, user: fx.Node) -> Modulation | None:
    if ir.is_call(user, *ir.CASTS, *ir.COPIES):
        return Modulation(user, last.scale, last.scale_offset, last.shift)
    if ir.tensor(user) is None or not ir.same(ir.shape(user), ir.shape(n)):
        return None
    if ir.is_call(user, aten.addcmul.default) and last.scale is None and last.shift is None:
        addend, a, b = user.args
        other = _other((a, b), last.out, n)
        if ir.arguments(user)["value"] == 1 and other is not None:
            scale, offset = algebra.offset_by_one(other)
            return _plus(Modulation(user, scale, offset), addend, n)
    other = _other(algebra.factors(user), last.out, n)
    if other is not None and last.scale is None and last.shift is None:
        scale, offset = algebra.offset_by_one(other)
        return Modulation(user, scale, offset)
    other = _other(algebra.terms(user), last.out, n)
    if other is not None and last.shift is None:
        return _plus(replace(last, out=user), other, n)
    return None


def _plus(product: Modulation, addend: fx.Node, n: fx.Node) -> Modulation:
    if addend is n and product.scale is not None:
        return replace(product, scale_offset=product.scale_offset + 1.0)
    return replace(product, shift=algebra.skip_upcasts(addend))


def _other(pair: tuple[fx.Node, fx.Node] | None, one: fx.Node, n: fx.Node) -> fx.Node | None:
    """The tensor that `one` is paired with, if it broadcasts into it and is not made of `n`: what
    is added to a norm that stands after its branch is the next branch, not a shift.
    """
    if pair is None or pair.count(one) != 1:
        return None
    other = pair[1] if pair[0] is one else pair[0]
    return other if algebra.broadcasts_into(other, one) and not between(n, other) else None


def bind(norm: Norm, before: GatedResidual | None, after: tuple[Modulation, ...]) -> Binding:
    """One op per modulation; the first also computes h = residual + gate * branch."""
    x = before.branch if before else algebra.skip_upcasts(norm.x)
    named = {
        "x": x,
        "residual": before.residual if before else None,
        "gate": before.gate if before else None,
        "weight": norm.weight and algebra.skip_upcasts(norm.weight),
        "bias": norm.bias and algebra.skip_upcasts(norm.bias),
    }
    for i, m in enumerate(after):
        named |= {f"scale{i}": m.scale, f"shift{i}": m.shift}
    inputs = tuple(dict.fromkeys(n for n in named.values() if n is not None))
    h_dtype = ir.dtype(before.out) if before else ir.dtype(x)
    dtypes = [ir.dtype(m.out) for m in after]

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True))
        arg = {k: given[n] if n is not None else None for k, n in named.items()}
        outputs: list[fx.Node] = []
        for i, m in enumerate(after):
            outputs.append(_emit_one(call, arg, i, norm, m, h_dtype, dtypes[i]))
        if before is None:
            return tuple(outputs)
        return call(operator.getitem, outputs[0].args[0], 1), *outputs

    outputs = (*((before.out,) if before else ()), *(m.out for m in after))
    return Binding(norm.out, inputs, outputs, emit, "norm_modulate")


def _emit_one(
    call: Call,
    arg: dict[str, fx.Node | None],
    i: int,
    norm: Norm,
    modulation: Modulation,
    h_dtype: torch.dtype,
    dtype: torch.dtype,
) -> fx.Node:
    tensors = [arg[k] for k in ("x", "residual", "gate", "weight", "bias")]
    tensors += [arg[f"scale{i}"], arg[f"shift{i}"], None]
    settings = (norm.kind, norm.eps, norm.weight_offset, modulation.scale_offset, h_dtype, dtype)
    return call(operator.getitem, call(norm_modulate, *tensors, *settings), 0)


RULE = Rule(
    name="norm_modulate",
    version=3,
    anchors=(
        aten.layer_norm.default,
        aten.native_layer_norm.default,
        aten.rms_norm.default,
        norm_modulate,
        aten.add.Tensor,
        aten.addcmul.default,
    ),
    propose=propose,
)
