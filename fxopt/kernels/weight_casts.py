"""Weights as operands: cast where they are used, or once for all micro-batches of a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.kernels.counters import Slot, lists, present
from fxopt.kernels.formats import Quantized
from fxopt.kernels.gathered import GatheredWeight, gathered
from fxopt.kernels.quantize import Cast, Pair, covers
from fxopt.kernels.quantize_group import quantize_columns, quantize_rows
from fxopt.kernels.together import Ask, Steps
from fxopt.recipes import Operand, Recipe


class _Entry(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    slot: Slot
    pair: Pair

    def serves(self, weight: Tensor, state: tuple[object, ...], slot: Slot) -> bool:
        """Whether a cast with this slot would leave the same, here and in the slot."""
        is_same = self.weight() is weight and self.state == state
        # Without gradients nothing was recorded.
        is_recorded = slot.seen is None or self.slot.seen is not None
        return is_same and self.slot.known is slot.known and is_recorded


class WeightCasts:
    """Both copies of the weights met so far, for the products of forward and backward."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str, str], _Entry] = {}
        self.epoch = object()  # another one after each step of an optimizer

    def forget(self, *_: object) -> None:
        """Cast again what comes: an optimizer has stepped, and wrote as it likes."""
        self._entries.clear()
        self.epoch = object()

    def of(self, weight: Tensor, recipe: Recipe, slot: Slot) -> Pair | None:
        """The copies of `weight`, cast again if it was written; None where nothing may be kept."""
        traced = get_proxy_mode() is not None or is_traceable_wrapper_subclass(weight)
        if traced or recipe.fprop is None or recipe.dgrad is None:
            return None
        rows, columns = recipe.fprop.b, recipe.dgrad.b
        key = id(weight), str(rows), str(columns)
        state = weight._version, weight.untyped_storage()._cdata, weight.storage_offset()
        entry = self._entries.get(key)
        if entry is None or not entry.serves(weight, state, slot):
            pair = Cast(weight.detach(), rows, columns, slot=slot).pair()
            entry = self._entries[key] = _Entry(weakref.ref(weight), state, slot, pair)
        return entry.pair


# Of the process and not of a context, the innermost last: a backward on CUDA computes checkpoints
# again on a thread of autograd's own, and is to save what the forward saved.
_scopes: list[WeightCasts] = []


@contextmanager
def cast_weights_once() -> Iterator[None]:
    """Cast each weight once, for the forward and backward of all micro-batches inside.

        with fxopt.cast_weights_once():
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    A weight is cast again if PyTorch has recorded a write to it, or after a step of any optimizer.
    Other writes through `.data`, or by a kernel that PyTorch knows nothing of, leave no record:
    keep them outside. It holds for the whole process. The copies take two bytes per element (FP8)
    until the end; where FSDP frees the gathered weights after use, that is memory it meant to save.
    Graphs of a compiler cast where they stand.
    """
    casts = WeightCasts()
    hook = register_optimizer_step_post_hook(casts.forget)
    _scopes.append(casts)
    try:
        yield
    finally:
        hook.remove()
        _scopes.remove(casts)


def epoch() -> object | None:
    """The same while `cast_weights_once` takes the weights for unchanged; None outside of it."""
    return _scopes[-1].epoch if _scopes else None


class Copies(NamedTuple):
    """Of several weights: what fprop reads, and for dgrad the transposed copies or amax_t.

    columns: where they were made already or come with the backward's all-gather, else empty.
    amax_t: what the transposed copies' scales come from, where they are to be made by it.
    """

    rows: list[Quantized]
    columns: list[Quantized | GatheredWeight]
    amax_t: list[Tensor]


def for_products(
    weights: Sequence[Tensor], recipe: Recipe, comes_back: bool, slots: Sequence[Slot]
) -> Steps[Copies]:
    """Cast the weights of linears on one input.

    Args:
        recipe: one with an fprop.
        comes_back: whether dgrad will want the transposed copies.
        slots: counters of each weight's copies.
    """
    assert recipe.fprop is not None
    rows = recipe.fprop.b
    columns = recipe.dgrad.b if recipe.dgrad is not None and comes_back else None
    if any(gathered(w) for w in weights):
        return _with_gathered(weights, rows, columns, slots)
    pairs = []
    if _scopes:
        casts = _scopes[-1]
        pairs = [casts.of(w, recipe, slot) for w, slot in zip(weights, slots, strict=True)]
    kept = [pair for pair in pairs if pair is not None]
    if kept and len(kept) == len(weights):
        return Copies([p.rows for p in kept], [p.columns for p in kept], [])
    if not covers(rows) or not covers(columns):
        apart = zip(weights, slots, strict=True)
        return Copies([Cast(w, rows, None, slot=s).pair().rows for w, s in apart], [], [])
    known = [slot.known for slot in slots if slot.known is not None]
    formats = str(rows), None if columns is None or known else str(columns)
    lines = tuple(lists(slots))
    ((codes, scales, amax_t),) = yield [Ask(quantize_rows, (list(weights), *formats), lines)]
    return Copies(_joined(codes, scales), [], (known or amax_t) if columns is not None else [])


def _with_gathered(
    weights: Sequence[Tensor], rows: Operand, columns: Operand | None, slots: Sequence[Slot]
) -> Copies:
    # A checkpoint saves other tensors for the backward than these parameters, which alone have
    # the codes: the node keeps what has them.
    copies = Copies([], [], [])
    for weight, slot in zip(weights, slots, strict=True):
        found = gathered(weight)
        if found is None:
            pair = Cast(weight, rows, columns, slot=slot).pair()
            copies.rows.append(pair.rows)
            copies.columns.append(pair.columns)
        else:
            copies.rows.append(found.rows())
            copies.columns.append(found)
    return copies


def for_gradients(
    weights: Sequence[Tensor], amax_t: Sequence[Tensor], recipe: Recipe, slots: Sequence[Slot]
) -> Steps[list[Quantized]]:
    """The transposed copies, which dgrad reads; `recipe` has one."""
    assert recipe.dgrad is not None
    columns = recipe.dgrad.b
    if not amax_t or any(gathered(w) for w in weights):
        apart = zip(weights, slots, strict=True)
        pairs = [gathered(w) or Cast(w, None, columns, slot=slot).pair() for w, slot in apart]
        return [p.columns() if isinstance(p, GatheredWeight) else p.columns for p in pairs]
    lines = present(slot.columns for slot in slots)
    matrices = list(weights), str(columns), list(amax_t)
    (found,) = yield [Ask(quantize_columns, matrices, (lines,))]
    return _joined(*found)


def columns_of(copy: Quantized | GatheredWeight) -> Quantized:
    """The transposed copy, of one of `Copies.columns`."""
    return copy.columns() if isinstance(copy, GatheredWeight) else copy


def _joined(codes: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Quantized]:
    return [Quantized(c, s, s.new_empty(0)) for c, s in zip(codes, scales, strict=True)]
