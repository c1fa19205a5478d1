"""The same words for several streams, text and image say, in one launch each way.

Which streams can share a launch is decided by the rule `merge_streams`; the others run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from fxopt.backends.swaps.branches import Branch, Mlp
from fxopt.backends.swaps.fused import (
    Normed,
    Segments,
    fire,
    gated_residual,
    ops,
    pieces,
    promoted,
    read_norm,
)
from fxopt.passes.rules.merge_streams import common_of_norms

Result = TypeVar("Result")


def _by_launch(
    commons: Sequence[Any],
    together: Callable[[list[int]], Sequence[Result]],
    alone: Callable[[int], Result],
) -> list[Result]:
    """The result for each stream; those with the same in common run `together`."""
    found: dict[int, Result] = {}
    for common in dict.fromkeys(commons):
        streams = [i for i, other in enumerate(commons) if other == common]
        if common is None or len(streams) == 1:
            found |= {i: alone(i) for i in streams}
        else:
            found |= zip(streams, together(streams), strict=True)
    return [found[i] for i in range(len(commons))]


def into(
    normed: Sequence[Normed], linears: Sequence[Sequence[nn.Module]]
) -> list[tuple[list[Tensor], Tensor]]:
    """`Normed.into` of each stream and its linears."""

    def together(streams: list[int]) -> list[tuple[list[Tensor], Tensor]]:
        given = [(normed[i], read_norm(normed[i].norm, normed[i].x)) for i in streams]
        for stream, n in given:
            stream.fire(n)
            fire("merge_linears", "norm_modulate")
        operands = [stream.operands(n) for stream, n in given]
        constants = [(*n[1:3], stream.scale_offset) for stream, n in given]
        _, *common, _ = commons[streams[0]] or ()
        outs, hs = _norms(operands, constants, common, [linears[i] for i in streams])
        rest = iter(outs)
        return [([next(rest) for _ in linears[i]], h) for i, h in zip(streams, hs, strict=True)]

    commons = [n.common(m) for n, m in zip(normed, linears, strict=True)]
    return _by_launch(commons, together, lambda i: normed[i].into(*linears[i]))


def gated_residuals(
    residuals: Sequence[Tensor],
    gates: Sequence[Tensor],
    branches: Sequence[Branch],
    segments: Sequence[Segments | None],
) -> list[Tensor]:
    """residual + gate * (x + bias) of each stream."""
    dtypes = [promoted(b.x, r, g) for r, g, b in zip(residuals, gates, branches, strict=True)]
    commons = [
        None if s else common_of_norms("none", dtype, dtype, r.shape[-1], has_linears=False)
        for r, dtype, s in zip(residuals, dtypes, segments, strict=True)
    ]

    def alone(i: int) -> Tensor:
        (x, bias), more = branches[i], segments[i]
        return gated_residual(residuals[i], gates[i], x, x_bias=bias, segments=more)

    def together(streams: list[int]) -> list[Tensor]:
        for i in streams:
            fire("norm_modulate", "norm_modulate")
            if branches[i].bias is not None:
                fire("fuse_bias", "norm_modulate")
        absent = (None,) * 4
        operands = [
            (branches[i].x, residuals[i], gates[i], *absent, branches[i].bias) for i in streams
        ]
        settings = ("none", dtypes[streams[0]], dtypes[streams[0]])
        no_numbers, no_linears = [(0.0, 0.0, 0.0)] * len(streams), [()] * len(streams)
        return _norms(operands, no_numbers, settings, no_linears)[1]

    return _by_launch(commons, together, alone)


def _norms(
    operands: Sequence[Sequence[Tensor | None]],
    constants: Sequence[tuple[float, ...]],
    common: Sequence[Any],
    linears: Sequence[Sequence[Any]],
) -> tuple[list[Tensor], list[Tensor]]:
    """`fxopt::norm_modulate_linears_streams`; every sequence but `common` is one of streams.

    constants: eps and the offsets of weight and scale. common: norm, h_dtype, dtype.
    """
    fire("merge_streams", "norm_modulate_streams")
    fields, numbers = (map(list, zip(*each, strict=True)) for each in (operands, constants))
    norm, *dtypes = common
    every = [m for of_stream in linears for m in of_stream]
    each = [pieces([m.weight for m in of_stream]) for of_stream in linears]
    outs, hs = ops.norm_modulate_linears_streams(
        *fields, norm, *numbers, *dtypes,
        [m.weight for m in every],
        [m.bias for m in every],
        [len(of_stream) for of_stream in linears],
        [number for of_stream in each for number in of_stream],
        [len(of_stream) // 3 for of_stream in each],
    )  # fmt: skip
    return outs, hs


def branches(mlps: Sequence[Mlp], hidden: Sequence[Sequence[Tensor]]) -> list[Branch]:
    """`Mlp.branch` of each stream."""

    def together(streams: list[int]) -> list[Branch]:
        for i in streams:
            fire("gated_activation", "gated_activation")
            if mlps[i].gate_bias is not None:
                fire("fuse_bias", "gated_activation")
            fire("merge_linears", "gated_activation")
        fire("merge_streams", "gated_activation_streams")
        gates, ups = zip(*((*hidden[i], None)[:2] for i in streams), strict=True)
        own = [mlps[i] for i in streams]
        waiting = [mlps[i].waiting_bias(hidden[i]) for i in streams]
        weights = [m.out.weight for m in own]
        biases = [m.out.bias if w is None else None for m, w in zip(own, waiting, strict=True)]
        gate_biases = [m.gate_bias for m in own]
        settings = (own[0].activation, own[0].packing, [None] * len(own), gate_biases)
        outs = ops.gated_activation_linear_streams(gates, ups, *settings, weights, biases)
        return [Branch(x, bias) for x, bias in zip(outs, waiting, strict=True)]

    commons = [m.common(h) for m, h in zip(mlps, hidden, strict=True)]
    return _by_launch(commons, together, lambda i: mlps[i].branch(hidden[i]))
