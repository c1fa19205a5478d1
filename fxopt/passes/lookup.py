"""Reading off a graph that a tensor holds, for each token, a row of a small table."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from typing_extensions import TypeIs

from fxopt.passes import ir, symbols
from fxopt.passes.ir import aten
from fxopt.passes.rule import Call

# Of each element by itself: f(table[index]) is f(table)[index].
POINTWISE = (
    *ir.CASTS,
    *ir.COPIES,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.neg.default,
)
LOOKUPS = (
    aten.where.self,
    aten.index_select.default,
    aten.gather.default,
    aten.take_along_dim.default,
    aten.index.Tensor,
    aten.embedding.default,
)


@dataclass(frozen=True)
class Lookup:
    """table[index] for each token.

    table: nodes [..., N, D] that make up the table: one, or several of one row each, of which a
        condition has two.
    index: of each token, behind as many dims of 1 as `num_trailing`; bool for a condition. None
        where each row is that of a stretch of tokens.
    lengths: of the stretches, in tokens.
    functions: nodes that follow, in order, to be applied to the table: of `POINTWISE`, and views of
        part of the last dim.
    nodes: all that lies between the table and what was read.
    taken: sizes of what was read, where a gather may take fewer samples or channels than there are.
    """

    table: tuple[fx.Node, ...]
    index: fx.Node | None
    num_trailing: int = 0
    lengths: tuple[Any, ...] = ()
    functions: tuple[fx.Node, ...] = ()
    nodes: tuple[fx.Node, ...] = ()
    taken: tuple[Any, ...] = ()

    @property
    def num_rows(self) -> object:
        """N; a size, maybe symbolic."""
        return len(self.table) if len(self.table) > 1 else ir.shape(self.table[0])[-2]


def lookup(node: fx.Node | None) -> Lookup | str | None:
    """How `node`, [..., S, D], looks its rows up; None if it does not, or why it cannot be read.

    Reads where(condition, a, b) with a condition per token and one row on both sides, cat of rows
    that are expanded for stretches of tokens, and index_select, table[index], embedding and gather
    of a table, each of which may be wider than what `node` takes of it.
    """
    if node is None or ir.tensor(node) is None or is_one_row(node):
        return None
    functions: list[fx.Node] = []
    while ir.is_call(node, *POINTWISE) or _is_part(node):
        functions.append(node)
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
    found = _condition(node) or _stretches(node) or _indexed(node)
    if not isinstance(found, Lookup):
        return found
    between = (node, *(n for n in node.all_input_nodes if n not in (*found.table, found.index)))
    nodes = (*functions, *between, *found.nodes)
    return replace(found, functions=tuple(functions[::-1]), nodes=nodes)


def apply(call: Call, function: fx.Node, table: fx.Node) -> fx.Node:
    """One of a lookup's functions, on its table."""
    if ir.is_call(function, operator.getitem):
        return call(operator.getitem, table, function.args[1])
    named = ir.arguments(function)
    if not ir.is_call(function, *POINTWISE):
        named["dim"] = -1
    others = ir.schema(function).arguments[1:]
    args = [named[a.name] for a in others if not a.kwarg_only]
    kwargs = {a.name: named[a.name] for a in others if a.kwarg_only}
    return call(function.target, table, *args, **kwargs)


def is_piece(node: fx.Node) -> bool:
    """Whether `node` is one of several vectors of each token, side by side or along a dim of their
    own."""
    while ir.is_call(node, *POINTWISE, aten.squeeze.dim):
        node = node.args[0]
    if ir.is_call(node, aten.select.int):
        return True
    if ir.is_call(node, operator.getitem):
        node = node.args[0]
        if ir.is_call(node, aten.unbind.int):
            return True
    if not ir.is_call(node, *ir.SPLITS, aten.slice.Tensor):
        return False
    a, sizes = ir.arguments(node), ir.shape(node.args[0])
    return len(sizes) > 3 or a["dim"] % len(sizes) == len(sizes) - 1


def _is_part(node: fx.Node) -> bool:
    """Whether `node` is part of the last dim of its input, or splits that dim."""
    if ir.is_call(node, operator.getitem):
        return ir.is_call(node.args[0], *ir.SPLITS)
    if not ir.is_call(node, *ir.SPLITS, aten.slice.Tensor):
        return False
    rank = len(ir.shape(node.args[0]))
    return ir.arguments(node)["dim"] % rank == rank - 1


def _condition(where: fx.Node) -> Lookup | None:
    if not ir.is_call(where, aten.where.self):
        return None
    named = ir.arguments(where)
    condition, a, b = (_unexpanded(named[name]) for name in ("condition", "self", "other"))
    if not (ir.same(ir.shape(condition)[-1:], (1,)) and is_one_row(a) and is_one_row(b)):
        return None
    return Lookup((b, a), condition, 1)


