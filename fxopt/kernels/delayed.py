"""Delayed scaling: tensors are scaled by the magnitudes that they had in the steps before.

Every linear of a recipe with a history has three lines: of its input, its weight and the gradient
of its output. Kernels raise `seen` of a line while they quantize. With the first forward of another
step all lines move on at once, on their device: what was seen becomes the newest of `past`, and the
largest of `past` is what the step scales by. A line without a past scales by its own tensor.

Lines belong to parameters and are found by their identity; none is in a `state_dict`.

Shapes: L linears, 3 operands, N steps.
"""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import CheckpointFunction

from fxopt.kernels import counters
from fxopt.kernels.counters import Slot, Slots
from fxopt.kernels.formats import is_clipped
from fxopt.kernels.in_force import Decision
from fxopt.kernels.origins import leaf_of, uncast
from fxopt.recipe_errors import NoHistory, Saturated
from fxopt.recipes import Operand, Recipe
from fxopt.schedule import current_group

X, WEIGHT, GRADIENT = range(3)
# Of each, the GEMMs that read it, and as which operand.
READERS = (
    (("fprop", "a"), ("wgrad", "b")),
    (("fprop", "b"), ("dgrad", "b")),
    (("dgrad", "a"), ("wgrad", "a")),
)
NUM_LINEARS = 256  # of one history; a further one takes the next
SPACING = 4  # lines are 16 bytes apart, as Triton compiles anew for another alignment

NONE: frozenset[Operand] = frozenset()


class _Reading(NamedTuple):
    """What the host is to learn: bool [2, L, 3], which lines have a past and which saturated."""

    status: Tensor
    has_past: Tensor
    event: torch.cuda.Event | None


class History:
    """The lines of up to NUM_LINEARS linears on one device, of one recipe's numbers."""

    def __init__(self, recipe: Recipe, like: Tensor) -> None:
        shape = (NUM_LINEARS, 3)
        self.recipe = recipe
        with torch.inference_mode(False):
            self.past = like.new_zeros((recipe.history, *shape), dtype=torch.float32)
            self.known = like.new_zeros((*shape, SPACING), dtype=torch.float32)[..., 0]
            self.seen = like.new_zeros((*shape, SPACING), dtype=torch.int32)[..., 0]
            self.has_past = like.new_zeros(shape, dtype=torch.bool)  # as the host knows it
        # The same. What has no values is taken to have a past: this is what later steps do.
        self.usable = [[isinstance(like, FakeTensor)] * 3 for _ in range(NUM_LINEARS)]
        self.last = [[math.nan] * 3 for _ in range(NUM_LINEARS)]  # steps that recorded, or NaN
        self.formats = [[NONE] * 3 for _ in range(NUM_LINEARS)]  # that they were cast to in it
        self._casts: dict[Operand, Tensor] | None = None  # the same by format: bool [L, 3]
        self.known_lines = self._lines()  # by linear and operand
        self.weights: list[weakref.ref[Tensor]] = []
        self.num_steps_saturated = 0
        self._readings: list[_Reading] = []
        self._num_read = 0  # lines that the host has asked about

    def advance(self) -> None:
        """Go on to the next step; what was not finite, or zero, leaves no past."""
        if isinstance(self.seen, FakeTensor):
            return
        with torch.no_grad(), torch.inference_mode(False):
            amax = self.seen.view(torch.float32)
            is_new = (amax > 0) & amax.isfinite()
            saturated = is_new & self.has_past & self._is_clipped(amax)
            rolled = torch.cat([amax[None], self.past[:-1]])
            self.past = torch.where(is_new, rolled, self.past)
            largest = self.past.amax(0) * 2.0**self.recipe.margin
            # Another tensor: nodes of the step before hold on to theirs.
            self.known = largest.new_empty((*largest.shape, SPACING))[..., 0]
            self.known.copy_(largest.clamp(max=torch.finfo(torch.float32).max))
            self.known_lines = self._lines()
            has_past = self.known > 0
            self.seen.zero_()
            self._readings.append(_read(torch.stack([has_past, saturated]), has_past))
        # New lines are worth a wait. Else the host reads what has long been there.
        num_later = 0 if self._num_read < len(self.weights) else 1
        self._num_read = len(self.weights)
        while len(self._readings) > num_later:
            self._learn(self._readings.pop(0))

    def meet(self, place: int, decision: Decision) -> None:
        """A linear is trained: where it was not in the step before, as when a schedule had it in
        other formats, nobody knows how its tensors grew since, and it scales by themselves; what it
        was more than `history` steps before is no past any more."""
        assert decision.step is not None
        for operand, formats in enumerate(_formats(decision.recipe)):
            if not formats:
                continue
            num_steps = abs(decision.step - self.last[place][operand])
            if num_steps > 1 and self.usable[place][operand]:
                self.has_past[place, operand] = False
                self.usable[place][operand] = False
                if num_steps > self.recipe.history:
                    self.past[:, place, operand] = 0
                    self._num_read = 0  # as of a new line
            all_formats = formats | (self.formats[place][operand] if num_steps == 0 else NONE)
            if self.formats[place][operand] != all_formats:
                self.formats[place][operand] = all_formats
                self._casts = None
            self.last[place][operand] = decision.step

    def _is_clipped(self, amax: Tensor) -> Tensor:
        """Of each line, whether a cast of the step that ends clipped this magnitude."""
        if self._casts is None:
            every = frozenset().union(*(f for row in self.formats for f in row))
            self._casts = {
                operand: amax.new_tensor(
                    [[operand in f for f in row] for row in self.formats], dtype=torch.bool
                )
                for operand in every
            }
        clipped = torch.zeros_like(self.has_past)
        for operand, is_cast in self._casts.items():
            clipped |= is_cast & is_clipped(amax, self.known, operand)
        return clipped

    def _lines(self) -> Sequence[Tensor]:
        return self.known.flatten(0, 1).unsqueeze(-1).unbind()

    def _learn(self, reading: _Reading) -> None:
        self.has_past = reading.has_past
        if reading.event is not None:
            reading.event.synchronize()
        self.usable, saturated = reading.status.tolist()
        num_saturated = sum(map(sum, saturated))
        if num_saturated:
            self.num_steps_saturated += 1
            # The 1st, 2nd, 4th, 8th ... such step.
            if self.num_steps_saturated & (self.num_steps_saturated - 1) == 0:
                warnings.warn(self._warning(num_saturated), stacklevel=2)

    def _warning(self, num_saturated: int) -> Saturated:
        return Saturated(
            f"recipe {self.recipe.name!r}: {num_saturated} operands had values larger than the "
            f"largest of the {self.recipe.history} steps before (margin {self.recipe.margin}) and "
            f"were clipped; so far in {self.num_steps_saturated} steps. A larger history or margin "
            "makes that rarer; fxopt.telemetry counts the values"
        )


