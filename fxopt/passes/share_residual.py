"""The residual goes on from the norm's node, which adds both gradients of it in its one pass."""

from __future__ import annotations

import operator

from torch import fx

from fxopt.passes import ir, norm_ops


def share_residual(graph: fx.Graph) -> None:
    """Let later ops read a norm's input from the norm's node, which then adds up its gradient."""
    norms = *norm_ops.ALONE, *norm_ops.OF_STREAMS
    for node in list(graph.nodes):
        if not ir.is_call(node, *norm_ops.WITH_LINEARS):
            continue
        is_one = not ir.is_call(node, *norm_ops.OF_STREAMS)
        xs, residuals = ([a] if is_one else a for a in node.args[:2])
        for i, (x, residual) in enumerate(zip(xs, residuals, strict=True)):
            readers = [u for u in x.users if u > node and ir.is_call(u, *norms)]
            if residual is None and readers and not ir.is_written(x, graph):
                with graph.inserting_after(node):
                    h = graph.call_function(operator.getitem, (node, 1))
                if not is_one:
                    with graph.inserting_after(h):
                        h = graph.call_function(operator.getitem, (h, i))
                h.meta = dict(x.meta)
                for reader in readers:
                    reader.replace_input_with(x, h)
