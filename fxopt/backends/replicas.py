"""A forward on a module, and not on the replicas that `nn.DataParallel` makes of it.

A replica is a shallow copy, with the tensors of another device in the place of parameters. What
stands in for the module's forward reads the module's own, so a replica runs its class's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

METHOD = "_replicate_for_data_parallel"
REPLICATED = "replicas of nn.DataParallel run their own forward; use DistributedDataParallel"


class Forward(Protocol):
    """Stands in for a module's forward; `installed` is what stood there before, if anything.

    is_withdrawn: whether it only passes calls on.
    """

    module: nn.Module
    installed: Any
    is_withdrawn: bool

    def replicated(self) -> None: ...


def install(module: nn.Module, forward: Any) -> None:
    module.forward = forward
    vars(module)[METHOD] = functools.partial(_replica, module)


def uninstall(module: nn.Module, installed: Any) -> None:
    """Leave what was installed before, by another door or the user."""
    if installed is None:
        vars(module).pop("forward", None)
    else:
        module.forward = installed
    if not hasattr(installed, "replicated"):
        vars(module).pop(METHOD, None)


def withdraw(forwards: Iterable[Forward]) -> None:
    """Uninstall them; one that the user has wrapped since stays under the wrapper."""
    for forward in forwards:
        if vars(forward.module).get("forward") is forward:
            uninstall(forward.module, forward.installed)


def _replica(module: nn.Module) -> nn.Module:
    replica: nn.Module = getattr(type(module), METHOD)(module)
    forward: Any = vars(module).get("forward")
    while hasattr(forward, "replicated"):
        forward.replicated()
        forward = forward.installed
    uninstall(replica, forward)
    return replica
