"""Find out what rotation a piece of graph applies, by running it.

The piece maps n (normed heads) and some tables to rotated heads. Every rotary embedding is
`out = n * cos + swap(n) * sin` for the first r channels of a head, where swap exchanges (and
negates) the members of each pair: neighbours (interleaved) or halves. The other channels come out
as they went in, which tells r, and so do tokens, the text of a joint sequence, that have no row of
the tables. Which tensor is cos, which is sin, and how its dims lie is found by trying: there are a
few dozen combinations, each a handful of flops. Tables of 2x2 matrices need not hold rotations: the
op multiplies by any.

Shapes: B batch, S tokens, H heads, d head dim, r rotated channels, w table width (r or r/2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg

from fxopt.kernels import rotary
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
    tables: str  # what they hold, as `fxopt::qk_norm_rope` takes them
    cos: Table
    sin: Table
    rotated: str = "all"  # or the "first" or "last" tokens, as many as the tables have rows

    @property
    def settings(self) -> tuple[str, str, str]:
        """As `fxopt::qk_norm_rope` takes them."""
        return self.kind, self.tables, self.rotated


def find_rotation(
    start: fx.Node, end: fx.Node, num_heads: int, head_dim: int
) -> Rotation | Reason | None:
    """The rotation between `start` and `end`; None if there is only movement of data.

    Tensors of numbers that enter are its tables; others choose or hide, which is no rotation.
    """
    region = between(start, end)
    sides = side_inputs(region, start)
    tables = [s for s in sides if ir.is_floating(s)]
    others = [s for s in sides if s not in tables and ir.tensor(s) is not None]
    if others:
        dtype = others[0].meta["val"].dtype
        return Reason(f"a tensor of {dtype} enters between the norm and attention", others[0])
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
    if not out.numel():
        return Reason("a size is 0 in this call", end)
    num_tokens = out.numel() // (n.shape[0] * num_heads * head_dim)
    layout = (n.shape[0], num_tokens, num_heads, head_dim)
    n_BSHd, out_BSHd = (_to_BSHd(x, layout) for x in (n, out))
    if n_BSHd is None or out_BSHd is None:
        return Reason("heads and tokens cannot be told apart between norm and attention", end)
    rows = _rotated_rows(n_BSHd, out_BSHd)
    if isinstance(rows, str):
        return Reason(rows, end)
    num_rows = rows.stop - rows.start
    rotated = "all" if num_rows == num_tokens else "last" if rows.start else "first"
    if rotated != "all":
        n_BSHd, out_BSHd = n_BSHd[:, rows], out_BSHd[:, rows]
    is_rotated = _is_rotated(n_BSHd, out_BSHd)
    num_channels = int(is_rotated.nonzero().max()) + 1 if is_rotated.any() else 0
    heads = Heads(layout[0], num_rows, num_heads, num_channels, rotated == "all")
    readings = [r for node in tables for r in _readings(node, values[node], heads)]
    for kind in ("interleaved", "half"):
        for c in readings:
            for s in (s for s in readings if s.form == c.form):
                guess = rotary.rotate(n_BSHd, *rotary.signed(c.value, s.value, kind, c.form), kind)
                if guess.shape == out_BSHd.shape and (guess - out_BSHd).abs().max() < TOLERANCE:
                    return Rotation(kind, c.form, c.table, s.table, rotated)
    if not is_rotated[: heads.rotary_dim].all():
        return Reason("the rotated channels are not the first ones of a head", end)
    return Reason("what stands between the norm and attention is no known rotation", end)


def _rotated_rows(n_BSHd: torch.Tensor, out_BSHd: torch.Tensor) -> slice | str:
    """The tokens that come out other than they went in, at one end of the sequence, or why not."""
    num_tokens = n_BSHd.shape[1]
    if n_BSHd.shape != out_BSHd.shape:
        return slice(0, num_tokens)
    changed = (n_BSHd != out_BSHd).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
    if not changed:
        return slice(0, num_tokens)
    rows = slice(changed[0], changed[-1] + 1)
    if len(changed) < rows.stop - rows.start or (rows.start > 0 and rows.stop < num_tokens):
        return "the rotated tokens are neither the first nor the last ones"
    return rows


def _is_rotated(n_BSHd: torch.Tensor, out_BSHd: torch.Tensor) -> torch.Tensor:
    """For each channel of a head whether it comes out other than it went in."""
    if n_BSHd.shape != out_BSHd.shape:
        return torch.ones(n_BSHd.shape[-1], dtype=torch.bool)
    return (n_BSHd != out_BSHd).flatten(0, 2).any(0)


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


class Heads(NamedTuple):
    """Sizes of what is rotated."""

    batch: int
    num_tokens: int
    num_heads: int
    rotary_dim: int
    can_share_rows: bool  # a table of one row is for all tokens


class Reading(NamedTuple):
    """A table as [B, S, H, w], and what it would hold, in the words of `rotary.signed`."""

    table: Table
    value: torch.Tensor
    form: str


def _readings(node: fx.Node, value: torch.Tensor, heads: Heads) -> Iterator[Reading]:
    """All ways to read a table; none if what it would rotate are no pairs."""
    if heads.rotary_dim % 2:
        return
    widths = {"channels": heads.rotary_dim, "pairs": heads.rotary_dim // 2}
    for parts in _parts(value):
        part = Table(node, parts).view(value)
        columns = parts[-1:] == (COLUMN,)
        for form, width in {"matrices": heads.rotary_dim}.items() if columns else widths.items():
            for steps in _layouts(part, width, heads.num_heads):
                table = Table(node, (*parts, *steps))
                view = table.view(value)
                sizes = zip(view.shape[:3], heads[:3], strict=True)
                has_rows = heads.can_share_rows or view.shape[1] == heads.num_tokens
                fits = has_rows and all(size in (1, whole) for size, whole in sizes)
                if view.shape[-1] == width and fits:
                    yield Reading(table, view, form)


COLUMN: Step = (aten.flatten.using_ints, (-2, -1))  # [..., r/2, 2] to [..., r]


def _parts(value: torch.Tensor) -> Iterator[tuple[Step, ...]]:
    """What may be a table by itself: real and imaginary part, halves of a stack, columns."""
    selects = [(aten.select.int, (-1, part)) for part in (0, 1)]
    if value.is_complex():
        yield from (((aten.view_as_real.default, ()), select) for select in selects)
        return
    yield ()
    if value.dim() > 2 and value.shape[-1] == 2:
        yield from ((select,) for select in selects)
        yield (COLUMN,)
        if value.shape[-2] == 2:
            yield from ((select, COLUMN) for select in selects)


def _layouts(value: torch.Tensor, width: int, num_heads: int) -> Iterator[tuple[Step, ...]]:
    """Views that bring a table to four dims."""
    rank = value.dim()
    if 1 <= rank <= 3 and value.shape[-1] == num_heads * width:
        lead = ((aten.unsqueeze.default, (0,)),) * (3 - rank)
        yield (*lead, (aten.unflatten.int, (-1, [num_heads, width])))
    if rank == 2:
        yield ((aten.unsqueeze.default, (0,)), (aten.unsqueeze.default, (2,)))
    elif rank == 3:
        yield ((aten.unsqueeze.default, (2,)),)
        yield ((aten.unsqueeze.default, (0,)),)
    elif rank == 4:
        yield ()
        yield ((aten.permute.default, ([0, 2, 1, 3],)),)
