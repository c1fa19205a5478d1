"""Writes to slices of a tensor as joins of what was written, which mutate nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxopt.passes import ir
from fxopt.passes.grad_modes import grad_modes
from fxopt.passes.ir import aten
from fxopt.passes.regions import between

END = 2**63 - 1


def join_write(graph: fx.Graph, copy: fx.Node) -> None:
    """`x[:, n:] = f(x[:, n:])`, where nothing else sees x's memory, is a cat with x[:, :n].

    CogView, CogVideoX and EasyAnimate rotate the image of a joint sequence so. The same bits:
    forward the cat copies what was not written, too, backward it spares a copy and zeros.
    """
    arguments: Any = copy.args
    view, value = arguments[:2]
    if not ir.is_call(view, aten.slice.Tensor) or copy.users or len(view.users) != 1:
        return
    x, a = view.args[0], ir.arguments(view)
    start, stop = a["start"], a["end"]
    is_first, is_last = start in (None, 0), stop in (None, END)
    if a["step"] != 1 or is_first == is_last or ir.tensor(value) is None or not _is_own(x):
        return
    if not ir.same(ir.shape(view), ir.shape(value)) or not between(x, value):
        return
    readers = [u for u in x.users if u > copy]
    if not _is_unseen(x, view, copy) or not _in_one_mode(graph, x, copy, *readers):
        return
    bounds = (stop, END) if is_first else (0, start)
    with graph.inserting_after(copy):
        rest = call(graph, copy, aten.slice.Tensor, x, a["dim"], *bounds)
    with graph.inserting_after(rest):
        part = call(graph, copy, aten.to.dtype, value, ir.dtype(x))
    with graph.inserting_after(part):
        joined = call(
            graph, copy, aten.cat.default, [part, rest][:: 1 if is_first else -1], a["dim"]
        )
    for reader in readers:
        reader.replace_input_with(x, joined)
    graph.erase_node(copy)
    graph.erase_node(view)


def _in_one_mode(graph: fx.Graph, *nodes: fx.Node) -> bool:
    """Whether autograd is on for all or for none: a write without gradients leaves those of the
    whole tensor as they were."""
    modes = grad_modes(graph)
    return len({modes[node] for node in nodes}) == 1


def _is_own(x: Any) -> bool:
    """Whether `x` is made by an op and has memory of its own."""
    if x.op != "call_function" or not isinstance(x.target, torch._ops.OpOverload):
        return False
    returns = x.target._schema.returns
    is_new = len(returns) == 1 and returns[0].alias_info is None and ir.tensor(x) is not None
    return is_new and not ir.mutates(x) and not any(ir.shares(x, i) for i in x.all_input_nodes)


def _is_unseen(x: fx.Node, view: fx.Node, copy: fx.Node) -> bool:
    """Whether nothing that may share x's memory, and was made before the write, is read after it or
    written elsewhere."""
    stack, seen = [u for u in x.users if u < copy and u is not view], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node > copy or ir.mutates(node):
            return False
        if node not in seen and not _is_own(node):
            stack += [u for u in node.users if u is not copy or node is not copy.args[1]]
        seen.add(node)
    return True


@dataclass(frozen=True)
class _Write:
    """`buffer[..., start:stop:step] = value`."""

    view: fx.Node
    copy: fx.Node
    start: int
    stop: int
    step: int

    @property
    def value(self) -> Any:
        return self.copy.args[1]


def join_writes(graph: fx.Graph, buffer: fx.Node) -> None:
    """A buffer filled by two slice writes over the last dim is a stack, or a cat, of the two.

    Even and odd channels, or the two halves: the same bits by one kernel instead of three, and
    the graph is free of mutation.
    """
    writes = [w for w in map(_as_write, buffer.users) if w is not None]
    readers = [u for u in buffer.users if u not in {w.view for w in writes}]
    size = ir.shape(buffer)[-1] if ir.tensor(buffer) is not None else None
    if len(writes) != 2 or not isinstance(size, int) or any(r < writes[-1].copy for r in readers):
        return
    if not _in_one_mode(graph, *(w.copy for w in writes)):
        return
    first, second = sorted(writes, key=lambda w: w.start)
    spans = [(w.start, min(w.stop, size), w.step) for w in (first, second)]
    if spans == [(0, size, 2), (1, size, 2)]:
        join, arguments = aten.stack.default, (-1,)
    elif spans == [(0, size // 2, 1), (size // 2, size, 1)]:
        join, arguments = aten.cat.default, (-1,)
    else:
        return
    last = max(w.copy for w in writes)
    with graph.inserting_after(last):
        parts = [call(graph, last, aten.to.dtype, w.value, ir.dtype(buffer)) for w in writes]
        parts = [parts[writes.index(first)], parts[writes.index(second)]]
        joined = call(graph, last, join, parts, *arguments)
        if join is aten.stack.default:
            joined = call(graph, last, aten.flatten.using_ints, joined, -2, -1)
    for reader in readers:
        reader.replace_input_with(buffer, joined)
    for write in writes:
        graph.erase_node(write.copy)
        graph.erase_node(write.view)
    ir.toposort(graph)


def _as_write(view: fx.Node) -> _Write | None:
    if not ir.is_call(view, aten.slice.Tensor) or len(view.users) != 1:
        return None
    copy, a = next(iter(view.users)), ir.arguments(view)
    last_dim = len(ir.shape(view)) - 1
    if not ir.is_call(copy, aten.copy_.default) or copy.args[0] is not view or copy.users:
        return None
    if a["dim"] % (last_dim + 1) != last_dim or ir.tensor(copy.args[1]) is None:
        return None
    if not ir.same(ir.shape(view), ir.shape(copy.args[1])):
        return None
    start, stop = a["start"] or 0, a["end"] if a["end"] is not None else 2**63 - 1
    if not all(isinstance(i, int) and i >= 0 for i in (start, stop)):
        return None
    return _Write(view, copy, start, stop, a["step"])


def call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node where `graph` inserts, from the same line of the model's source as `like`."""
    node = graph.call_function(target, args)
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    values = map_arg(args, lambda n: n.meta["val"])
    fake_mode = detect_fake_mode(pytree.tree_leaves(values))
    with torch.no_grad(), fake_mode or nullcontext():
        node.meta["val"] = target(*values)
    return node
