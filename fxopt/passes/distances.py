"""How far apart two tokens are, at most, about which a number in a mask's graph decides.

A mask that is run at some numbers of tokens is known at others only if nothing in it happens
farther away. That is so where numbers are added to positions and compared with them: each then
decides about keys no farther than itself. A product, a quotient or a root would make a farther one
of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.passes import ir
from fxopt.passes.ir import aten

# A larger number fills what is hidden, and is no distance: nobody has a mask of so many tokens.
FARTHEST = 1 << 20
POSITIONS = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})
FILLS = frozenset(
    {
        *(aten.full.default, aten.new_full.default, aten.full_like.default),
        *(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default),
        *(aten.ones.default, aten.new_ones.default, aten.ones_like.default),
        *(aten.scalar_tensor.default, aten.fill_.Scalar),
    }
)
SUMS = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.neg.default, aten.abs.default),
        *(aten.cumsum.default, aten.diff.default, aten.index.Tensor, aten.minimum.default),
        *(aten.where.self, aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther),
        *(aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor),
        *(aten.maximum.default, aten.tril.default, aten.triu.default),
    }
)
SHAPED = POSITIONS | FILLS | ir.VIEWS
STEPS = SHAPED | SUMS | ir.COPIES | ir.CASTS
EXACT = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})


def symbols(made: Sequence[fx.Node]) -> set[Any]:
    """Of all sizes that come into the nodes of a mask."""
    sizes = (ir.expression(s) for node in made for s in _leaves(node))
    return set().union(*(getattr(s, "free_symbols", ()) for s in sizes))


def reach(made: Sequence[fx.Node], tokens: Any) -> int | None:
    """The farthest distance that a mask decides about; None if that cannot be said.

    Args:
        made: what a mask is made by, in order.
        tokens: the symbol of their number.
    """
    positional = set[fx.Node]()
    found = 0
    for node in made:
        is_bool = ir.dtype(node) == torch.bool
        if not is_bool and (
            node.target in POSITIONS or positional.intersection(node.all_input_nodes)
        ):
            positional.add(node)
            if ir.dtype(node) not in EXACT:
                return None  # of large positions, several are one number
        elif node.target is aten.cumsum.default:
            positional.add(node)
        numbers = [_number(leaf, tokens, node) for leaf in _leaves(node)]
        if None in numbers or not (
            _decides(node) if is_bool else node.target in STEPS or _scales_fill(node, positional)
        ):
            return None
        if node in positional and any(isinstance(n, float) and n % 1 for n in numbers):
            return None
        found += sum(int(abs(n)) + 1 for n in numbers if n is not None and abs(n) < FARTHEST)
    return found


def _decides(node: fx.Node) -> bool:
    """Whether a boolean op compares, combines or rearranges; one compares within a ratio."""
    return node.target is not aten.isclose.default


def _scales_fill(node: fx.Node, positional: set[fx.Node]) -> bool:
    """(1 - mask) * -3e38."""
    if not ir.is_call(node, aten.mul.Tensor, aten.mul.Scalar) or node in positional:
        return False
    factors = [a for a in node.args if not isinstance(a, fx.Node)]
    return bool(factors) and all(abs(f) >= FARTHEST for f in factors)


def _leaves(node: fx.Node) -> Iterator[Any]:
    """Numbers and sizes among the arguments of a node."""
    for leaf in pytree.tree_leaves((node.args, node.kwargs)):
        value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
        if isinstance(value, (int, float, torch.SymInt)) and not isinstance(value, bool):
            yield value


def _number(value: Any, tokens: Any, node: fx.Node) -> int | float | None:
    """What stands beside symbols in a sum; None for more than a sum, and for other symbols where
    they would be more than sizes."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = ir.expression(value)
    if expression.is_Atom and not expression.is_number and node.target in SHAPED:
        return 0
    beside = expression if expression.is_number else expression - tokens
    return int(beside) if beside.is_Integer else None
