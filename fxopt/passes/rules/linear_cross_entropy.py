"""The last linear of a language model and its cross-entropy as one op that never holds all logits.

Between the two may stand casts to a wider dtype, views that keep the logits of a token together,
and slices of the tokens: they are made of the linear's input instead. A log_softmax of a token's
logits is the first half of a loss that is written in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Binding, Call, Reason, Rule

REDUCTIONS = {1: "mean", 2: "sum"}
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
)
SWAPS = (aten.transpose.int, aten.permute.default)
CROSS_ENTROPY = aten.cross_entropy_loss.default
LOG_SOFTMAX = aten.log_softmax.int


@dataclass(frozen=True)
class Logits:
    """Where a loss has its scores from.

    path: what moves or widens them on their way to the loss, first to last.
    node: what makes them.
    class_dim: the dim of that over which the loss takes its softmax.
    is_normalized: whether a log_softmax is on the path.
    """

    path: list[fx.Node]
    node: fx.Node
    class_dim: int
    is_normalized: bool


def propose(anchor: fx.Node) -> Iterator[Binding | Reason]:
    scores = anchor.args[0]
    assert isinstance(scores, fx.Node)
    logits = _logits(scores)
    if anchor.target is not CROSS_ENTROPY and not logits.is_normalized:
        return
    operands = _operands(logits.node)
    if operands is None or logits.class_dim != len(ir.shape(logits.node)) - 1:
        if any(_operands(n) is not None for n in logits.node.all_input_nodes):
            name = f"{logits.node.name} ({logits.node.target})"
            yield Reason(f"{name} stands between the last linear and the loss", logits.node)
        return
    reasons = list(_obstacles(anchor, logits.node, operands))
    yield from reasons
    if not reasons:
        yield _bind(anchor, logits.path, operands)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Input, weight and bias of a linear, by that name or as x @ weight.t()."""
    if ir.is_call(node, ir.LINEAR):
        a = ir.arguments(node)
        return a["input"], a["weight"], a["bias"]
    if ir.is_call(node, aten.matmul.default, aten.mm.default):
        x, other = node.args
        if ir.is_call(other, aten.t.default, *SWAPS) and len(ir.shape(other)) == 2:
            return None if _order(other) == [0, 1] else (x, other.args[0], None)
    return None


def _logits(scores: fx.Node) -> Logits:
    path: list[fx.Node] = []
    is_normalized = False
    node, class_dim = scores, min(1, len(ir.shape(scores)) - 1)
    while ir.is_call(
        node, *ir.COPIES, *ir.CASTS, *RESHAPES, *SWAPS, aten.slice.Tensor, LOG_SOFTMAX
    ):
        before = node.args[0]
        last = len(ir.shape(before)) - 1
        if ir.is_call(node, *SWAPS):
            order = _order(node)
            moved = order.pop(class_dim)
            # What comes after counts its dims otherwise.
            if (
                order != sorted(order)
                or moved != last
                or any(ir.is_call(n, *ir.VIEWS) for n in path)
            ):
                break
            class_dim = last
        elif ir.is_call(node, *RESHAPES):
            if class_dim != len(ir.shape(node)) - 1:
                break
            if not ir.same(ir.shape(before)[-1], ir.shape(node)[-1]):
                break
            class_dim = last
        elif ir.is_call(node, aten.slice.Tensor):
            if ir.arguments(node)["dim"] % (last + 1) == class_dim:
                break
        elif ir.is_call(node, LOG_SOFTMAX):
            if ir.arguments(node)["dim"] % (last + 1) != class_dim or not _widens(node):
                break
            is_normalized = True
        elif ir.is_call(node, *ir.CASTS) and not _widens(node):
            break
        path.insert(0, node)
        node = before
    return Logits(path, node, class_dim, is_normalized)


def _order(swap: ir.Call) -> list[int]:
    """The dims of the input in the order in which a transpose or permute has them."""
    a, rank = ir.arguments(swap), len(ir.shape(swap))
    if ir.is_call(swap, aten.permute.default):
        return [d % rank for d in a["dims"]]
    order = list(range(rank))
    i, j = (a[name] % rank for name in ("dim0", "dim1")) if "dim0" in a else (0, -1)
    order[i], order[j] = order[j], order[i]
    return order


def _widens(node: ir.Call) -> bool:
    before, after = ir.dtype(node.args[0]), ir.dtype(node)
    return torch.promote_types(before, after) == after


def _obstacles(
    loss: fx.Node, logits: fx.Node, operands: tuple[fx.Node, fx.Node, fx.Node | None]
) -> Iterator[Reason]:
    a = ir.arguments(loss)
    num_logits, num_features = ir.shape(operands[1])
    if ir.dtype(operands[0]) == torch.float16:
        why = "the op rounds float16 gradients before the loss's scale reaches them"
        yield Reason(why, logits, "train in bfloat16")
    if ir.is_floating(a["target"]):
        yield Reason("the targets are probabilities, not classes", a["target"])
    if a["weight"] is not None:
        yield Reason("the classes are weighted", loss)
    if a.get("label_smoothing"):
        yield Reason(f"the labels are smoothed by {a['label_smoothing']:g}", loss)
    if a["reduction"] not in REDUCTIONS:
        yield Reason("every token's own loss is asked for", loss)
    if not isinstance(num_logits, int) or not isinstance(num_features, int):
        yield Reason("the linear's sizes are not fixed", logits)
    elif num_logits <= num_features:
        why = f"{num_logits} logits are no more than the {num_features} features they are made of"
        yield Reason(f"{why}: there is little to save", logits)


def _bind(
    loss: fx.Node, path: list[fx.Node], operands: tuple[fx.Node, fx.Node, fx.Node | None]
) -> Binding:
    a, dtype = ir.arguments(loss), ir.dtype(loss)
    listed = (*operands, a["target"])
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))
    num_features = ir.shape(operands[1])[-1]

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        x, weight, bias, target = (given[n] for n in listed)
        for node in path:
            if ir.is_call(node, aten.flatten.using_ints, aten.slice.Tensor):
                x = call(node.target, x, *node.args[1:], **node.kwargs)
            elif ir.is_call(node, *RESHAPES):
                x = call(aten.reshape.default, x, [*node.args[1][:-1], num_features])
        settings = (a["ignore_index"], REDUCTIONS[a["reduction"]])
        found = call(linear_cross_entropy, x, weight, bias, target, *settings)
        opmath = torch.float64 if dtype == torch.float64 else torch.float32
        return found if dtype == opmath else call(aten.to.dtype, found, dtype)

    # The path only moves rows and widens what is in them. A probe would be as large as the weight.
    op = "linear_cross_entropy_gradients"
    return Binding(loss, inputs, (loss,), emit, op, regroups=True)


RULE = Rule(
    name="linear_cross_entropy",
    version=1,
    anchors=(
        CROSS_ENTROPY,
        aten.nll_loss_nd.default,
        aten.nll_loss.default,
        aten.nll_loss2d.default,
    ),
    propose=propose,
)
