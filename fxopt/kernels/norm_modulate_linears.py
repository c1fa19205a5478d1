"""norm_modulate and the linears on what it makes, as one autograd node for one or more streams.

The streams of a block, text and image say, are normed in one launch each way and multiplied each on
its own. What a norm makes is not kept: see `fxopt.kernels.linears`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels import magnitudes
from fxopt.kernels.linears import (
    Pieces,
    as_pieces,
    flat,
    frozen,
    input_gradient,
    parameter_gradients,
    products,
    without_autocast,
)
from fxopt.kernels.native_norm_modulate import measured
from fxopt.kernels.norm_modulate import asked, is_own, operand_gradients
from fxopt.kernels.norm_modulate_segments_streams import launch, launch_backward
from fxopt.kernels.norm_modulate_streams import NUM_OPERANDS, Call
from fxopt.kernels.registration import register_composite
from fxopt.kernels.saving import is_packing, kept_in, packed, read_codes, room_for
from fxopt.kernels.together import run

# Operands that go into h: x, residual, gate, x_bias.
OF_SUM = (0, 1, 2, 7)
NUM_TENSORS = NUM_OPERANDS + 1  # with the index


class Stream(NamedTuple):
    """One call of norm_modulate, by its `settings`, and the linears on its y; there may be none.

    shift_per_token: of a call by segment, which has an index behind its operands: by_segment.
    """

    settings: tuple[Any, ...]
    num_linears: int
    pieces: Pieces
    shift_per_token: bool = False
    by_segment: bool = False


class NormModulateLinears(torch.autograd.Function):
    """For each stream norm_modulate, then linears on its y: y is not kept.

    Without a residual, h is x itself, for those that go on with x: their gradient then comes back
    through this node, which adds it in its own pass.
    """

    @staticmethod
    def forward(ctx: Any, streams: tuple[Stream, ...], *tensors: Tensor | None) -> Any:
        given, need = iter(tensors), iter(ctx.needs_input_grad[1:])
        each = [_taken(given, NUM_TENSORS, s.num_linears, s.num_linears) for s in streams]
        needs = [_taken(need, NUM_TENSORS, 2 * s.num_linears) for s in streams]
        calls = [
            (*e[0], s.shift_per_token, *s.settings) for s, e in zip(streams, each, strict=True)
        ]
        own, rooms = _rooms(ctx, streams, each, needs)
        calls = [(*call, *rooms[4 * i : 4 * i + 4]) for i, call in enumerate(calls)]
        kept: list[Tensor | None] = []
        activations: list[Tensor | None] = []
        outs: list[Tensor] = []
        constant: list[Tensor] = []
        for stream, (operands, weights, biases), (y, h, mean, rstd), (needed, of_parameters) in zip(
            streams, each, launch(calls), needs, strict=True
        ):
            x, residual, gate, *others, index = operands
            h = x if residual is None else h
            norm_input = None if stream.settings[0] == "none" else h
            branch = None
            if gate is not None:
                branch = x if needed[2] else x.new_empty(0)  # its dtype is that of its gradient
            trains = any((*needed, *of_parameters))
            activations += [norm_input, branch] if trains else [None, None]
            kept += [gate, *others, index, mean, rstd, *weights]
            results = products(y, weights, biases, stream.pieces)
            constant += frozen(results, any(needed), of_parameters, stream.pieces)
            constant += [] if any(needed[i] for i in OF_SUM) else [h]
            outs += [*results, h]
        ctx.mark_non_differentiable(*constant)
        saved = kept_in(rooms, activations) if rooms else packed(ctx, activations, own)
        ctx.save_for_backward(*saved, *kept)
        ctx.streams, ctx.edges = streams, magnitudes.edges_of(tensors)
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        num_streams, dtype = len(ctx.streams), ctx.streams[0].settings[-1]
        has_index = any(s.by_segment for s in ctx.streams)
        saved, scales = run(read_codes(ctx, ctx.saved_tensors, dtype, not has_index))
        activations, others = iter(saved[: 2 * num_streams]), iter(saved[2 * num_streams :])
        needs = ctx.needs_input_grad[1:]
        given = activations, others, iter(grads), iter(needs), iter(() if has_index else scales)
        streams = [_Backward(stream, *given) for stream in ctx.streams]
        if not has_index:
            _leave_magnitudes(ctx, streams)
        found = iter(launch_backward([s.call for s in streams if s.call is not None]))
        results: list[Tensor | None] = []
        for s in streams:
            results += [None] * s.num_inputs if s.call is None else s.gradients(next(found))
        return None, *results


def _leave_magnitudes(ctx: Any, streams: Sequence[_Backward]) -> None:
    """Have the op leave those of the gradients of x, if they are wanted in all streams."""
    starts = itertools.accumulate((s.num_inputs for s in streams), initial=0)
    each = zip(streams, starts, strict=False)
    present = [(s, ctx.edges[start]) for s, start in each if s.call is not None]
    norm = ctx.streams[0].settings[0]
    likes = [measured(norm, s.h, s.gate, s.dy) for s, _ in present]
    rooms = magnitudes.rooms_for(ctx, [edge for _, edge in present], likes)
    if all(room is not None for room in rooms):
        for (s, _), room in zip(present, rooms, strict=True):
            s.leave_magnitude(room)


class _Backward:
    """A stream on the way back; `call` is None where no gradient came in, or none is needed."""

    def __init__(
        self,
        stream: Stream,
        activations: Iterator[Any],
        saved: Iterator[Any],
        grads: Iterator[Tensor | None],
        needs: Iterator[bool],
        scales: Iterator[Tensor | None],
    ) -> None:
        settings, num_linears, self.pieces, shift_per_token, _ = stream
        ((h, x),), (own_scales,) = _taken(activations, 2), _taken(scales, 2)
        (*operands, index, mean, rstd), self.weights = _taken(saved, 9, num_linears)
        grad_outs, (self.grad_h,) = _taken(grads, len(self.pieces), 1)
        self.grad_outs = [g if g is None else flat(g) for g in grad_outs]
        (*self.needs, _), self.needs_parameters = _taken(needs, NUM_TENSORS, 2 * num_linears)
        self.num_inputs = NUM_TENSORS + 2 * num_linears
        self.h = h = self.grad_h if h is None else h  # without a norm only its shape counts
        self.dy = (
            h if h is None else input_gradient(self.grad_outs, self.weights, self.pieces, h.shape)
        )
        self.gate, self.shift = operands[0], _addend(operands[4], index, stream)
        self.call: Call | None = None
        self.room: magnitudes.Room | None = None
        if self.dy is not None or self.grad_h is not None:
            norm, _, weight_offset, scale_offset, _, dtype = settings
            recompute = self.dy is not None and any(self.needs_parameters)
            reading = index, shift_per_token
            tensors = (self.dy, self.grad_h, h, x, *operands, *reading, mean, rstd)
            constants = (norm, weight_offset, scale_offset, dtype)
            asks = asked(self.needs, self.shift, self.h)
            self.call = (*tensors, *constants, asks, recompute, *own_scales)

    def leave_magnitude(self, room: magnitudes.Room | None) -> None:
        """Have the op leave the magnitude of the gradient of x."""
        assert self.call is not None
        self.room, self.call = room, (*self.call, *magnitudes.seen_in(room))

    def gradients(self, found: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Those of the operands, the weights and the biases, by what the op returned."""
        operands = operand_gradients(
            found, self.dy, self.grad_h, self.h, self.gate, self.shift, self.needs
        )
        magnitudes.hand_on([self.room], operands)
        parameters = parameter_gradients(
            self.grad_outs, found[-1], self.weights, self.pieces, self.needs_parameters
        )
        return [*operands, None, *parameters]


