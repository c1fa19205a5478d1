"""Reading off a graph that a tensor holds, for each token, a row of a small table."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

from torch import fx

from fxopt.passes import ir
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

    table: nodes [..., N, D] that make up the table: one, or two of one row for a condition.
    index: of each token, behind as many dims of 1 as `num_trailing`; bool for a condition.
    functions: nodes that follow, in order, to be applied to the table: of `POINTWISE`, and views of
        part of the last dim.
    nodes: all that lies between the table and what was read.
    """

    table: tuple[fx.Node, ...]
    index: fx.Node
    num_trailing: int = 0
    functions: tuple[fx.Node, ...] = ()
    nodes: tuple[fx.Node, ...] = ()

    @property
    def num_rows(self) -> object:
        """N; a size, maybe symbolic."""
        return 2 if len(self.table) == 2 else ir.shape(self.table[0])[-2]


def lookup(node: fx.Node | None) -> Lookup | None:
    """How `node`, [..., S, D], looks its rows up; None if it does not.

    Reads where(condition, a, b) with a condition per token and one row on both sides, and
    index_select, table[index], embedding and gather of a table, each of which may be wider than
    what `node` takes of it.
    """
    if node is None or ir.tensor(node) is None or is_one_row(node):
        return None
    functions: list[fx.Node] = []
    while ir.is_call(node, *POINTWISE) or _is_part(node):
        functions.append(node)
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
    found = _condition(node) if ir.is_call(node, aten.where.self) else _indexed(node)
    if found is None:
        return None
    between = (node, *(n for n in node.all_input_nodes if n not in (*found.table, found.index)))
    return replace(found, functions=tuple(functions[::-1]), nodes=(*functions, *between))


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


def _is_part(node: fx.Node) -> bool:
    """Whether `node` is part of the last dim of its input, or splits that dim."""
    if ir.is_call(node, operator.getitem):
        return ir.is_call(node.args[0], *ir.SPLITS)
    if not ir.is_call(node, *ir.SPLITS, aten.slice.Tensor):
        return False
    rank = len(ir.shape(node.args[0]))
    return ir.arguments(node)["dim"] % rank == rank - 1


def _condition(where: fx.Node) -> Lookup | None:
    named = ir.arguments(where)
    condition, a, b = (_unexpanded(named[name]) for name in ("condition", "self", "other"))
    if not (ir.same(ir.shape(condition)[-1:], (1,)) and is_one_row(a) and is_one_row(b)):
        return None
    return Lookup((b, a), condition, 1)


def _indexed(node: fx.Node) -> Lookup | None:
    if ir.is_call(node, aten.index_select.default):
        table, dim, index = node.args
        rank = len(ir.shape(table))
        return Lookup((table,), index) if rank > 1 and dim % rank == rank - 2 else None
    if ir.is_call(node, aten.gather.default, aten.take_along_dim.default):
        a = ir.arguments(node)
        table, dim, index = a["self"], a["dim"], a.get("index") or a["indices"]
        index = _unexpanded(index)
        rank = len(ir.shape(table))
        is_per_token = (
            rank > 1
            and dim is not None
            and dim % rank == rank - 2
            and ir.same(ir.shape(index)[-1], 1)
        )
        return Lookup((table,), index, 1) if is_per_token else None
    if ir.is_call(node, aten.index.Tensor):
        table, (index, *others) = node.args
        is_rows = len(ir.shape(table)) == 2 and not others and index is not None
        # A mask would pick some of the rows.
        return Lookup((table,), index) if is_rows and not _is_mask(index) else None
    if ir.is_call(node, aten.embedding.default):
        a = ir.arguments(node)
        # The row of the padding gets no gradient.
        is_plain = a["padding_idx"] < 0 and not a["scale_grad_by_freq"]
        return Lookup((a["weight"],), a["indices"]) if is_plain else None
    return None


def is_one_row(node: fx.Node) -> bool:
    """Whether all tokens share what `node` holds."""
    sizes = ir.shape(node)
    return len(sizes) == 1 or (len(sizes) > 1 and ir.same(sizes[-2], 1))


def _unexpanded(node: fx.Node) -> fx.Node:
    while ir.is_call(node, aten.expand.default, aten.expand_as.default):
        node = node.args[0]
    return node


def _is_mask(node: fx.Node) -> bool:
    value = ir.tensor(node)
    return value is None or value.element_size() == 1
