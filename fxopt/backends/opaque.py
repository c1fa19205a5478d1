"""Autograd functions that a forward calls: a node of the graph that calls them again.

Tracing goes through a `torch.autograd.Function` and leaves its backward behind. As an op it is one
node, which at run time is the function itself, on the call's tensors, with its own backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxopt.backends.calls import PLAIN
from fxopt.passes.autocast import Autocast

_LIBRARY = torch.library.Library("fxopt_opaque", "DEF")
_NUMBERS = count()  # names of ops are for good
# What every `apply` comes to, also one that was bound before anybody looked.
FUNCTION: Any = torch.autograd.function._SingleLevelFunction


class CannotHold(Exception):
    """The call is more than tensors and numbers in, new tensors out."""


def apply(cls: Any, *args: Any) -> Any:
    """`cls.apply(*args)`, whatever stands in its place."""
    return super(FUNCTION, cls).apply(*args)


def call(cls: type, args: tuple[Any, ...]) -> Any:
    """`cls.apply(*args)`, for a tracer one call of an op.

    Raises:
        CannotHold: an argument is an object, or the function writes or returns an input, or returns
            None elsewhere than in an earlier capture.
    """
    leaves, spec = pytree.tree_flatten(args)
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    sizes = [v for v in leaves if isinstance(v, torch.SymInt)]
    others = [v for v in leaves if not isinstance(v, (Tensor, torch.SymInt))]
    for value in others:
        if not isinstance(value, PLAIN):
            raise CannotHold(f"is given a {type(value).__name__}")
    kinds = "".join(_kind(v) for v in leaves)
    devices = {t.device.type for t in tensors}
    known = filter(torch.amp.is_autocast_available, sorted(devices))
    autocast = tuple(map(Autocast.current, known))
    op, nested = _op(cls, kinds, spec, tuple((type(v), v) for v in others), autocast)
    versions = [t._version for t in tensors]
    results = op(tensors, sizes)
    if versions != [t._version for t in tensors]:
        raise CannotHold("writes to its input")
    storages = {t.untyped_storage()._cdata for t in tensors}
    if any(r.untyped_storage()._cdata in storages for r in results):
        raise CannotHold("returns its input")
    ((out_spec, is_none),) = nested
    rest = iter(results)
    return pytree.tree_unflatten([None if none else next(rest) for none in is_none], out_spec)


def _kind(leaf: Any) -> str:
    return "t" if isinstance(leaf, Tensor) else "s" if isinstance(leaf, torch.SymInt) else "o"


@cache
def _op(
    cls: type,
    kinds: str,
    spec: pytree.TreeSpec,
    others: tuple[tuple[type, Any], ...],
    autocast: tuple[Autocast, ...],
) -> tuple[Callable[..., list[Tensor]], list[tuple[pytree.TreeSpec, list[bool]]]]:
    """The op for calls that differ in tensors and sizes alone; and, once it has run, how its
    results are nested and which are None.
    """
    nested: list[tuple[pytree.TreeSpec, list[bool]]] = []

    def run(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        given = {"t": iter(tensors), "s": iter(sizes), "o": iter([value for _, value in others])}
        args = pytree.tree_unflatten([next(given[kind]) for kind in kinds], spec)
        with ExitStack() as stack:
            # A graph runs without: the casts of its other nodes are written out.
            for state in autocast:
                stack.enter_context(torch.autocast(state.device_type, state.dtype, state.enabled))
            results, out_spec = pytree.tree_flatten(apply(cls, *args))
        if not all(r is None or isinstance(r, Tensor) for r in results):
            raise CannotHold("returns more than tensors")
        found = out_spec, [r is None for r in results]
        if not nested:
            nested.append(found)
        elif nested != [found]:
            raise CannotHold("returns other things than when it was captured")
        return [r for r in results if r is not None]

    name = f"{cls.__name__}_{next(_NUMBERS)}"
    # Its backward is its own, whatever it reads: it may draw random numbers, and is not moved.
    tags = (torch.Tag.nondeterministic_seeded,)
    _LIBRARY.define(f"{name}(Tensor[] tensors, SymInt[] sizes) -> Tensor[]", tags=tags)
    for key in ("CompositeExplicitAutograd", "Autograd"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fxopt_opaque::{name}", run, lib=_LIBRARY)
    return getattr(torch.ops.fxopt_opaque, name).default, nested
