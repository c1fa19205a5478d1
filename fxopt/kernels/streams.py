"""Autograd nodes of several streams, text and image say, that are written for one.

Forward and backward of a stream are generators: they yield the calls that they want, and go on with
the results. Those of all streams run side by side, and what they want at one time is launched
together; what only one wants runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.in_force import Decision, decide
from fxopt.kernels.linears import without_autocast
from fxopt.kernels.magnitudes import Inbox, Room, edges_of, room_for
from fxopt.kernels.together import Steps, parts, run, side_by_side


class Call(NamedTuple):
    """A stream on its way into a node, which makes `num_outs` outputs of `tensors`.

    settings: what a subclass of `Streams` likes. weights: those of the tensors that are.
    """

    settings: Any
    tensors: Sequence[Tensor | None]
    weights: Sequence[Tensor]
    num_outs: int


class Stream(NamedTuple):
    """What a node knows of one stream beside its tensors."""

    decision: Decision
    settings: Any
    num_tensors: int
    num_outs: int


class Context:
    """What a node knows of one stream; autograd's own ctx, as far as a stream needs it.

    needs_input_grad: of decision and settings, which have none, and of the tensors.
    known: in backward, the magnitude of each output's gradient, or None.
    """

    def __init__(self, needs_input_grad: Sequence[bool], edges: Sequence[int]) -> None:
        self.needs_input_grad = False, False, *needs_input_grad
        self.saved_tensors: Sequence[Tensor | None] = ()
        self.known: Sequence[Tensor | None] = ()
        self._edges = edges
        self._node: Any = None

    def runs_in(self, node: Any, known: Sequence[Tensor | None]) -> None:
        """Of a backward: the node, None at its end, and what is known."""
        self._node, self.known = node, known

    def room_for(self, index: int, like: Tensor | None) -> Room | None:
        """`magnitudes.room_for` of the gradient of tensor `index` of the stream."""
        return room_for(self._node, self._edges[index], like)

    @property
    def trains(self) -> bool:
        """Whether anything in the stream needs a gradient; its outputs have none otherwise."""
        return any(self.needs_input_grad)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class Streams(torch.autograd.Function):
    """Runs the `forward_of` and `backward_of` of a subclass, which are those of one stream.

    They take what an autograd function's forward and backward do, and return a tuple each: the
    outputs, and the gradients of all that the forward took.
    """

    forward_of: ClassVar[Callable[..., Steps[tuple[Any, ...]]]]
    backward_of: ClassVar[Callable[..., Steps[tuple[Any, ...]]]]

    @staticmethod
    def measures(ctx: Any, output: int) -> bool:
        """Whether the backward of a stream scales this output's gradient by its magnitude alone."""
        return False

    @classmethod
    def run(
        cls, recipe: str, calls: Sequence[Call], plain: Callable[[Call], Sequence[Tensor]]
    ) -> list[Sequence[Tensor]]:
        """The outputs of each call: of one node, or of `plain` where no GEMM is quantized now."""
        decisions = [decide(recipe, call.weights) for call in calls]
        low = [(d, c) for d, c in zip(decisions, calls, strict=True) if d is not None]
        streams = [Stream(d, c.settings, len(c.tensors), c.num_outs) for d, c in low]
        outs = cls.apply(cls, streams, *(t for _, c in low for t in c.tensors)) if low else ()
        found = iter(parts(outs, [stream.num_outs for stream in streams]))
        each = zip(decisions, calls, strict=True)
        return [plain(call) if d is None else next(found) for d, call in each]

    @staticmethod
    def forward(
        ctx: Any, node: type[Streams], streams: Sequence[Stream], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        sizes = [stream.num_tensors for stream in streams]
        # Without gradients autograd says the same of what requires them.
        own = parts(ctx.needs_input_grad[2:], sizes), parts(edges_of(tensors), sizes)
        contexts = [
            Context([need and stream.decision.has_grad for need in needs], edges)
            for stream, needs, edges in zip(streams, *own, strict=True)
        ]
        runs = [
            node.forward_of(context, stream.decision, stream.settings, *own)
            for context, stream, own in zip(contexts, streams, parts(tensors, sizes), strict=True)
        ]
        outs = run(side_by_side(*runs))
        each = zip(contexts, outs, strict=True)
        ctx.mark_non_differentiable(*(t for c, own in each if not c.trains for t in own))
        ctx.node, ctx.streams, ctx.contexts = node, streams, contexts
        outputs = [(c, i) for c, own in zip(contexts, outs, strict=True) for i in range(len(own))]
        ctx.inbox = Inbox(lambda i: outputs[i][0].trains and node.measures(*outputs[i]))
        saved = [context.saved_tensors if context.trains else () for context in contexts]
        ctx.num_saved = [len(own) for own in saved]
        ctx.save_for_backward(*(t for own in saved for t in own))
        for context in contexts:
            context.save_for_backward()
        ctx.set_materialize_grads(False)
        return tuple(t for own in outs for t in own)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        runs, saved = [], parts(ctx.saved_tensors, ctx.num_saved)
        num_outs = [stream.num_outs for stream in ctx.streams]
        given, known = parts(grads, num_outs), parts(ctx.inbox.take(grads), num_outs)
        for context, own, of_stream, amax in zip(ctx.contexts, saved, given, known, strict=True):
            context.saved_tensors = own
            context.runs_in(ctx, amax)
            if context.trains:
                runs.append(ctx.node.backward_of(context, *of_stream))
        try:
            computed = iter(run(side_by_side(*runs)))
        finally:  # node and contexts would hold one another, and what is saved
            for context in ctx.contexts:
                context.save_for_backward()
                context.runs_in(None, ())
        found = [
            next(computed) if context.trains else [None] * len(context.needs_input_grad)
            for context in ctx.contexts
        ]
        return None, None, *(g for own in found for g in own[2:])
