"""norm_modulate by a gate, scale or shift per token that are rows of a small table, as one op.

What `where` or an index writes out for each token is then never in memory. A compiler computes it
where it is read, so the rule serves eager execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_segments import TABLES, norm_modulate_segments
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.lookup import Lookup, apply, is_one_row, lookup
from fxopt.passes.rule import Binding, Call, Reason, Rule


def propose(op: fx.Node) -> Iterator[Binding | Reason]:
    named = ir.arguments(op)
    given = {name: named[name] for name in TABLES if named[name] is not None}
    reads = {name: lookup(node) for name, node in given.items()}
    found = {name: read for name, read in reads.items() if isinstance(read, Lookup)}
    unread = {name: read for name, read in reads.items() if isinstance(read, str)}
    if unread:
        yield Reason("; ".join(f"the {name}: {why}" for name, why in unread.items()), op)
    if unread or not found:
        return
    first = next(iter(found.values()))
    for name, node in given.items():
        read = found.get(name)
        is_addend = name == "shift" and ir.same(ir.shape(node), ir.shape(named["x"]))
        if read is None and not is_addend and not is_one_row(node):
            yield Reason(f"the {name} differs per token, and is no row of a table", op)
            return
        if read is not None and not _share_index(read, first):
            yield Reason(f"the {name} is looked up by another index than {next(iter(found))}", op)
            return
    yield _bind(op, found, first)


def _share_index(a: Lookup, b: Lookup) -> bool:
    is_same = a.index is b.index and a.num_trailing == b.num_trailing
    return is_same and ir.same(a.num_rows, b.num_rows) and ir.same(a.lengths, b.lengths)


def _bind(op: fx.Node, found: Mapping[str, Lookup], first: Lookup) -> Binding:
    named = ir.arguments(op)
    tensors = dict(list(named.items())[:8])
    tables = {name: read.table for name, read in found.items()}
    listed = [n for name, n in tensors.items() for n in tables.get(name, (n,))]
    inputs = tuple(dict.fromkeys(n for n in (*listed, first.index) if n is not None))
    outputs = tuple(op.users)
    shift = named["shift"]
    shift_per_token = shift is not None and "shift" not in found and not is_one_row(shift)

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        operands = [
            _table(call, found[name], given, op) if name in found else given[n]
            for name, n in tensors.items()
        ]
        index = _index(call, first, given, named["x"])
        fused = call(norm_modulate_segments, *operands, index, shift_per_token, *op.args[8:])
        return tuple(call(operator.getitem, fused, out.args[1]) for out in outputs)

    stays = tuple(n for read in found.values() for n in read.nodes)
    name = "norm_modulate_segments"
    return Binding(op, inputs, outputs, emit, name, carries=outputs, stays=stays)


def _index(call: Call, read: Lookup, given: Mapping[Any, Any], x: fx.Node) -> fx.Node:
    """The index as one node: [..., S], or [S] where each row is that of a stretch of tokens."""
    if read.index is not None:
        index: fx.Node = given[read.index]
        return call(aten.squeeze.dim, index, -1) if read.num_trailing else index
    parts = [
        call(aten.new_full.default, given[x], [length], i, dtype=torch.int32)
        for i, length in enumerate(read.lengths)
    ]
    return call(aten.cat.default, parts)


def _share_indices(graph: fx.Graph) -> None:
    """Ops with equal stretches of tokens read one index."""
    seen: dict[Any, fx.Node] = {}
    for op in graph.find_nodes(op="call_function", target=norm_modulate_segments):
        index = ir.arguments(op)["index"]
        key = _fills(index) if ir.is_call(index, aten.cat.default) else None
        if key is not None:
            op.replace_input_with(index, seen.setdefault(key, index))


def _fills(index: ir.Call) -> tuple[Any, ...] | None:
    """What an index of stretches is filled with, if the graph alone decides it."""
    fills = index.args[0]
    if not all(ir.is_call(n, aten.new_full.default) and len(ir.shape(n)) == 1 for n in fills):
        return None
    if any(ir.is_written(n, index.graph) for n in (*fills, index)):
        return None
    return tuple((str(ir.shape(n)), n.args[2], ir.dtype(n), n.meta["val"].device) for n in fills)


def _table(call: Call, read: Lookup, given: Mapping[Any, Any], op: fx.Node) -> fx.Node:
    """The table as one node."""
    table = _joined(call, read, [given[n] for n in read.table])
    for dim, size in enumerate(read.taken):
        if dim != len(read.taken) - 2 and not ir.same(size, ir.shape(read.table[0])[dim]):
            if not isinstance(size, int):
                size = call(aten.sym_size.int, given[op.args[0]], dim)
            table = call(aten.narrow.default, table, dim, 0, size)
    for function in read.functions:
        table = apply(call, function, table)
    return table


def _joined(call: Call, read: Lookup, nodes: list[Any]) -> fx.Node:
    if len(nodes) == 1:
        found: fx.Node = nodes[0]
        return found
    first, *others = (ir.shape(n) for n in read.table)
    rows = [call(aten.unsqueeze.default, n, 0) if len(first) == 1 else n for n in nodes]
    if not all(ir.same(first, other) for other in others):
        same = call(aten.broadcast_tensors.default, rows)
        rows = [call(operator.getitem, same, i) for i in range(len(rows))]
    return call(aten.cat.default, rows, -2)


RULE = Rule(
    name="norm_modulate_segments",
    version=2,
    anchors=(norm_modulate,),
    propose=propose,
    compiled=False,
    finish=_share_indices,
)
