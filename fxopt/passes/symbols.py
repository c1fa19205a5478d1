"""Symbolic sizes as nodes of a graph, for replacements that need a length which no node holds."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.rule import Call


def is_known(size: Any, graph: fx.Graph) -> bool:
    """Whether `size` is a number, or a sum of multiples of sizes that the graph's inputs have."""
    known = _sizes_of_inputs(graph)
    return isinstance(size, int) or all(
        term.is_number or term in known for term in ir.expression(size).as_coefficients_dict()
    )


def node_of(size: Any, graph: fx.Graph, call: Call) -> Any:
    """A node, or a number, that is `size`, which is known."""
    if isinstance(size, int):
        return size
    known, total = _sizes_of_inputs(graph), None
    for term, factor in ir.expression(size).as_coefficients_dict().items():
        part: Any = int(term * factor) if term.is_number else call(aten.sym_size.int, *known[term])
        if not term.is_number and factor != 1:
            part = call(operator.mul, part, int(factor))
        total = part if total is None else call(operator.add, total, part)
    return total


def _sizes_of_inputs(graph: fx.Graph) -> Mapping[Any, tuple[fx.Node, int]]:
    """For each symbolic size an input that has it, and at which dim."""
    known: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(ir.shape(node) if ir.tensor(node) is not None else ()):
            if not isinstance(size, int):
                known.setdefault(ir.expression(size), (node, dim))
    return known