def _rooms(
    ctx: Any, streams: Sequence[Stream], each: Sequence[Any], needs: Sequence[Any]
) -> tuple[list[bool], list[Tensor | None]]:
    """Of each stream's norm input and x which are the node's own, and where their codes are left;
    no rooms where they are packed in a pass of their own: the ops want the same of all streams."""
    activations: list[Tensor | None] = []
    own: list[bool] = []
    if not is_packing():
        return own, []
    for stream, ((x, residual, gate, *others, index), *_), needed in zip(
        streams, each, needs, strict=True
    ):
        norm_input = x
        if residual is not None:
            norm_input = torch.empty(x.shape, dtype=stream.settings[-2], device="meta")
        trains = any(need for group in needed for need in group)
        is_normed, has_branch = stream.settings[0] != "none", gate is not None and needed[0][2]
        activations += [norm_input if trains and is_normed else None, x if has_branch else None]
        own += [is_own(x, residual, _addend(others[3], index, stream)), True]
    rooms = room_for(ctx, each[0][0][0], activations, own)
    patterns = {tuple(r is None for r in rooms[i : i + 4]) for i in range(0, len(rooms), 4)}
    is_shared = len(patterns) == 1 and not any(stream.by_segment for stream in streams)
    return own, rooms if is_shared else []


