"""Find out what rotation a piece of graph applies, by running it.

The piece maps n (normed heads) and some tables to rotated heads. Every rotary embedding is
`out = n * cos + swap(n) * sin`, where swap exchanges (and negates) the members of each pair:
neighbours (interleaved) or halves. Which tensor is cos, which is sin, and how its dims lie is
found by trying: there are a few dozen combinations, each a handful of flops.

Shapes: B batch, S tokens, H heads, d head dim, w table width (d or d/2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.prove import Runnable, Sizes, raised
from fxopt.passes.regions import between, side_inputs
from fxopt.passes.rule import Call, Reason

# float64 against float64: rounding of a dozen products.
TOLERANCE = 1e-9
Step = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True)
class Table:
    """A table node and the views that bring it to [B, S, H, w]."""

    node: fx.Node
    steps: tuple[Step, ...]

    def emit(self, call: Call, node: fx.Node) -> fx.Node:
        for op, args in self.steps:
            node = call(op, node, *args)
        return node

    def view(self, value: torch.Tensor) -> torch.Tensor:
        for op, args in self.steps:
            value = op(value, *args)
        return value


@dataclass(frozen=True)
class Rotation:
    kind: str  # "interleaved" | "half"
    cos: Table
    sin: Table


def find_rotation(
    start: fx.Node, end: fx.Node, num_heads: int, head_dim: int
) -> Rotation | Reason | None:
    """The rotation between `start` and `end`; None if there is only movement of data."""
    region = between(start, end)
    sides = side_inputs(region, start)
    tables = [s for s in sides if ir.is_floating(s)]
    if not tables:
        return None
    if len(tables) > 4:
        return Reason(f"{len(tables)} tensors enter between the norm and attention", end)
    sizes = Sizes([start, *region, *sides])
    run = raised(_extract(start, end, region, tables, sizes))
    generator = torch.Generator().manual_seed(0)

    def sample(node: fx.Node) -> torch.Tensor:
        value = ir.tensor(node)
        assert value is not None
        raised_dtype = torch.complex128 if value.is_complex() else torch.float64
        shape = [sizes(s) for s in value.shape]
        return torch.randn(shape, generator=generator, dtype=raised_dtype)

    n, values = sample(start), {t: sample(t) for t in tables}
    try:
        (out,) = run(n, *values.values())
    except Exception as error:
        return Reason(f"the rotation does not run on a probe: {error}", end)
    num_tokens = out.numel() // (n.shape[0] * num_heads * head_dim)
    layout = (n.shape[0], num_tokens, num_heads, head_dim)
    n_BSHd, out_BSHd = (_to_BSHd(x, layout) for x in (n, out))
    if n_BSHd is None or out_BSHd is None:
        return Reason("heads and tokens cannot be told apart between norm and attention", end)
    views = [(t, v) for node in tables for t, v in _readings(node, values[node], layout)]
    for kind, swap in SWAPS.items():
        swapped = swap(n_BSHd)
        for cos, c in views:
            for sin, s in views:
                guess = n_BSHd * _widen(c, head_dim, kind) + swapped * _widen(s, head_dim, kind)
                if guess.shape == out_BSHd.shape and (guess - out_BSHd).abs().max() < TOLERANCE:
                    return Rotation(kind, cos, sin)
    return Reason(_why_unknown(n_BSHd, out_BSHd, values.values()), end)


def _why_unknown(n_BSHd: torch.Tensor, out_BSHd: torch.Tensor, tables: Iterable[Any]) -> str:
    if any(table.shape[-2:] == (2, 2) for table in tables):
        return "each pair of channels is multiplied by a 2x2 matrix, which need not be a rotation"
    if n_BSHd.shape == out_BSHd.shape:
        head_dim = n_BSHd.shape[-1]
        num_rotated = int((n_BSHd != out_BSHd).flatten(0, 2).any(0).sum())
        if num_rotated < head_dim:
            return f"only {num_rotated} of {head_dim} channels are rotated, the op rotates all"
    return "what stands between the norm and attention is no known rotation"


def _extract(
    start: fx.Node, end: fx.Node, region: list[fx.Node], tables: list[fx.Node], sizes: Sizes
) -> Runnable:
    graph = fx.Graph()
    copies = {n: graph.placeholder(f"input_{i}") for i, n in enumerate([start, *tables])}

    def argument(node: fx.Node) -> Any:
        return copies[node] if node in copies else sizes(node.meta["val"])

    for node in region:
        copy = graph.node_copy(node, lambda n: n)
        copy.args, copy.kwargs = map_arg(node.args, argument), map_arg(node.kwargs, argument)
        copies[node] = copy
    graph.output((copies[end],))
    return Runnable(torch.nn.Module(), graph)


def _to_BSHd(x: torch.Tensor, layout: tuple[int, int, int, int]) -> torch.Tensor | None:
    b, s, h, d = layout
    if x.shape == (b, s, h, d):
        return x
    if x.shape == (b, h, s, d):
        return x.transpose(1, 2)
    return x.view(layout) if x.shape == (b, s, h * d) else None


def _swap_neighbours(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


SWAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "interleaved": _swap_neighbours,
    "half": _swap_halves,
}


def _widen(table: torch.Tensor, head_dim: int, kind: str) -> torch.Tensor:
    if table.shape[-1] == head_dim:
        return table
    return table.repeat_interleave(2, -1) if kind == "interleaved" else table.repeat(1, 1, 1, 2)


def _readings(
    node: fx.Node, value: torch.Tensor, layout: tuple[int, int, int, int]
) -> Iterator[tuple[Table, torch.Tensor]]:
    """All ways to read a table as [B, S, H, w] with w = d or d/2."""
    for steps in _layouts(value, layout):
        table = Table(node, steps)
        view = table.view(value)
        widths = (layout[3], layout[3] // 2)
        if view.dim() == 4 and view.shape[-1] in widths:
            sizes = zip(view.shape[:3], layout[:3], strict=True)
            if all(size in (1, whole) for size, whole in sizes):
                yield table, view


def _layouts(value: torch.Tensor, layout: tuple[int, int, int, int]) -> Iterator[tuple[Step, ...]]:
    starts: list[tuple[Step, ...]] = [()]
    if value.is_complex():
        as_real = (aten.view_as_real.default, ())
        starts = [(as_real, (aten.select.int, (-1, part))) for part in (0, 1)]
    elif value.dim() > 2 and value.shape[-1] <= 2:
        starts = [((aten.select.int, (-1, part)),) for part in range(value.shape[-1])]
    rank = value.dim() - (0 if value.is_complex() or starts == [()] else 1)
    width = layout[2] * layout[3]
    for start in starts:
        if value.shape[-1] in (width, width // 2) and not value.is_complex() and rank <= 3:
            heads = (aten.unflatten.int, (-1, [layout[2], value.shape[-1] // layout[2]]))
            lead = ((aten.unsqueeze.default, (0,)),) * (3 - rank)
            yield (*start, *lead, heads)
        if rank == 2:
            yield (*start, (aten.unsqueeze.default, (0,)), (aten.unsqueeze.default, (2,)))
        elif rank == 3:
            yield (*start, (aten.unsqueeze.default, (2,)))
            yield (*start, (aten.unsqueeze.default, (0,)))
        elif rank == 4:
            yield start
            yield (*start, (aten.permute.default, ([0, 2, 1, 3],)))
