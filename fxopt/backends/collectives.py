"""Whether a forward or its backward waits for other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem"})
ALONE = (
    "its forward runs collectives, and another graph would be tried by running them on this "
    "process alone: let the first call of all processes have the kind and sizes of later ones"
)


class Collectives(TorchDispatchMode):
    """`were_run` tells whether any ran within; a graph that holds some hides none of them."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.were_run = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.were_run |= func.namespace in NAMESPACES
        return func(*args, **(kwargs or {}))


def has_others() -> bool:
    """Whether there are processes to wait for."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