def _formats(recipe: Recipe) -> Iterator[frozenset[Operand]]:
    """Of each operand of a linear the formats that it is cast to."""
    for readers in READERS:
        gemms = ((getattr(recipe, name), side) for name, side in readers)
        yield frozenset(getattr(gemm, side) for gemm, side in gemms if gemm is not None)


def _read(status: Tensor, has_past: Tensor) -> _Reading:
    """Begin a copy to the host."""
    if not status.is_cuda:
        return _Reading(status, has_past, None)
    event = torch.cuda.Event()
    copy = status.to("cpu", non_blocking=True)
    event.record(torch.cuda.current_stream(status.device))
    return _Reading(copy, has_past, event)


class _Line(NamedTuple):
    """Of a linear, by its weight; seen: of its three operands."""

    weight: weakref.ref[Tensor]
    history: History
    place: int
    seen: tuple[Tensor, ...]

    def is_known(self, operand: int) -> bool:
        """Also to a validation, which meets nothing."""
        assert _step is not None
        is_behind_gap = abs(_step - self.history.last[self.place][operand]) > 1
        return self.history.usable[self.place][operand] and not is_behind_gap

    def put(self, slot: Slot, operand: int, records: bool, uses: bool = True) -> Slot:
        """Put what is known into a slot, if it is to be used, and where to record."""
        known = None
        if uses and self.is_known(operand):
            known = self.history.known_lines[3 * self.place + operand]
        return slot._replace(known=known, seen=self.seen[operand] if records else None)


# The id of a parameter, where in it the weight begins, and `_numbers` of the recipe.
_Key = tuple[int, int, str, int, int]
# Of the process, as the step that is told: checkpoints run their forwards on autograd's threads.
_lines: dict[_Key, _Line] = {}
_histories: list[History] = []
_step: int | None = None


@contextmanager
def apart() -> Iterator[None]:
    """Inside the context lines are others, which are gone behind it; those of before stay."""
    global _lines, _histories, _step
    kept, (_lines, _histories, _step) = (_lines, _histories, _step), ({}, [], None)
    try:
        yield
    finally:
        _lines, _histories, _step = kept