def _stretches(cat: fx.Node) -> Lookup | str | None:
    if not ir.is_call(cat, aten.cat.default):
        return None
    named, sizes = ir.arguments(cat), ir.shape(cat)
    pieces = named["tensors"]
    rows = tuple(map(_unexpanded, pieces))
    along_tokens = len(sizes) > 1 and named["dim"] % len(sizes) == len(sizes) - 2
    if not along_tokens or not all(map(is_one_row, rows)) or len({*map(_rank, rows)}) > 1:
        return None
    lengths = tuple(ir.shape(piece)[-2] for piece in pieces)
    if not all(symbols.is_known(length, cat.graph) for length in lengths):
        return f"{cat.name} joins a stretch whose length is no sum of sizes of the inputs"
    return Lookup(rows, None, lengths=lengths, nodes=tuple(pieces))


def _rank(node: fx.Node) -> int:
    return len(ir.shape(node))


def _indexed(node: fx.Node) -> Lookup | str | None:
    if ir.is_call(node, aten.index_select.default):
        table, dim, index = node.args
        rank = len(ir.shape(table))
        return Lookup((table,), index) if rank > 1 and dim % rank == rank - 2 else None
    if ir.is_call(node, aten.gather.default, aten.take_along_dim.default):
        return _gathered(node)
    if ir.is_call(node, aten.index.Tensor):
        table, (index, *others) = node.args
        if others or index is None or len(ir.shape(table)) != 2:
            return (
                f"{node.name} indexes {len(ir.shape(table))} dims by other than one index of rows"
            )
        # A mask would pick some of the rows.
        return None if _is_mask(index) else Lookup((table,), index)
    if ir.is_call(node, aten.embedding.default):
        a = ir.arguments(node)
        if a["padding_idx"] >= 0 or a["scale_grad_by_freq"]:
            return f"{node.name} is an embedding whose gradient leaves out or scales rows"
        if a["sparse"]:
            return f"{node.name} is an embedding whose gradient is sparse"
        return Lookup((a["weight"],), a["indices"])
    return None


def _gathered(node: fx.Node) -> Lookup | str:
    a = ir.arguments(node)
    table, dim, index = a["self"], a["dim"], a.get("index") or a["indices"]
    rank = len(ir.shape(table))
    if rank < 2 or dim is None or dim % rank != rank - 2:
        return f"{node.name} gathers along dim {dim} of {rank}, not along rows"
    copies: list[fx.Node] = []
    while _repeats(index) or ir.is_call(index, *ir.COPIES) or _widens(index):
        copies.append(index)
        index = index.args[0]
    if not ir.same(ir.shape(index)[-1], 1):
        return f"{node.name} gathers by {index.name}, which may differ from channel to channel"
    taken, there = ir.shape(node), ir.shape(table)
    # The other broadcasts: it takes all that there is.
    takes_less = ir.is_call(node, aten.gather.default) and not (
        ir.same(taken[:-2], there[:-2]) and ir.same(taken[-1], there[-1])
    )
    return Lookup((table,), index, 1, nodes=tuple(copies), taken=taken if takes_less else ())


def _widens(index: fx.Node) -> TypeIs[ir.Call]:
    """Whether `index` is an index of another width; a mask or a number is none."""
    source = ir.tensor(index.args[0]) if ir.is_call(index, *ir.CASTS) else None
    return source is not None and source.dtype in (torch.int32, torch.int64)


def is_one_row(node: fx.Node) -> bool:
    """Whether all tokens share what `node` holds."""
    sizes = ir.shape(node)
    return len(sizes) == 1 or (len(sizes) > 1 and ir.same(sizes[-2], 1))


def _unexpanded(node: fx.Node) -> fx.Node:
    while _repeats(node):
        node = node.args[0]
    return node


def _repeats(node: fx.Node) -> TypeIs[ir.Call]:
    """Whether `node` holds its input several times, along dims that had one of it."""
    if ir.is_call(node, aten.expand.default, aten.expand_as.default, aten.broadcast_to.default):
        return True
    if not ir.is_call(node, aten.repeat.default, aten.tile.default):
        return False
    sizes = ir.shape(node), ir.shape(node.args[0])
    ranks = map(len, sizes)
    return len(set(ranks)) == 1 and all(
        ir.same(own, 1) or ir.same(all, own) for all, own in zip(*sizes, strict=True)
    )


def _is_mask(node: fx.Node) -> bool:
    value = ir.tensor(node)
    return value is None or value.element_size() == 1
