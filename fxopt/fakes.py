"""Modules and inputs without values: real sizes, no memory.

None stands on a fake CUDA device: autograd in a build without CUDA refuses those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only


@contextlib.contextmanager
def substituted(block: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the context, `make(t)` stands for every parameter and buffer `t` of `block`."""
    made: dict[Tensor, Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in block.modules():
            owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in owners:
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if tensor not in made:
                        made[tensor] = make(tensor)
                    undo.append((tensors, name, tensor))
                    tensors[name] = made[tensor]
        yield
    finally:
        for tensors, name, tensor in undo:
            tensors[name] = tensor


def shell(tensor: Tensor, device: str = "meta") -> Tensor:
    """An uninitialised tensor with `tensor`'s sizes, strides, dtype and gradient flag."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def faked(
    block: nn.Module, args: tuple, kwargs: Mapping[str, Any], device: str = "cpu"
) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Inside the context `block` and the yielded inputs are fake tensors, with gradients on.

    A fake mode is active, so that no op runs; new tensors go to `device` too. On "cpu" attention is
    one flash op; on "meta" PyTorch takes it apart.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return shell(tensor, device)

    with substituted(block, fake):
        fake_args, fake_kwargs = tree_map_only(Tensor, fake, (args, dict(kwargs)))
        with mode, torch.device(device), torch.enable_grad():
            yield fake_args, fake_kwargs
