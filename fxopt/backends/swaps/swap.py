"""What a swap is: a forward that may stand for a module's own, and the inputs that prove it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Unfit(Exception):
    """A fused forward does not cover this module; the message says why."""


class Draw:
    """A seeded source of small inputs on the CPU, in the dtype of a module's matrices."""

    B, S, T = 2, 5, 3  # samples, tokens, tokens of the second stream

    def __init__(self, module: nn.Module) -> None:
        parameters = [p for p in module.parameters() if p.is_floating_point()]
        matrices = [p for p in parameters if p.dim() == 2]
        last = next(iter((*matrices[::-1], *parameters)), None)
        self.dtype = torch.get_default_dtype() if last is None else last.dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        # The offset keeps means away from zero: a LayerNorm is then no RMSNorm.
        return (x + 0.3).to(self.dtype)

    def tables(self, *shape: int) -> tuple[Tensor, Tensor]:
        """cos and sin of random angles, in fp32 as models make them."""
        angle = torch.randn(shape, generator=self.generator, device="cpu")
        return angle.cos(), angle.sin()


Arguments = dict[str, Any]


@dataclass(frozen=True)
class Swap:
    """A candidate to stand for the forward of one kind of module.

    name: tells hypotheses about one module apart.
    forward: `forward(module, **arguments)`; raises Unfit where it does not apply.
    examples: small arguments for a module; one dict for each set of arguments that it is given.
    small: a module of the same structure as the given one, as narrow as can be; None for no other
        than the module itself.
    constants: arguments that get no gradient (tables, masks).
    passed_on: arguments that go to the attention function as they are, whatever they hold.
    numbers: integer arguments whose value the proof need not share.
    ignores_more: whether the module's own forward leaves further positional arguments unread.
    """

    name: str
    forward: Callable[..., Any]
    examples: Callable[[Any, Draw], Iterator[Arguments]]
    small: Callable[[Any], nn.Module] | None = None
    constants: tuple[str, ...] = ()
    passed_on: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    ignores_more: bool = False

    def signature(self, arguments: Arguments) -> tuple[Any, ...]:
        """What decides whether a proof holds for a call: all of its arguments but their sizes."""
        return tuple(
            (name, _kind(value, name in self.constants))
            for name, value in sorted(arguments.items())
            if name not in self.passed_on
        )

    def like(self, arguments: Arguments, module: nn.Module) -> Arguments:
        """Small arguments for `module` with the names and dtypes of a call's."""
        given = {n: v for n, v in arguments.items() if n not in self.passed_on}
        for name, value in given.items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and is_traceable_wrapper_subclass(leaf):
                    raise Unfit(f"{name} is a {type(leaf).__name__}")
                if name in self.constants and getattr(leaf, "requires_grad", False):
                    raise Unfit(f"{name} requires grad, the op gives it none; detach it")
        examples = list(self.examples(module, Draw(module)))
        for example in examples:
            if example.keys() == given.keys():
                own = {n: example[n] for n in self.numbers if isinstance(given.get(n), int)}
                cast = _in_dtypes_of({name: given[name] for name in example} | own, example)
                if cast is not None:
                    return cast
        known = " or ".join(dict.fromkeys(_described(e) for e in examples))
        raise Unfit(f"it is called with {_described(given)}, not with {known}")


def _kind(value: Any, constant: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), type(value), constant and value.requires_grad
    if isinstance(value, (tuple, list)):
        return tuple(_kind(v, constant) for v in value)
    return value if isinstance(value, (bool, str)) else type(value)


def _in_dtypes_of(given: Arguments, example: Arguments) -> Arguments | None:
    """The example in the dtypes of a call; None if more than dtypes and sizes differ."""
    (leaves, spec), (of_call, spec_of_call) = map(pytree.tree_flatten, (example, given))
    if spec != spec_of_call or not all(map(_same_kind, leaves, of_call)):
        return None
    cast = [
        e.to(c.dtype) if isinstance(e, Tensor) else c for e, c in zip(leaves, of_call, strict=True)
    ]
    return pytree.tree_unflatten(cast, spec)


def _same_kind(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dim() == b.dim() and a.is_floating_point() == b.is_floating_point()
    return type(a) is type(b) and a == b


def _described(arguments: Arguments) -> str:
    return ", ".join(
        f"{name} of {value.dim()} dims" if isinstance(value, Tensor) else name
        for name, value in arguments.items()
    )


@dataclass(frozen=True)
class Family:
    """A swap for the blocks whose forward is that of one of `classes` (dotted names)."""

    classes: tuple[str, ...]
    swap: Swap


@dataclass(frozen=True)
class Form:
    """A swap for blocks of diffusers that are made of `parts`, whatever their class.

    parts: names of all children and of all parameters of the block's own, apart by spaces.
    """

    parts: str
    swap: Swap

    def fits(self, module: nn.Module, forward: Any) -> bool:
        """Whether `module` has the parts, and a `forward` that is the library's."""
        parts = {n for n, p in module._parameters.items() if p is not None}
        parts.update(name for name, _ in module.named_children())
        return parts == set(self.parts.split()) and is_library(forward)


def is_library(code: Any) -> bool:
    """Whether a function or class is of diffusers, and not of who uses it."""
    return str(code.__module__).partition(".")[0] == "diffusers"


# What constructors of blocks are given, for the narrowest block.
SIZES = {
    "dim": 64,
    "num_heads": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 96,
    "mlp_ratio": 4.0,
    "time_embed_dim": 48,
    "added_kv_proj_dim": None,
}


def narrow(block: nn.Module, **options: Any) -> nn.Module:
    """A narrow block of the same class, by the names that its constructor gives to sizes."""
    names = inspect.signature(type(block).__init__).parameters  # FSDP2 wraps the class
    given = {name: value for name, value in (SIZES | options).items() if name in names}
    return type(block)(**given)
