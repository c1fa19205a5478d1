"""Masks that a graph makes of positions alone, read by running them.

Such a mask depends on nothing but sizes, so its values are known before any call. transformers
makes them for sdpa whenever a model is compiled, plain causal ones included; windows are in
Mistral, Gemma and ModernBERT, and ACE-Step adds one to its scores.

Shapes: S queries and as many keys.
"""

from __future__ import annotations

import math
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from fxopt.kernels.attention_call import Window
from fxopt.passes import ir
from fxopt.passes.distances import reach, symbols
from fxopt.passes.prove import Runnable, Sizes

# A score that such a number is added to has no weight beside one that nothing is added to.
ABSORBING = -1e30
# Elements of a mask that is run, in some ten ops of up to eight bytes each: half a gigabyte.
LARGEST = 1 << 26
_windows: dict[str, Window | None] = {}
# What comes into the body of a checkpoint, in the graph that calls it. That graph holds the body.
_outside: WeakKeyDictionary[fx.Node, weakref.ref[fx.Node]] = WeakKeyDictionary()


def link_bodies(gm: fx.GraphModule) -> None:
    """Remember where the inputs of the bodies in `gm` come from: masks are made outside of them."""
    for outer in ir.graphs(gm):
        for call in outer.graph.nodes:
            if not isinstance(call.target, torch._ops.HigherOrderOperator) or not call.args:
                continue
            body, *operands = call.args
            if not isinstance(body, fx.Node) or body.op != "get_attr" or len(body.users) != 1:
                continue
            inner = getattr(outer, str(body.target), None)
            if not isinstance(inner, fx.GraphModule):
                continue
            inputs = inner.graph.find_nodes(op="placeholder")
            if len(inputs) == len(operands):
                pairs = zip(inputs, operands, strict=True)
                _outside.update({i: weakref.ref(o) for i, o in pairs if isinstance(o, fx.Node)})


def window(mask: fx.Node) -> Window | None:
    """What each query sees of the keys around it; None unless the graph alone decides, and says so.

    A symbolic number of tokens stands for three that have to agree: a small one, and two so large
    that no number in the mask's own graph is out of sight.
    """
    while mask in _outside and not ir.is_written(mask, mask.graph):
        outer = _outside[mask]()
        if outer is None:
            return None
        mask = outer
    made = _made_of_sizes(mask)
    if made is None or not ir.same(*_square(mask)):
        return None
    probes = _probes(made, mask)
    read = [(_read(made, mask, sizes), sizes(_square(mask)[1])) for sizes in probes]
    widest = read[-1][0] if read else None
    agree = widest is not None and all(w == _within(widest, num) for w, num in read)
    return widest if agree else None


def _within(window: Window, num_tokens: int) -> Window:
    """The window among so many tokens: what reaches from end to end is all."""
    return Window(*(-1 if n >= num_tokens - 1 else n for n in window))


def _square(mask: fx.Node) -> tuple[Any, Any]:
    """Its queries and keys."""
    *_, s, t = (0, 1, *ir.shape(mask))
    return s, t


def _made_of_sizes(mask: fx.Node) -> list[fx.Node] | None:
    """What `mask` is made by, in order; None if something else than a size comes in."""
    made, stack = set[fx.Node](), [mask]
    while stack:
        node = stack.pop()
        if node in made or (ir.tensor(node) is None and _is_size(node)):
            continue
        tags = getattr(node.target, "tags", ())
        draws = torch.Tag.nondeterministic_seeded in tags
        if node.op != "call_function" or ir.tensor(node) is None or draws:
            return None
        made.add(node)
        stack += node.all_input_nodes
    memories = {ir.memory(node) for node in made}
    writes = (n for n in mask.graph.nodes if n not in made and ir.mutates(n))
    if any(ir.memory(t) in memories for n in writes for t in ir.written(n)):
        return None
    return [node for node in mask.graph.nodes if node in made]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _probes(made: list[fx.Node], mask: fx.Node) -> list[Sizes]:
    """Sizes to run the mask at, most tokens last; none if what they show may not hold at others."""
    nodes, tokens = mask.graph.nodes, ir.expression(ir.shape(mask)[-1])
    probes, given = [Sizes(nodes)], {}
    others = symbols(made) - {tokens}
    if isinstance(tokens, int) and not others:
        return probes
    farthest = reach(made, tokens) if isinstance(tokens, int) or tokens.is_Atom else None
    if farthest is None:
        return []
    if not isinstance(tokens, int):
        given[tokens] = farthest + 64
        probes.append(Sizes(nodes, given))
        given[tokens] += 29
    # A size of something else, as of a table of distances, must not matter.
    given |= {other: probes[0].values[other] + 1 for other in others}
    probes.append(Sizes(nodes, given))
    allowed = all(probes[-1].values[symbol] == size for symbol, size in given.items())
    return probes if allowed else []


def _read(made: list[fx.Node], mask: fx.Node, sizes: Sizes) -> Window | None:
    if not 0 < _num_elements(mask, sizes) <= LARGEST:
        return None
    run = _extract(made, mask, sizes)
    key = run.describe()
    if key not in _windows:
        with torch.device("cpu"):
            try:
                _windows[key] = _band(run()[0])
            except (IndexError, RuntimeError, ValueError):  # sizes that the graph cannot have
                _windows[key] = None
    return _windows[key]


def _num_elements(mask: fx.Node, sizes: Sizes) -> int:
    """Those in memory: samples and heads most often share them."""
    val = ir.tensor(mask)
    assert val is not None
    held = zip(ir.shape(mask), val.stride(), strict=True)
    return math.prod(sizes(size) for size, stride in held if not ir.same(stride, 0))


def _extract(made: list[fx.Node], mask: fx.Node, sizes: Sizes) -> Runnable:
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return copies[value] if value in copies else sizes(value.meta["val"])
        return torch.device("cpu") if isinstance(value, torch.device) else value

    for node in made:
        copies[node] = copy = graph.node_copy(node, lambda n: n)
        copy.args, copy.kwargs = map_aggregate((node.args, node.kwargs), argument)
    graph.output((copies[mask],))
    assert mask.graph.owning_module is not None
    return Runnable(mask.graph.owning_module, graph)


def _band(mask: Tensor) -> Window | None:
    """The window that `mask`, [..., S, S], is; both sides unbounded if it hides nothing."""
    mask = mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride()[:-2])]
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not (seen | (mask <= ABSORBING)).all():
        return None
    first = seen.flatten(0, -3)[0] if seen.dim() > 2 else seen
    if not (seen == first).all():
        return None
    # The first query sees as far ahead as any, and the last as far back.
    behind, ahead = (int(first[i].sum().item()) - 1 for i in (-1, 0))
    band = torch.ones_like(first).tril_(ahead).triu_(-behind)
    if min(behind, ahead) < 0 or not torch.equal(first, band):
        return None
    last = first.shape[-1] - 1
    return Window(*(-1 if n == last else n for n in (behind, ahead)))
