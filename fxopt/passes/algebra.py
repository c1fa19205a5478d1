"""Reading arithmetic off a graph: sums, products and norms, however they are spelled."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.passes import ir
from fxopt.passes.ir import aten

FXOPT_NORM = "fxopt::norm_modulate"


@dataclass(frozen=True)
class Norm:
    """A norm over the last dim.

    out: the node that holds the normed tensor. nodes between `x` and `out` are the norm itself.
    kind: "layer" or "rms". weight, bias: affine parameters or None; weight_offset: 1.0 for (1+w).
    """

    out: fx.Node
    x: fx.Node
    kind: str
    eps: float
    weight: fx.Node | None
    bias: fx.Node | None
    weight_offset: float = 0.0


def as_norm(node: Any) -> Norm | None:
    """The norm that `node` computes, if it is one over exactly the last dim."""
    if ir.is_call(node, aten.layer_norm.default, aten.rms_norm.default):
        a = ir.arguments(node)
        if len(a["normalized_shape"]) != 1 or a["eps"] is None:
            return None
        kind = "layer" if node.target is aten.layer_norm.default else "rms"
        return Norm(node, a["input"], kind, a["eps"], a["weight"], a.get("bias"))
    if ir.is_call(node, operator.getitem) and node.args[1] == 0:
        if ir.is_call(node.args[0], aten.native_layer_norm.default):
            x, sizes, weight, bias, eps = node.args[0].args
            return Norm(node, x, "layer", eps, weight, bias) if len(sizes) == 1 else None
        return _as_bare_fxopt_norm(node)
    return None


def _as_bare_fxopt_norm(node: fx.Node) -> Norm | None:
    op = node.args[0]
    if not isinstance(op, fx.Node) or not isinstance(op.target, torch._ops.OpOverload):
        return None
    if ir.schema(op).name != FXOPT_NORM:
        return None
    a = ir.arguments(op)
    if any(a[k] is not None for k in ("residual", "gate", "scale", "shift")):
        return None
    return Norm(node, a["x"], a["norm"], a["eps"], a["weight"], a["bias"], a["weight_offset"])


def factors(node: Any) -> tuple[Any, Any] | None:
    """(a, b) if `node` is a * b."""
    if ir.is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        return node.args[0], node.args[1]
    return None


def terms(node: Any) -> tuple[Any, Any] | None:
    """(a, b) if `node` is a + b."""
    if ir.is_call(node, aten.add.Tensor, aten.add.Scalar):
        a = ir.arguments(node)
        return (node.args[0], node.args[1]) if a["alpha"] == 1 else None
    return None


def offset_by_one(node: Any) -> tuple[Any, float]:
    """(s, 1.0) if `node` is 1 + s, else (node, 0.0)."""
    pair = terms(node)
    if pair is not None:
        for a, b in (pair, pair[::-1]):
            if isinstance(a, fx.Node) and not isinstance(b, fx.Node) and b == 1:
                return a, 1.0
    return node, 0.0


def sum_with_product(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(r, a, b) if `node` is r + a * b over tensors, looking through casts of the product."""
    if ir.is_call(node, aten.addcmul.default):
        if ir.arguments(node)["value"] != 1:
            return None
        return node.args
    pair = terms(node)
    if pair is None or any(ir.tensor(p) is None for p in pair):
        return None
    for residual, product in (pair, pair[::-1]):
        ab = factors(ir.skip_casts(product))
        if ab is not None and all(ir.tensor(f) is not None for f in ab):
            return residual, ab[0], ab[1]
    return None


def skip_upcasts(node: fx.Node) -> fx.Node:
    """The narrowest tensor that holds the same values: behind casts to wider dtypes."""
    while ir.is_call(node, *ir.CASTS) and ir.is_floating(node) and ir.is_floating(node.args[0]):
        source: fx.Node = node.args[0]
        if ir.dtype(source).itemsize > ir.dtype(node).itemsize:
            break
        node = source
    return node


def through_casts(node: fx.Node) -> fx.Node:
    """The last of the casts that `node` goes through before anything else uses it."""
    while len(node.users) == 1 and ir.is_call(next(iter(node.users)), *ir.CASTS):
        node = next(iter(node.users))
    return node


def broadcasts_into(small: Any, big: fx.Node) -> bool:
    """Whether tensor `small` broadcasts to `big`'s shape without changing it."""
    if ir.tensor(small) is None:
        return False
    a, b = ir.shape(small), ir.shape(big)
    if len(a) > len(b):
        return False
    return all(ir.same(x, 1) or ir.same(x, y) for x, y in zip(a[::-1], b[::-1], strict=False))
