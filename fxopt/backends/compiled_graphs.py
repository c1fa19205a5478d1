"""What `torch.compile(backend="fxopt")` has done in this process, graph by graph.

Dynamo tells a backend nothing of the model, but its graph takes the parameters as inputs: whose
they are, the graph is.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass

from torch import fx, nn

from fxopt.report import Report


@dataclass(frozen=True)
class CompiledGraph:
    """One graph, and the parameters that it was compiled for."""

    report: Report
    parameters: tuple[weakref.ref[nn.Parameter], ...]

    def read(self) -> frozenset[int]:
        """Identities of the parameters that are still there."""
        return frozenset(id(p) for ref in self.parameters if (p := ref()) is not None)


GRAPHS: list[CompiledGraph] = []


def note(gm: fx.GraphModule, report: Report) -> None:
    """Keep what was done to a graph of Dynamo's."""
    inputs = (n.meta.get("grapharg") for n in gm.graph.find_nodes(op="placeholder"))
    values = (getattr(i, "example", None) for i in inputs)
    parameters = tuple(weakref.ref(v) for v in values if isinstance(v, nn.Parameter))
    GRAPHS.append(CompiledGraph(report, parameters))


def reports_of(model: nn.Module, is_compiled: bool) -> list[Report]:
    """Of the graphs that read parameters of `model`, for each set of parameters the last: a graph
    that is compiled again, for other sizes, is still one.

    Graphs that read no parameter may be anybody's and count for a model with graphs of its own. If
    there are none although it or a part of it is compiled, all count: Dynamo may run a model on a
    graph that it has compiled for another of the same kind, and FSDP2 gives blocks other parameters
    for their forward.
    """
    own = frozenset(map(id, model.parameters()))
    found: dict[Hashable, Report] = {}
    is_known = False
    for index, graph in enumerate(GRAPHS):
        read = graph.read()
        is_known |= bool(read & own)
        if read & own or not graph.parameters:
            found[read or index] = graph.report
    if is_known:
        return list(found.values())
    return [graph.report for graph in GRAPHS] if is_compiled else []
