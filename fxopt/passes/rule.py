"""What a rule is: it looks at an anchor node and says which region means which op.

A rule only has to be a good guess. Whether the region may be replaced (`legality.obstacles`) and
whether it computes the same (`prove.prove`) is decided in one place for all rules and all doors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

Tier = Literal["exact", "rounding", "low_precision"]
# call(target, *args) adds one node to the graph under construction and returns it; a symbolic size
# among `args` has to be one that `symbols.is_known`.
Call = Callable[..., fx.Node]
Emit = Callable[..., fx.Node | tuple[fx.Node, ...]]


@dataclass(frozen=True)
class Reason:
    """Why a rule does not apply at a node, in the user's terms."""

    why: str
    node: fx.Node
    remedy: str = ""


@dataclass(frozen=True)
class Binding:
    """A region of the graph and what would stand in its place.

    inputs: tensor nodes that the region reads and the replacement takes, in order.
    outputs: nodes of the region whose values others use.
    emit: `emit(call, *inputs)` builds the replacement and returns its outputs, in order.
    constants: inputs that get no gradient from the replacement; the model must not train them.
    op: the `fxopt::` op that does the work, for the report and its provider.
    regroups: the replacement computes the region's own ops, grouped otherwise; nothing to prove.
    stays: inner nodes that others may go on to use, as the replacement has no need of them.
    carries: nodes of earlier replacements that go on inside this one and stay in the report.
    count: of what the rule replaces, for the report.
    """

    anchor: fx.Node
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    emit: Emit
    op: str
    constants: tuple[fx.Node, ...] = ()
    regroups: bool = False
    stays: tuple[fx.Node, ...] = ()
    carries: tuple[fx.Node, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Rule:
    """One substitution, read by all doors.

    name: as in the report, in `strict` and in the catalogue.
    version: raised when the meaning changes; part of the compile caches' key.
    anchors: op overloads at which a region may start; `propose` is asked at each.
    propose: yields bindings, the largest first, and reasons where the shape is nearly right.
    tier: how the numbers relate to eager's: bitwise, error at most twice eager's own, or as the
        recipe asks.
    compiled: whether the rule runs before a compiler that fuses on its own.
    finish: rearranges a graph after the rule was applied all over it; changes no values.
    """

    name: str
    version: int
    anchors: Sequence[Any]
    propose: Callable[[fx.Node], Iterator[Binding | Reason]]
    tier: Tier = "rounding"
    compiled: bool = True
    finish: Callable[[fx.Graph], None] | None = None
