"""Slices of a sequence that are modulated apart and joined again, as the whole sequence.

    cat([x[:, :n] * a, x[:, n:] * b], 1)  =  x * cat([a for n tokens, b for the others], 1)

A first frame has a modulation of its own, say. On the right the rules that follow see a norm or a
gated residual whose tokens differ in modulation; where `norm_modulate_segments` takes it, what is
joined there is never in memory. A compiler fuses slices by itself, so the rule serves eager
execution only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from fxopt.passes import algebra, ir, symbols
from fxopt.passes.ir import aten
from fxopt.passes.lookup import POINTWISE, is_one_row
from fxopt.passes.rule import Binding, Call, Reason, Rule

Nodes = Mapping[fx.Node, fx.Node]
# Adds to a graph what pieces are as one, of the binding's inputs.
Build = Callable[[Call, Nodes], Any]

SUMS = (aten.add.Tensor, aten.addcmul.default)
# Of each element by itself: pieces of the result are results of pieces.
ELEMENTWISE = (*POINTWISE, *SUMS, aten.sub.Tensor, aten.mul.Tensor)


def propose(cat: fx.Node) -> Iterator[Binding | Reason]:
    named = ir.arguments(cat)
    pieces = named["tensors"]
    if len(pieces) < 2 or named["dim"] % len(ir.shape(cat)) != len(ir.shape(cat)) - 2:
        return
    joint = _Joint([ir.shape(piece)[-2] for piece in pieces])
    build = joint.of(pieces)
    if build is None or not _serves(cat, joint.wholes):
        yield from (Reason(why, cat) for why in joint.reasons)
        return
    if not all(symbols.is_known(length, cat.graph) for length in joint.lengths):
        yield Reason("the length of a piece is no sum of sizes of the inputs", cat)
        return
    inputs = tuple(dict.fromkeys((*joint.wholes, *joint.rows)))

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        whole: fx.Node = build(call, dict(zip(inputs, nodes, strict=True)))
        return whole

    yield Binding(cat, inputs, (cat,), emit, "norm_modulate")


def _serves(cat: fx.Node, wholes: Sequence[fx.Node]) -> bool:
    """Whether what follows is a modulated norm, a gated residual, or the sliced tensor itself."""
    pieces = ir.arguments(cat)["tensors"]
    if _source(pieces[0]) in wholes:
        # Who gets a copy may write to it.
        return not any(u.op == "output" or ir.is_call(u, *ir.VIEWS) for u in cat.users)
    users = algebra.through_casts(cat).users
    is_sum = ir.is_call(pieces[0], *SUMS) or any(ir.is_call(u, *SUMS) for u in users)
    return bool(wholes) and (is_sum or any(algebra.as_norm(whole) for whole in wholes))


class _Joint:
    """Reads what pieces of a sequence are as one.

    lengths: of the pieces, in tokens. wholes: tensors that the pieces are slices of. rows: what
    all tokens of a piece share. reasons: why slices are not all of a tensor, one by one.
    """

    def __init__(self, lengths: Sequence[Any]) -> None:
        self.lengths = lengths
        self.wholes: list[fx.Node] = []
        self.rows: list[fx.Node] = []
        self.reasons: list[str] = []

    def of(self, nodes: Sequence[Any]) -> Build | None:
        """What `nodes`, one for each piece, are as one; None if that is not known."""
        first = nodes[0]
        if not all(isinstance(n, fx.Node) for n in nodes):
            is_one = all(type(n) is type(first) and n == first for n in nodes)
            return (lambda call, given: first) if is_one else None
        if any(ir.tensor(n) is None for n in nodes):
            return None
        if self._are_slices(nodes):
            return self._whole(nodes)
        if all(map(is_one_row, nodes)):
            return self._row(nodes)
        return self._elementwise(nodes)

    def _are_slices(self, nodes: Sequence[fx.Node]) -> bool:
        return all(
            _source(n) is not None and len(ir.shape(n)) > 1 and ir.same(ir.shape(n)[-2], length)
            for n, length in zip(nodes, self.lengths, strict=True)
        )

    def _whole(self, nodes: Sequence[fx.Node]) -> Build | None:
        whole, *others = dict.fromkeys(map(_source, nodes))
        assert whole is not None
        if others:
            self.reasons.append(f"what is joined are slices of {whole.name} and {others[0]}")
            return None
        if not _follow(nodes, whole):
            self.reasons.append(f"the slices of {whole.name} are not all of it, one by one")
            return None
        self.wholes.append(whole)
        return lambda call, given: given[whole]

    def _row(self, nodes: Sequence[fx.Node]) -> Build | None:
        if len(set(nodes)) == 1:
            self.rows.append(nodes[0])
            return lambda call, given: given[nodes[0]]
        read = [algebra.offset_by_one(n) for n in nodes]
        if all(offset == 1.0 for _, offset in read):
            of_scales = self._row([scale for scale, _ in read])
            return of_scales and (
                lambda call, given: call(aten.add.Tensor, of_scales(call, given), 1)
            )
        sizes = ir.shape(nodes[0])
        if not all(
            ir.same(ir.shape(n), sizes) and ir.dtype(n) == ir.dtype(nodes[0]) for n in nodes
        ):
            self.reasons.append("the pieces are modulated by rows of several shapes or dtypes")
            return None
        self.rows += nodes
        leading = [-1] * (len(sizes) - 2)

        def build(call: Call, given: Nodes) -> fx.Node:
            each = zip(nodes, self.lengths, strict=True)
            parts = [call(aten.expand.default, given[n], [*leading, size, -1]) for n, size in each]
            return call(aten.cat.default, parts, -2)

        return build

    def _elementwise(self, nodes: Sequence[fx.Node]) -> Build | None:
        target, named = nodes[0].target, [dict(n.kwargs) for n in nodes]
        if not all(ir.is_call(n, *ELEMENTWISE) and n.target is target for n in nodes):
            return None
        if len({len(n.args) for n in nodes}) > 1 or len({*map(tuple, named)}) > 1:
            return None
        args = [self.of(each) for each in zip(*(n.args for n in nodes), strict=True)]
        kwargs = {key: self.of([given[key] for given in named]) for key in named[0]}
        if None in args or None in kwargs.values():
            return None

        def build(call: Call, given: Nodes) -> fx.Node:
            made = {key: value(call, given) for key, value in kwargs.items() if value}
            return call(target, *(a(call, given) for a in args if a), **made)

        return build


def _source(piece: fx.Node) -> fx.Node | None:
    """What `piece` is a slice of, if it is one."""
    if ir.is_call(piece, operator.getitem):
        split: fx.Node = piece.args[0]
        return split.args[0] if ir.is_call(split, *ir.SPLITS) else None
    return piece.args[0] if ir.is_call(piece, aten.slice.Tensor, aten.narrow.default) else None


def _follow(slices: Sequence[fx.Node], whole: fx.Node) -> bool:
    """Whether `slices` are all tokens of `whole`, one slice behind the other."""
    x, num_tokens = ir.tensor(whole), 0
    assert x is not None
    for node in slices:
        piece = _taken(node, x)
        at = x.storage_offset() + num_tokens * x.stride(-2)
        if not (ir.same(piece.stride(), x.stride()) and ir.same(piece.storage_offset(), at)):
            return False
        num_tokens += piece.shape[-2]
    return ir.same((*x.shape[:-2], num_tokens, x.shape[-1]), tuple(x.shape))


def _taken(piece: fx.Node, x: Tensor) -> Tensor:
    """`piece` of the tensor that its source now is: another op may have laid it out otherwise."""
    view = piece.args[0] if ir.is_call(piece, operator.getitem) else piece
    assert isinstance(view, fx.Node) and callable(view.target)
    args, kwargs = map_arg((view.args[1:], view.kwargs), lambda n: n.meta["val"])
    found = view.target(x, *args, **kwargs)
    taken: Tensor = found if view is piece else found[piece.args[1]]
    return taken


RULE = Rule(
    name="join_slices",
    version=1,
    anchors=(aten.cat.default,),
    propose=propose,
    compiled=False,
)
