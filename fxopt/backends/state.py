"""What fxopt has put into a model: installed forwards and their report, found again on the model.

Both live in the `__dict__` of the modules they belong to, so that `copy.deepcopy` copies them and
`state_dict` never sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from fxopt.backends import compiled_graphs, replicas
from fxopt.errors import (
    NotAModule,
    NothingToRestore,
    NotReported,
    OtherRecipe,
    OtherSetting,
    StrictRule,
)
from fxopt.recipes import Recipe
from fxopt.report import Report

ATTRIBUTE = "_fxopt_doors"


@dataclass(frozen=True)
class Settings:
    """What a door is opened with; `blocks` are what `targets` picks."""

    recipe: Recipe
    blocks: Mapping[str, nn.Module]
    targets: Sequence[str | type[nn.Module]] | None = None
    execution: str = "eager"

    def require(self, asked: Settings) -> None:
        """Raise if a door with these settings does not give what is `asked`.

        Raises:
            OtherRecipe, OtherSetting: the first that differs.
        """
        if asked.recipe != self.recipe:
            raise OtherRecipe(asked.recipe.name, self.recipe.name)
        if asked.execution != self.execution:
            raise OtherSetting("execution", asked.execution, self.execution)
        if asked.targets != self.targets and asked._picked() != self._picked():
            raise OtherSetting("targets", asked.targets, self.targets)

    def _picked(self) -> set[int]:
        return {id(block) for block in self.blocks.values()}


class Door(Protocol):
    """One use of a door on a model."""

    settings: Settings

    @property
    def forwards(self) -> Sequence[replicas.Forward]: ...

    def report(self) -> Report: ...

    def restore(self, model: nn.Module) -> None: ...


def require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise NotAModule(model)


def doors(model: nn.Module) -> list[Any]:
    return model.__dict__.get(ATTRIBUTE, [])


def remember(model: nn.Module, door: Door) -> None:
    """Keep a door on its model, and behind it the gathering of its weights, if asked for."""
    opened = model.__dict__.setdefault(ATTRIBUTE, [])
    opened.append(door)
    if door.settings.recipe.all_gather != "model":
        from fxopt.backends.gathering import Gathering  # loads FSDP2

        opened.append(Gathering(model, door))


def report(model: nn.Module | None = None) -> Report:
    """What the doors have rewritten so far, what they declined, and why.

    Args:
        model: what was given to `optimize` or `swap`, or is compiled with `backend="fxopt"`, as a
            whole or in parts; None for all graphs that were so compiled in this process.

    Raises:
        NotReported: no door was opened on this model, or no graph of it is compiled yet.
    """
    if model is None:
        found = [graph.report for graph in compiled_graphs.GRAPHS]
    else:
        require_module(model)
        found = [door.report() for door in doors(model)]
        found += compiled_graphs.reports_of(model, any(map(is_compiled, model.modules())))
    if not found:
        raise NotReported(type(model).__name__)
    merged = found[0]
    for other in found[1:]:
        merged = merged.merge(other)
    return merged


def is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize` and `swap` on `model`, exactly; the same object comes back.

    What has wrapped a block's forward since stays, around the own forward. Blocks that were copied
    or taken from another model are restored as well.

    Raises:
        NothingToRestore: no door was opened on this model.
    """
    require_module(model)
    opened, strays = doors(model), list(_strays(model))
    if not opened and not strays:
        raise NothingToRestore(type(model).__name__)
    while opened:
        close(model, opened[-1])
    for module in strays:
        while hasattr(vars(module).get("forward"), "replicated"):
            replicas.uninstall(module, vars(module)["forward"].installed)
    return model


def _strays(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose forward a door of another model has installed."""
    known = {id(f.module) for m in model.modules() for d in doors(m) for f in _forwards(d)}
    for module in model.modules():
        if hasattr(vars(module).get("forward"), "replicated") and id(module) not in known:
            yield module


def _forwards(door: Any) -> Sequence[replicas.Forward]:
    return () if hasattr(door, "door") else door.forwards


def close(model: nn.Module, door: Door) -> None:
    """Undo one door, and the gathering of its weights, and forget them."""
    for behind in [d for d in doors(model) if getattr(d, "door", None) is door]:
        close(model, behind)
    for hook in list(model._forward_hooks.values()):
        if isinstance(hook, StrictOnce) and hook.door is door:
            hook.handle.remove()
    door.restore(model)
    for forward in _forwards(door):
        forward.is_withdrawn = True
    doors(model).remove(door)
    if not doors(model):
        del model.__dict__[ATTRIBUTE]


@contextmanager
def shut(model: nn.Module) -> Iterator[None]:
    """Inside the context the modules of `model` run their own forwards, and no door notices."""
    opened = [(m, d) for m in model.modules() for d in doors(m) if not hasattr(d, "door")]
    installed = [(m, m.__dict__.get("forward"), m._compiled_call_impl) for m in model.modules()]
    hooks = {m: m._forward_hooks.copy() for m, _ in opened}
    withdrawn = [f for _, door in opened for f in _forwards(door)]
    for f in withdrawn:  # one may stay under a wrapper of the user's
        f.is_withdrawn = True
    for module, door in reversed(opened):
        door.restore(module)
        for key, hook in hooks[module].items():
            if isinstance(hook, StrictOnce):
                module._forward_hooks.pop(key, None)
    try:
        yield
    finally:
        for f in withdrawn:
            f.is_withdrawn = False
        for module, forward, compiled in installed:
            if hasattr(forward, "replicated"):
                replicas.install(module, forward)
            module._compiled_call_impl = compiled
        for module, of_module in hooks.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(of_module)


class StrictOnce:
    """A forward hook that raises StrictRule if a rule has not fired yet.

    closes: whether it then closes the door, as the call that asks has opened it.

    It is an object, and no closure, so that a copy of the model checks its own door.
    """

    def __init__(self, model: nn.Module, door: Door, strict: Sequence[str], closes: bool) -> None:
        self.door, self.strict, self.closes = door, strict, closes
        self.handle = model.register_forward_hook(self)

    def __call__(self, model: nn.Module, *_: Any) -> None:
        self.handle.remove()
        try:
            require_fired(self.door, self.strict)
        except StrictRule:
            if self.closes:
                close(model, self.door)
            raise


def require_fired(door: Door, strict: Sequence[str]) -> None:
    """Raise StrictRule if one of these rules has not fired."""
    report = door.report()
    for rule in strict:
        if not report.count(rule):
            raise StrictRule(rule, report.declined)


def with_fqn(report: Report, prefix: str, block_class: str) -> Report:
    """The same report, its entries placed in one block of the model."""

    def placed(entry: Any) -> Any:
        return replace(entry, fqn=prefix, block_class=block_class)

    return replace(
        report,
        applied=tuple(map(placed, report.applied)),
        declined=tuple(map(placed, report.declined)),
        attentions=tuple(map(placed, report.attentions)),
    )