def _addend(shift: Tensor | None, index: Tensor | None, stream: Stream) -> Tensor | None:
    """A shift that is no table."""
    return shift if index is None or stream.shift_per_token else None


def _taken(items: Iterator[Any], *counts: int) -> list[tuple[Any, ...]]:
    """The next items, in groups of these sizes."""
    return [tuple(itertools.islice(items, count)) for count in counts]


def norm_linears(*args: Any) -> tuple[list[Tensor], Tensor]:
    """What the linears make, and h; with an index and whether the shift is per token behind the
    operands."""
    tensors, shift_per_token, settings = args[:NUM_TENSORS], args[9], args[10:16]
    weights, biases, pieces = args[16:]
    by_segment = tensors[-1] is not None
    stream = Stream(settings, len(weights), as_pieces(pieces), shift_per_token, by_segment)
    *outs, h = NormModulateLinears.apply((stream,), *tensors, *weights, *biases)
    return outs, h


def norm_linears_streams(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """`norm_linears` of each stream."""
    tensors, shift_per_token, (norm, *constants, h_dtype, dtype) = (
        args[:NUM_TENSORS], args[9], args[10:16]
    )  # fmt: skip
    weights, biases, counts, pieces, num_pieces = args[16:]
    weight, bias, piece = iter(weights), iter(biases), iter(as_pieces(pieces))
    streams: list[Stream] = []
    given: list[Tensor | None] = []
    each = zip(shift_per_token, zip(*constants, strict=True), counts, num_pieces, strict=True)
    for operands, (is_per_token, numbers, num_linears, num_outs) in zip(
        zip(*tensors, strict=True), each, strict=True
    ):
        (own,) = _taken(piece, num_outs)
        settings = norm, *numbers, h_dtype, dtype
        streams.append(Stream(settings, num_linears, own, is_per_token, operands[-1] is not None))
        given += [*operands, *_taken(weight, num_linears)[0], *_taken(bias, num_linears)[0]]
    outs: list[Tensor] = []
    hs: list[Tensor] = []
    found = iter(NormModulateLinears.apply(tuple(streams), *given))
    for num_outs in num_pieces:
        own, (h,) = _taken(found, num_outs, 1)
        outs += own
        hs.append(h)
    return outs, hs


def _norm_modulate_linears(*args: Any) -> tuple[list[Tensor], Tensor]:
    return norm_linears(*args[:NUM_OPERANDS], None, False, *args[NUM_OPERANDS:])


def _norm_modulate_linears_streams(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    num = len(args[0])
    reading = [None] * num, [False] * num
    return norm_linears_streams(*args[:NUM_OPERANDS], *reading, *args[NUM_OPERANDS:])


norm_modulate_linears = register_composite(
    "norm_modulate_linears(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor? x_bias, str norm, float eps, float weight_offset, "
    "float scale_offset, ScalarType h_dtype, ScalarType dtype, Tensor[] weights, Tensor?[] biases, "
    "int[] pieces) -> (Tensor[] outs, Tensor h)",
    _norm_modulate_linears,
)
# The linears and pieces of all streams follow one another; of each its `num_linears`, `num_pieces`.
norm_modulate_linears_streams = register_composite(
    "norm_modulate_linears_streams(Tensor[] x, Tensor?[] residual, Tensor?[] gate, "
    "Tensor?[] weight, Tensor?[] bias, Tensor?[] scale, Tensor?[] shift, Tensor?[] x_bias, "
    "str norm, float[] eps, float[] weight_offset, float[] scale_offset, ScalarType h_dtype, "
    "ScalarType dtype, Tensor[] weights, Tensor?[] biases, int[] num_linears, int[] pieces, "
    "int[] num_pieces) -> (Tensor[] outs, Tensor[] h)",
    _norm_modulate_linears_streams,
)
