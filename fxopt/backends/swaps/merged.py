"""The same words for several streams, text and image say, in one launch each way.

Which streams can share a launch is decided by the rule `merge_streams`; the others run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from fxopt.backends.swaps.branches import Branch, Mlp, Out
from fxopt.backends.swaps.fused import (
    Normed,
    Segments,
    fire,
    fire_low,
    fire_modulate,
    gated_residual,
    op_of_norm,
    pieces,
    promoted,
    read_norm,
)
from fxopt.kernels.registration import ops
from fxopt.kernels.scaled_matmul import op_of
from fxopt.passes.rules.merge_streams import common_of_norms, streams_op_of
from fxopt.recipes import Recipe

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
        recipe, _, *common, _ = commons[streams[0]] or ()
        for (stream, n), i in zip(given, streams, strict=True):
            stream.fire(n)
            if recipe is None:
                fire("merge_linears", op_of_norm(stream.segments))
            else:
                fire_low(op_of_norm(stream.segments), len(linears[i]), recipe)
        operands = [stream.tensors(n) for stream, n in given]
        segments = [stream.segments for stream, _ in given]
        constants = [(*n[1:3], stream.scale_offset) for stream, n in given]
        own = [linears[i] for i in streams]
        outs, hs = _norms(operands, constants, common, own, recipe, segments)
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
        common_of_norms("none", dtype, dtype, r.shape[-1], has_linears=False)
        for r, dtype in zip(residuals, dtypes, strict=True)
    ]

    def alone(i: int) -> Tensor:
        (x, bias), more = branches[i], segments[i]
        return gated_residual(residuals[i], gates[i], x, x_bias=bias, segments=more)

    def together(streams: list[int]) -> list[Tensor]:
        for i in streams:
            fire_modulate(segments[i])
            if branches[i].bias is not None:
                fire("fuse_bias", "norm_modulate")
        absent = (None,) * 4
        operands = [
            (branches[i].x, residuals[i], gates[i], *absent, branches[i].bias) for i in streams
        ]
        settings = ("none", dtypes[streams[0]], dtypes[streams[0]])
        no_numbers, no_linears = [(0.0, 0.0, 0.0)] * len(streams), [()] * len(streams)
        own = [segments[i] for i in streams]
        return _norms(operands, no_numbers, settings, no_linears, None, own)[1]

    return _by_launch(commons, together, alone)


def _norms(
    operands: Sequence[Sequence[Tensor | None]],
    constants: Sequence[tuple[float, ...]],
    common: Sequence[Any],
    linears: Sequence[Sequence[Any]],
    recipe: Recipe | None = None,
    segments: Sequence[Segments | None] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """`fxopt::norm_modulate_linears_streams`; every sequence but `common` is one of streams.

    constants: eps and the offsets of weight and scale. common: norm, h_dtype, dtype. recipe: by
    which the linears run; None for the model's dtype.
    """
    fire("merge_streams", streams_op_of("norm_modulate", recipe))
    name = op_of_norm(next(filter(None, segments), None))
    if any(segments):
        reading = (own or (None, False) for own in segments)
        operands = [(*own, *more) for own, more in zip(operands, reading, strict=True)]
    fields, numbers = (map(list, zip(*each, strict=True)) for each in (operands, constants))
    norm, *dtypes = common
    every = [m for of_stream in linears for m in of_stream]
    counts = [len(of_stream) for of_stream in linears]
    parameters = [m.weight for m in every], [m.bias for m in every], counts
    arguments = (*fields, norm, *numbers, *dtypes, *parameters)
    if recipe is not None:
        return getattr(ops, f"{name}_quantized_linears_streams")(*arguments, recipe.key)
    each = [pieces([m.weight for m in of_stream]) for of_stream in linears]
    flat = [number for of_stream in each for number in of_stream]
    return getattr(ops, f"{name}_linears_streams")(*arguments, flat, counts)


def outs(
    modules: Sequence[Out], attended: Sequence[Tensor], *, all_sums: Sequence[bool]
) -> list[Branch]:
    """`Out.branch` of each stream's part of an attention's result."""

    def together(streams: list[int]) -> list[Branch]:
        recipe, *_ = commons[streams[0]] or ()
        linears = [modules[i].linear for i in streams]
        for _ in linears:
            fire("quantized_linear", op_of(recipe))
        fire("merge_streams", streams_op_of("linears", recipe))
        parameters = [m.weight for m in linears], [m.bias for m in linears], [1] * len(linears)
        xs = [attended[i] for i in streams]
        products = ops.quantized_linears_streams(xs, *parameters, recipe.key, True)
        return [Branch(modules[i].rest(x)) for i, x in zip(streams, products, strict=True)]

    def alone(i: int) -> Branch:
        return modules[i].branch(attended[i], all_sums=all_sums[i])

    commons = [out.common(x) for out, x in zip(modules, attended, strict=True)]
    return _by_launch(commons, together, alone)


def branches(mlps: Sequence[Mlp], hidden: Sequence[Sequence[Tensor]]) -> list[Branch]:
    """`Mlp.branch` of each stream."""

    def together(streams: list[int]) -> list[Branch]:
        recipe, *_ = commons[streams[0]] or ()
        for i in streams:
            fire("gated_activation", "gated_activation")
            if mlps[i].gate_bias is not None:
                fire("fuse_bias", "gated_activation")
            if recipe is None:
                fire("merge_linears", "gated_activation")
            else:
                fire_low("gated_activation", 1, recipe)
        fire("merge_streams", streams_op_of("gated_activation", recipe))
        gates, ups = zip(*((*hidden[i], None)[:2] for i in streams), strict=True)
        own = [mlps[i] for i in streams]
        waiting = [mlps[i].waiting_bias(hidden[i]) for i in streams]
        weights = [m.out.weight for m in own]
        biases = [m.out.bias if w is None else None for m, w in zip(own, waiting, strict=True)]
        gate_biases, absent = [m.gate_bias for m in own], [None] * len(own)
        settings = (gates, ups, own[0].activation, own[0].packing, absent)
        if recipe is None:
            outs = ops.gated_activation_linear_streams(*settings, gate_biases, weights, biases)
        else:
            parameters = weights, biases, recipe.key
            outs = ops.gated_activation_quantized_linear_streams(*settings, *parameters)
        return [Branch(x, bias) for x, bias in zip(outs, waiting, strict=True)]

    commons = [m.common(h) for m, h in zip(mlps, hidden, strict=True)]
    return _by_launch(commons, together, lambda i: mlps[i].branch(hidden[i]))
