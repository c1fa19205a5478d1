"""The ops that norm and modulate, by what else they are: the one list for passes over graphs."""

from __future__ import annotations

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

# Of streams that are all as they are, and of streams of which some are by segment.
STREAMS = norm_modulate_linears_streams, norm_modulate_segments_linears_streams
QUANTIZED_STREAMS = (
    norm_modulate_quantized_linears_streams,
    norm_modulate_segments_quantized_linears_streams,
)
OF_STREAMS = (*STREAMS, *QUANTIZED_STREAMS)
_BY_SEGMENT = norm_modulate_segments_linears, norm_modulate_segments_quantized_linears
# Those of one stream whose operands are looked up by an index; all of one stream.
BY_SEGMENT = (norm_modulate_segments, *_BY_SEGMENT)
ALONE = (
    norm_modulate,
    norm_modulate_linears,
    norm_modulate_quantized_linears,
    *BY_SEGMENT,
)
# One autograd node with the linears behind it.
WITH_LINEARS = (
    norm_modulate_linears,
    norm_modulate_quantized_linears,
    *_BY_SEGMENT,
    *OF_STREAMS,
)
