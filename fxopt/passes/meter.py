"""What a graph reads and writes at each stage of its rewriting: the part of each substitution.

The graph is counted again after each one, at the sizes of the call. What an earlier one saved goes
to the one that takes it in, so that the parts add up. A part may be negative: what is computed
again is written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt import fakes, traffic
from fxopt.passes import ir
from fxopt.report import Applied


@dataclass
class Meter:
    """Runs a graph as it stands, forward and backward, on fake tensors of a call's sizes.

    Args:
        gm: the graph; its placeholders are the block's state, then the call's leaves.
        block: owner of the state.
        state: where its tensors are found, holder and name.
        args, kwargs: of the call.
    """

    gm: fx.GraphModule
    block: nn.Module
    state: Sequence[tuple[dict[str, Any], str]]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    glue_bytes: int = 0
    flops: dict[fx.Node, int] = field(default_factory=dict)

    def read(self) -> None:
        """Count anew: the glue, and the FLOPs in the forward of each node of `gm` itself."""
        for body in ir.graphs(self.gm):
            body.recompile()
        run = traffic.ByNode(self.gm)
        with fakes.faked(self.block, self.args, self.kwargs, "meta") as call:
            inputs = [held[name] for held, name in self.state] + pytree.tree_leaves(call)
            self.glue_bytes, self.flops = run.glue_bytes(self.block, inputs), run.flops

    def credit(
        self, applied: Applied, region: Iterable[fx.Node], taken: Iterable[Applied]
    ) -> Applied:
        """`applied` with what it saved since the last reading, and what those it took in saved."""
        flops = [self.flops.get(node) for node in region]
        before = self.glue_bytes
        self.read()
        saved = before - self.glue_bytes + sum(a.bytes_saved or 0 for a in taken)
        known = None if None in flops else sum(f or 0 for f in flops)
        return replace(applied, bytes_saved=saved, flops=known)
