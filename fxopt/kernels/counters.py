"""Counters: what a quantization leaves about the values that it met, where somebody watches it.

A line of counters is int64 [8], in the order of FIELDS, on the device of the values. The first
ADDED are sums. The others are largest values, of the bits of fp32 magnitudes: those are ordered as
the magnitudes are, and the bits of a NaN are larger than those of any number. `least_scale` is
stored as its distance from MAGNITUDE, so that a line of zeros is one that has met nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fxopt.recipes import Recipe

FIELDS = (
    *("samples", "nonzero", "underflowed", "saturated", "nonfinite"),
    *("amax", "largest_scale", "least_scale"),
)
ADDED = 5
MAGNITUDE = 0x7FFFFFFF
# Factors are rounded: the largest value of a block may end up this far beyond the format's.
SLACK = 1 + 2.0**-20


class Slot(NamedTuple):
    """What else the quantization of a tensor reads and leaves; None for what is not wanted.

    rows, columns: the lines of its two copies, as `quantize` makes them.
    known: fp32 [1], the magnitude that its scale is taken from, in place of its own.
    seen: int32 [1], raised to the bits of its largest magnitude.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    known: Tensor | None = None
    seen: Tensor | None = None


UNWATCHED = Slot()


class Slots(NamedTuple):
    """Where the quantizations of one autograd node are counted: of its x, and for each linear."""

    x: Slot
    weights: Sequence[Slot]
    gradients: Sequence[Slot]


class Recorder(Protocol):
    """Who watches, and which linears."""

    def slots(self, weights: Sequence[Tensor]) -> Slots | None: ...

    def demoted(self, weights: Sequence[Tensor]) -> set[str]: ...


# Of the process and not of a context: autograd runs backwards, and the forwards of checkpoints in
# them, on threads of its own.
_recorder: Recorder | None = None


def record_to(recorder: Recorder | None) -> None:
    """Count the quantizations of nodes whose forward runs from now on, for `recorder`."""
    global _recorder
    _recorder = recorder


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside the context nobody records."""
    recorder = _recorder
    record_to(None)
    try:
        yield
    finally:
        record_to(recorder)


def is_recording() -> bool:
    return _recorder is not None


def slots_for(weights: Sequence[Tensor | None]) -> Slots:
    """The slots of a node with these weights; nothing is counted unless somebody records."""
    found = None if _recorder is None else _recorder.slots([w for w in weights if w is not None])
    unwatched = [UNWATCHED] * len(weights)
    return found or Slots(UNWATCHED, unwatched, unwatched)


def without_demoted(recipe: Recipe, weights: Sequence[Tensor]) -> Recipe:
    """`recipe` without the GEMMs that are demoted for a node with these weights."""
    names = set() if _recorder is None else _recorder.demoted(weights)
    return _without(recipe, frozenset(names)) if names else recipe


@lru_cache(maxsize=64)
def _without(recipe: Recipe, names: frozenset[str]) -> Recipe:
    changes: dict[str, Any] = dict.fromkeys(names)
    return replace(recipe, **changes)


def present(counters: Iterable[Tensor | None]) -> list[Tensor] | None:
    """Lines as the ops that take several matrices want them: one for each, or None."""
    return [c for c in counters if c is not None] or None


def lists(slots: Sequence[Slot]) -> list[list[Tensor] | None]:
    """Counters of row-wise copies, what is known and what is seen, as `quantize_rows` wants it."""
    fields = zip(*((s.rows, s.known, s.seen) for s in slots), strict=True)
    return [present(field) for field in fields]


def count(
    counters: Tensor,
    x: Tensor,
    scaled: Tensor,
    rounded: Tensor,
    amax_rc: Tensor,
    scales_rc: Tensor,
    largest: float,
) -> None:
    """Add one quantization to a line.

    Args:
        counters: int64 [8].
        x, scaled, rounded: the values; times their block's factor; and what the codes stand for.
        amax_rc, scales_rc: fp32 largest magnitude and scale of each block, without stored offsets.
        largest: finite value of the format.
    """
    if not x.numel():
        return
    nonzero, of_zeros, scale_bits = x != 0, amax_rc == 0, _bits(scales_rc)
    found = (
        x.new_ones((), dtype=torch.int64),
        nonzero.sum(),
        (nonzero & (rounded == 0)).sum(),
        (scaled.abs() > largest * SLACK).sum(),
        (~x.isfinite()).sum(),
        _bits(amax_rc).amax(),
        scale_bits.masked_fill(of_zeros, 0).amax(),
        (MAGNITUDE - scale_bits).masked_fill(of_zeros, 0).amax(),
    )
    merge(counters, torch.stack(found))


def raise_to(seen: Tensor | None, x: Tensor) -> None:
    """Raise `seen`, if it is not None, to the bits of the largest magnitude of x."""
    if seen is not None and x.numel():
        bits = x.float().abs().amax().view(torch.int32) & MAGNITUDE
        torch.maximum(seen, bits, out=seen)


def merge(total: Tensor, more: Tensor) -> None:
    """Add the lines `more` [..., 8] to those of `total`."""
    total.narrow(-1, 0, ADDED).add_(more.narrow(-1, 0, ADDED))
    largest = total.narrow(-1, ADDED, len(FIELDS) - ADDED)
    torch.maximum(largest, more.narrow(-1, ADDED, len(FIELDS) - ADDED), out=largest)


def _bits(x: Tensor) -> Tensor:
    """The bits of fp32 magnitudes as int64."""
    return (x.contiguous().view(torch.int32) & MAGNITUDE).long()
