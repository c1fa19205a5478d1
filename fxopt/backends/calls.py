"""One call of a block, and which calls a graph is for."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxopt.passes import ir
from fxopt.passes.autocast import Autocast

TENSORS = (Tensor, nn.Parameter, nn.Buffer)
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def is_plain(value: Any) -> bool:
    """Whether `value` is a tensor and of no subclass, which a graph would not know."""
    return type(value) in TENSORS or isinstance(value, torch._subclasses.FakeTensor)


@dataclass(frozen=True)
class Call:
    """The inputs of one call, flat, and the modes it is made in."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    autocast: Autocast
    grad_mode: bool
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        shapes = tuple(t.shape for t in tensors)
        return Call(leaves, spec, Autocast.current(device), torch.is_grad_enabled(), shapes)

    @property
    def device(self) -> torch.device | None:
        return next((v.device for v in self.leaves if isinstance(v, Tensor)), None)

    def is_empty(self) -> bool:
        """Whether the first tensor, of tokens, has none; others may be absent in this way."""
        return bool(self.shapes) and 0 in self.shapes[0]

    def kind(self) -> Hashable:
        """All but sizes and numbers."""
        kinds = [
            (v.dtype, v.dim(), type(v)) if isinstance(v, Tensor) else type(v) for v in self.leaves
        ]
        return self.spec, self.autocast, self.grad_mode, tuple(kinds)

    def singles(self) -> Hashable:
        """Which sizes are 1: PyTorch's own Python, and a model's, may branch on those."""
        return tuple(tuple(size == 1 for size in shape) for shape in self.shapes)

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments, with these leaves."""
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Leaf:
    """What one input of a call must look like; `shape` is None for what is no tensor."""

    value: Any
    shape: tuple[Any, ...] | None
    dtype: torch.dtype | None
    device: torch.device | None
    trainable: bool

    def matches(self, value: Any) -> bool:
        if self.shape is None:
            return type(value) is type(self.value) and bool(value == self.value)
        return (
            is_plain(value)
            and value.dtype == self.dtype
            and value.device == self.device
            and value.dim() == len(self.shape)
            and (self.trainable or not value.requires_grad)
        )


def leaves_of(
    gm: fx.GraphModule, num_slots: int, example: Sequence[Any], constants: set[str]
) -> list[Leaf]:
    """What the inputs of `gm` behind the first `num_slots` must look like."""
    placeholders = gm.graph.find_nodes(op="placeholder")[num_slots:]
    found = []
    for node, value in zip(placeholders, example, strict=True):
        if not isinstance(value, Tensor):
            found.append(Leaf(value, None, None, None, True))
            continue
        trainable = str(node.target) not in constants
        found.append(Leaf(None, ir.shape(node), value.dtype, value.device, trainable))
    return found


def sizes_fit(leaves: Sequence[Leaf], guards: Sequence[Any], shapes: Sequence[torch.Size]) -> bool:
    """Whether the sizes of a call can stand for the symbols of a graph."""
    symbolic = [leaf.shape for leaf in leaves if leaf.shape is not None]
    pairs = [
        (ir.expression(expected), actual)
        for expecteds, shape in zip(symbolic, shapes, strict=True)
        for expected, actual in zip(expecteds, shape, strict=True)
    ]
    values: dict[Any, int] = {}
    for expected, actual in pairs:
        symbol = isinstance(expected, sympy.Symbol)
        if symbol and (actual == 0 or values.setdefault(expected, actual) != actual):
            return False
    rest = [(e, a) for e, a in pairs if not isinstance(e, sympy.Symbol)]
    return all(sympy.sympify(e).subs(values) == a for e, a in rest) and all(
        guard.subs(values) == sympy.true for guard in guards
    )


def size_guards(gm: fx.GraphModule) -> list[Any]:
    """Conditions on sizes that a capture relied on, but for "at least 2".

    What was captured at 2 is tried at 1 before it is used there.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    shapes = [ir.shape(n) for n in placeholders if ir.tensor(n) is not None]
    sizes = [s for shape in shapes for s in shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return []
    shape_env = sizes[0].node.shape_env
    assert shape_env is not None
    known = set().union(*(ir.expression(s).free_symbols for s in sizes))
    # Sizes found to be equal share one symbol from then on. Symbols that no shape holds are
    # strides: they decide whether a reshape copies, which the graph leaves open.
    guards = [shape_env.replace(g.expr) for g in shape_env.guards]
    return [g for g in guards if g.free_symbols <= known and not _holds_from_two(g)]


def _holds_from_two(guard: Any) -> bool:
    """Whether a condition holds for all sizes from 2 on."""
    more = {s: 2 + sympy.Dummy(integer=True, nonnegative=True) for s in guard.free_symbols}
    return bool(guard.subs(more) == sympy.true)


def state_sources(
    module: nn.Module, slots: Sequence[tuple[str, Any]]
) -> list[tuple[dict[str, Any], str]]:
    """Where the state that the slots name is found at the time of a call: holder and name."""
    sources: list[tuple[dict[str, Any], str]] = []
    for kind, target in slots:
        if kind == "constant":
            sources.append(({"": target}, ""))
            continue
        path, _, name = target.rpartition(".")
        holder = module.get_submodule(path)
        sources.append((holder._parameters if kind == "parameter" else holder._buffers, name))
    return sources


def is_traced() -> bool:
    """Whether a compiler or an export reads this call: while one thread exports, PyTorch says in
    all threads that it compiles."""
    reads = torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return reads and torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether vmap, grad, jvp or forward-mode AD is on: the ops know reverse mode alone."""
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return in_functorch or forward_ad._current_level >= 0
