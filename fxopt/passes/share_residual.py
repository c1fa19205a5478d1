"""The residual goes on from the norm's node, which adds both gradients of it in its one pass."""

from __future__ import annotations

import operator

from torch import fx

from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_linears import (
    norm_modulate_linears,
    norm_modulate_linears_streams,
)
from fxopt.kernels.norm_modulate_quantized_linears import (
    norm_modulate_quantized_linears,
    norm_modulate_quantized_linears_streams,
)
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.norm_modulate_segments_linears import (
    norm_modulate_segments_linears,
    norm_modulate_segments_linears_streams,
)
from fxopt.kernels.norm_modulate_segments_quantized_linears import (
    norm_modulate_segments_quantized_linears,
    norm_modulate_segments_quantized_linears_streams,
)
from fxopt.passes import ir

NODES_OF_STREAMS = (
    norm_modulate_linears_streams,
    norm_modulate_segments_linears_streams,
    norm_modulate_quantized_linears_streams,
    norm_modulate_segments_quantized_linears_streams,
)
NODES_OF_NORMS = (
    *NODES_OF_STREAMS,
    norm_modulate_linears,
    norm_modulate_segments_linears,
    norm_modulate_quantized_linears,
    norm_modulate_segments_quantized_linears,
)
FUSED_NORMS = (norm_modulate, norm_modulate_segments, *NODES_OF_NORMS)


def share_residual(graph: fx.Graph) -> None:
    """Let later ops read a norm's input from the norm's node, which then adds up its gradient."""
    for node in list(graph.nodes):
        if not ir.is_call(node, *NODES_OF_NORMS):
            continue
        is_one = not ir.is_call(node, *NODES_OF_STREAMS)
        xs, residuals = ([a] if is_one else a for a in node.args[:2])
        for i, (x, residual) in enumerate(zip(xs, residuals, strict=True)):
            readers = [u for u in x.users if u > node and ir.is_call(u, *FUSED_NORMS)]
            if residual is None and readers and not ir.is_written(x, graph):
                with graph.inserting_after(node):
                    h = graph.call_function(operator.getitem, (node, 1))
                if not is_one:
                    with graph.inserting_after(h):
                        h = graph.call_function(operator.getitem, (h, i))
                h.meta = dict(x.meta)
                for reader in readers:
                    reader.replace_input_with(x, h)
