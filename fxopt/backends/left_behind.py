"""What a forward leaves behind of a call, beside its results: a loss in a list, a table in a cache.

A capture would leave it behind once, as a fake tensor, and its graph never again. So the module's
own forward runs first, on copies, and the capture is given up where anything remains.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt.backends.calls import Call, is_plain
from fxopt.backends.failures import described, giving_up
from fxopt.backends.reads import Reads, frozen, recording, same_attributes
from fxopt.backends.trial import copied, has_no_values, on_copies
from fxopt.backends.unseen import CannotCapture

KEPT = (
    "its forward keeps a tensor beyond the call, in a list, a cache or another object, where a "
    "graph would not put it: return it"
)
WRITTEN = "its forward writes into a list or dict that it is given: a graph would not; return it"
WRAPPED = (
    "a forward is wrapped by a functools.partial, as hooks of accelerate and diffusers wrap it: a "
    "graph would not see what they keep"
)


def require_nothing(module: nn.Module, forward: Callable[..., Any], call: Call) -> None:
    """Run `forward` on copies of the call's inputs and of what `module` holds.

    Raises:
        CannotCapture: something of the call remains, or the forward fails.
    """
    if any(map(has_no_values, (*module.parameters(), *call.leaves))):
        return
    _require_no_wrapper(module, forward)
    reads = Reads()
    run = functools.partial(_run, module, forward, call, reads)
    with giving_up(reads, described):
        left = _left(run)
        if left:
            _take_out(left)
            again = _left(run)  # a cache of constants is full after the first
            _take_out(again)
            if again:
                raise CannotCapture(KEPT)


def _require_no_wrapper(module: nn.Module, forward: Callable[..., Any]) -> None:
    if isinstance(forward, functools.partial):
        raise CannotCapture(WRAPPED)
    for path, submodule in module.named_modules():
        held = vars(submodule).get("forward")
        if path and isinstance(held, functools.partial):
            raise CannotCapture(WRAPPED, Reads({(path, "forward"): frozen(held)}))


def _run(module: nn.Module, forward: Callable[..., Any], call: Call, reads: Reads) -> None:
    copies = [
        copied(v.detach()).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in call.leaves
    ]
    copies = [copied(v) if isinstance(v, Tensor) else v for v in copies]  # no leaves, for writes
    arguments = call.arguments(copies)
    given = pytree.tree_structure(arguments)  # a torch.Size comes out of its leaves as a tuple
    with same_attributes(module), on_copies(module), recording(module, reads):
        args, kwargs = arguments
        forward(*args, **kwargs)
    reads.undo()
    leaves, spec = pytree.tree_flatten(arguments)
    if spec != given or any(a is not b for a, b in zip(leaves, copies, strict=True)):
        raise CannotCapture(WRITTEN)


def _left(run: Callable[[], None]) -> tuple[Tensor, ...]:
    """The tensors that `run` makes and that are there when it is over; those that other threads
    make meanwhile, as loaders of data do, are theirs."""
    was_enabled, made = gc.isenabled(), _Made()
    gc.disable()
    try:
        gc.collect(0)  # what was there before is no longer of the youngest generation
        with made:
            run()
        young = [weakref.ref(o) for o in gc.get_objects(generation=0) if is_plain(o)]
    finally:
        if was_enabled:
            gc.enable()
    if young:
        gc.collect()
    alive = (ref() for ref in young)
    return tuple(t for t in alive if t is not None and not has_no_values(t) and t in made)


class _Made(TorchFunctionMode):
    """Knows the tensors that this thread's calls of PyTorch have returned, and what depends on
    them: no mode sees what an autograd function returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        return out

    def __contains__(self, t: Tensor) -> bool:
        known = {id(m) for ref in self.made if (m := ref()) is not None}
        return id(t) in known or any(id(leaf) in known for leaf in _leaves(t))


def _leaves(t: Tensor) -> Iterator[Tensor]:
    """What a gradient of `t` would be accumulated in."""
    stack, seen = [t.grad_fn], set[Any]()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            yield node.variable


def _take_out(left: tuple[Tensor, ...]) -> None:
    """Take tensors out of lists, to which they were appended, and what depends on copies of
    parameters out of dicts, where it would be found again; attributes are set again."""
    known, learned = {id(t) for t in left}, {id(t) for t in left if t.requires_grad}
    for held in _referrers(left):
        if type(held) in (list, deque):
            kept = [item for item in held if id(item) not in known]
            held.clear()
            held.extend(kept)
        elif type(held) is dict:
            keys = [k for k, v in held.items() if id(v) in learned]
            for key in keys if keys and not _is_of_attributes(held) else ():
                del held[key]


def _referrers(left: tuple[Tensor, ...]) -> list[Any]:
    """Objects that hold one of them, frozen ones included, of which `gc` does not tell."""
    if not left:
        return []
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    try:
        return gc.get_referrers(*left)
    finally:
        if was_frozen:
            gc.freeze()


def _is_of_attributes(held: dict[Any, Any]) -> bool:
    return any(getattr(o, "__dict__", None) is held for o in gc.get_referrers(held))
