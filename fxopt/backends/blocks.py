"""Which modules of a model are its blocks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from fxopt.errors import TargetMatchesNothing

# A transformer block has at least an attention or MLP of two matrices; a list of single linears
# is no list of blocks.
MIN_MATRICES = 2


def find_blocks(
    model: nn.Module, targets: Sequence[str | type[nn.Module]] | None
) -> dict[str, nn.Module]:
    """Blocks by FQN: the items of the model's outermost lists of blocks, or what `targets` picks.

    Args:
        targets: FQN globs ("transformer_blocks.*") or classes; None for the repeated blocks. A
            model without lists of blocks is one block itself, under the name "".

    Raises:
        TargetMatchesNothing: a target picks no submodule, or is neither glob nor class.
    """
    if targets is None:
        return dict(_repeated("", model)) or {"": model}
    named = {fqn: m for fqn, m in model.named_modules() if fqn}
    picked: dict[str, nn.Module] = {}
    for target in [targets] if isinstance(targets, (str, type)) else targets:
        if isinstance(target, str):
            found = {f: m for f, m in named.items() if fnmatch.fnmatchcase(f, target)}
        else:
            is_class = isinstance(target, type)
            found = {f: m for f, m in named.items() if is_class and isinstance(m, target)}
        if not found:
            name = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
            raise TargetMatchesNothing(name, list(named))
        picked |= found
    # A module inside a picked one is rewritten with it.
    return {f: m for f, m in picked.items() if not any(f.startswith(o + ".") for o in picked)}


def _repeated(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        fqn = f"{prefix}.{name}" if prefix else name
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            fqn, child = _unwrapped(fqn, child)
            if _is_block(child):
                yield fqn, child
                continue
        yield from _repeated(fqn, child)


def _unwrapped(fqn: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module behind wrappers (of a checkpoint, a compiler) that hold nothing else."""
    children = list(module.named_children())
    while len(children) == 1 and not module._parameters:
        name, module = children[0]
        fqn, children = f"{fqn}.{name}", list(module.named_children())
    return fqn, module


def _is_block(module: nn.Module) -> bool:
    num_matrices = sum(p.dim() == 2 for p in module.parameters())
    own_forward = type(module).forward not in (nn.Module.forward, nn.Sequential.forward)
    return num_matrices >= MIN_MATRICES and own_forward and len(list(module.children())) > 1
