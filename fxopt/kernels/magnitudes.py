"""The largest magnitude of a gradient, from the node that makes it to the node that casts it.

What casts a gradient by one scale reads it twice: for its largest magnitude and for the codes. The
kernel that made it has had all of it in registers. So a node asks, while it runs backward, whether
what follows it is one that casts, and leaves the magnitude with that one: beside it, which memory
it is of, and in which version. The gradient itself goes through autograd as ever. The node that
casts looks whether that is what has come; a gradient that something has replaced, written to or
added to is measured as ever.

Only what PyTorch counts is seen to be written (`Tensor._version`); hooks are not to write to their
argument, says its documentation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.multiprocessing.reductions import StorageWeakRef

# What hands its gradient on in another shape, in the same memory or in a copy.
VIEWS = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Alias", "Unsqueeze", "Squeeze")
)
NUM_ROOMS, SPACING = 256, 4  # 16 bytes apart, as Triton compiles anew for another alignment


class _Left(NamedTuple):
    """A magnitude, and the gradient that it is of: memory, version and place; task: of autograd's
    backwards that one which made it; stream: whose work it is, None on a CPU."""

    task: int
    storage: StorageWeakRef
    version: int
    place: tuple[int, int, torch.dtype]
    stream: Any
    amax: Tensor


class Inbox:
    """Of a node that casts: what those before it have left for its backward, by output.

    wants: whether an output's gradient is scaled by its largest magnitude.
    """

    were_made: ClassVar[bool] = False  # in this process: without any, nobody has to look for one

    def __init__(self, wants: Callable[[int], bool]) -> None:
        Inbox.were_made = True
        self.wants = wants
        self._left: dict[int, _Left] = {}

    def put(self, output: int, left: _Left) -> None:
        self._left[output] = left

    def take(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """For the gradient of each output its magnitude, fp32 [1], or None if it is not known."""
        left, self._left = self._left, {}
        return [
            None if grad is None or i not in left else _of(grad, left[i])
            for i, grad in enumerate(grads)
        ]


class Room(NamedTuple):
    """Where a backward leaves the magnitude of a gradient that it makes: seen, int32 [1], is raised
    to its bits."""

    inbox: Inbox
    output: int
    seen: Tensor

    def hand_on(self, grad: Tensor | None) -> None:
        """To the node that casts `grad`, whose magnitude was left."""
        if grad is None or not _is_plain(grad) or not grad.is_contiguous():
            return
        amax = self.seen.view(torch.float32)
        storage = StorageWeakRef(grad.untyped_storage())
        left = _Left(_task(), storage, grad._version, _place(grad), _stream(grad), amax)
        self.inbox.put(self.output, left)


def room_for(ctx: Any, edge: int, like: Tensor | None) -> Room | None:
    """`rooms_for` of one gradient."""
    return rooms_for(ctx, [edge], [like])[0]


def rooms_for(ctx: Any, edges: Sequence[int], likes: Sequence[Tensor | None]) -> list[Room | None]:
    """Where the backward of `ctx` is to leave the magnitudes of gradients; None for nowhere.

    Args:
        edges: of the tensors whose gradients they are, among all tensors that the forward took.
        likes: of each a tensor of the gradient's device that goes into it.
    """
    if (
        torch.compiler.is_compiling()
        or not Inbox.were_made
        or get_proxy_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _task() < 0
    ):
        return [None] * len(edges)
    following = ctx.next_functions
    return [_room_at(following[e], like) for e, like in zip(edges, likes, strict=True)]


def _room_at(following: tuple[Any, int], like: Tensor | None) -> Room | None:
    if like is None or not _is_plain(like):
        return None
    node, output = following
    while node is not None and node.name() in VIEWS:
        node, output = node.next_functions[0]
    inbox = getattr(node, "inbox", None)
    if not isinstance(inbox, Inbox) or not inbox.wants(output):
        return None
    return Room(inbox, output, _room(like))


def seen_in(*rooms: Room | None) -> list[Tensor | None]:
    """Where an op leaves magnitudes, None for nowhere."""
    return [None if room is None else room.seen for room in rooms]


def seen_in_each(rooms: Sequence[Room | None], like: Tensor) -> list[Tensor] | None:
    """The same for an op that leaves all magnitudes or none: also those that nobody wants."""
    if all(room is None for room in rooms):
        return None
    return [_room(like) if room is None else room.seen for room in rooms]


def hand_on(rooms: Sequence[Room | None], grads: Sequence[Tensor | None]) -> None:
    """`Room.hand_on` of the gradient of each."""
    for room, grad in zip(rooms, grads, strict=False):
        if room is not None:
            room.hand_on(grad)


def edges_of(tensors: Sequence[Any]) -> list[int]:
    """Of what a forward takes, tensors and None, which edge of its node each is; None has none and
    gets that of the next."""
    counts = accumulate([t is not None for t in tensors], initial=0)
    return [*counts][:-1]


class _Rooms(threading.local):
    """The zeros of a backward, by what `_room` goes by, and how many of them are given away."""

    key: Any = None
    zeros: Tensor
    num_used = 0


_rooms = _Rooms()


def _room(like: Tensor) -> Tensor:
    """int32 [1], zero. One launch makes those of a whole backward, on its stream: a CUDA graph of
    it has the zeros in it."""
    key = _task(), like.device, _stream(like)
    if _rooms.key != key or _rooms.num_used == NUM_ROOMS:
        _rooms.zeros = like.new_zeros((NUM_ROOMS, SPACING), dtype=torch.int32)
        _rooms.key, _rooms.num_used = key, 0
    _rooms.num_used += 1
    return _rooms.zeros[_rooms.num_used - 1, :1]


def _of(grad: Tensor, left: _Left) -> Tensor | None:
    if not _is_plain(grad) or not grad.is_contiguous() or left.storage.expired():
        return None
    is_same = (
        left.storage.cdata == grad.untyped_storage()._cdata
        and left.version == grad._version
        and left.place == _place(grad)
        and left.task == _task()
        and left.stream == _stream(grad)
    )
    return left.amax if is_same else None


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, FakeTensor) and not t.is_inference()


def _place(t: Tensor) -> tuple[int, int, torch.dtype]:
    return int(t.storage_offset()), t.numel(), t.dtype


def _stream(t: Tensor) -> Any:
    return torch.cuda.current_stream(t.device) if t.is_cuda else None


def _task() -> int:
    """Which backward runs; -1 for none."""
    return torch._C._current_graph_task_id()