def slots_for(decision: Decision, weights: Sequence[Tensor | None]) -> Slots:
    """`counters.slots_for` of a node, with what is known of its tensors and where to record them.

    Args:
        decision: the node's; without gradients nothing is recorded.
        weights: on one input, which has the line of the first.

    Raises:
        NoHistory: a node is to record and has no parameter to record it for.
    """
    slots, recipe = counters.slots_for(weights), decision.recipe
    if not recipe.history:
        return slots
    _go_on(decision)
    records = decision.has_grad
    found = [_line(weight, recipe, records) for weight in weights if weight is not None]
    lines = [line for line in found if line is not None]
    if len(lines) < len(found):
        return slots
    for line in lines if records else ():
        line.history.meet(line.place, decision)
    of_weights = slots.weights
    # Codes are gathered by a magnitude that all ranks have found already.
    if recipe.all_gather == "model":
        are_known = all(line.is_known(WEIGHT) for line in lines)  # they are cast in one launch
        of_weights = [
            line.put(slot, WEIGHT, records, are_known)
            for slot, line in zip(slots.weights, lines, strict=True)
        ]
    of_gradients = zip(slots.gradients, lines, strict=True)
    return Slots(
        lines[0].put(slots.x, X, records),
        of_weights,
        [line.put(slot, GRADIENT, records) for slot, line in of_gradients],
    )


def _go_on(decision: Decision) -> None:
    """Have all lines move on, if this is another step of the training; what runs without gradients
    is a validation, at whatever step and in the midst of another."""
    global _step
    if decision.step == _step or not (decision.has_grad or _is_checkpointed()):
        return
    _step = decision.step
    for key in [key for key, line in _lines.items() if line.weight() is None]:
        del _lines[key]
    group = current_group()
    if group is None:
        _histories[:] = [h for h in _histories if any(w() is not None for w in h.weights)]
    else:  # ranks collect their garbage at times of their own, and are to join the same lines
        _join([history.seen for history in _histories], group)
    for history in _histories:
        history.advance()


def _is_checkpointed() -> bool:
    """Whether gradients are off only until a reentrant checkpoint computes this again."""
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _join(seen: Sequence[Tensor], group: Any) -> None:
    """Make what was seen the largest of all processes, in one collective per device."""
    real = [t for t in seen if not isinstance(t, FakeTensor)]
    for device in dict.fromkeys(t.device for t in real):
        there = [t for t in real if t.device == device]
        joined = torch.cat([t.flatten() for t in there])
        dist.all_reduce(joined, dist.ReduceOp.MAX, group)
        for own, values in zip(there, joined.split([t.numel() for t in there]), strict=True):
            own.copy_(values.view_as(own))


def _line(weight: Tensor, recipe: Recipe, records: bool) -> _Line | None:
    """The line of the parameter that a weight is, or is a cast of; None if there is none yet."""
    leaf = leaf_of(weight)
    # Slices of one parameter are weights by themselves.
    key = id(leaf), int(uncast(weight).storage_offset()), *_numbers(recipe)
    line = _lines.get(key)
    if line is not None and line.weight() is leaf:
        return line
    if not records:
        return None
    if not (isinstance(leaf, nn.Parameter) or (leaf.is_leaf and leaf.requires_grad)):
        raise NoHistory(recipe.name, list(weight.shape))
    history = next((h for h in _histories if _has_room(h, leaf, recipe)), None)
    if history is None:
        _histories.append(history := History(recipe, leaf.detach()))
    index = len(history.weights)
    seen = tuple(history.seen[index, i : i + 1] for i in range(3))
    line = _lines[key] = _Line(weakref.ref(leaf), history, index, seen)
    history.weights.append(line.weight)
    return line


def _has_room(history: History, leaf: Tensor, recipe: Recipe) -> bool:
    is_same = _numbers(history.recipe) == _numbers(recipe)
    is_there = history.past.device == leaf.device and _mode(history.past) is _mode(leaf)
    return is_same and is_there and len(history.weights) < NUM_LINEARS


def _numbers(recipe: Recipe) -> tuple[str, int, int]:
    """What a recipe has in common with itself in another phase of its schedule."""
    return recipe.name, recipe.history, recipe.margin


def _mode(tensor: Tensor) -> object:
    """The mode of a fake tensor, which does not go with others; None of a real one."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None
