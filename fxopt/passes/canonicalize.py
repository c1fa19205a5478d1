"""Remove what does nothing, so that one computation has fewer spellings.

Only steps that leave every executed kernel and every bit as it was: what is not rewritten later
runs exactly as the user wrote it. Spellings of arithmetic are left to the rules, which compare
what regions compute instead of how they are written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from fxopt.passes import ir
from fxopt.passes.grad_modes import grad_modes
from fxopt.passes.ir import aten
from fxopt.passes.name_linears import name_linear, name_linear_with_bias
from fxopt.passes.returned_pieces import WERE_SLICES, returned_nodes
from fxopt.passes.slice_writes import call, join_write, join_writes

RANDOM = torch.Tag.nondeterministic_seeded


def canonicalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Canonicalize `gm` and every body in it, in place."""
    for graph_module in ir.graphs(gm):
        graph = graph_module.graph
        modes = grad_modes(graph)
        for node in list(graph.nodes):
            _simplify(graph, node, modes)
        for node in list(graph.nodes):
            if node._erased:
                continue
            if ir.is_call(node, aten.empty_like.default, aten.empty.memory_format):
                join_writes(graph, node)
            elif ir.is_call(node, aten.copy_.default):
                join_write(graph, node)
        _read_sizes_off_inputs(graph)
        if not any(ir.mutates(n) for n in graph.nodes):
            modes = grad_modes(graph)
            # Autograd refuses writes to what several views of one call share.
            for node in list(graph.nodes):
                _join_slices(graph, node, modes)
            _read_sizes_off_inputs(graph)  # of the splits
            _share_common_subexpressions(graph)
        graph.eliminate_dead_code()
        graph_module.recompile()
    return gm


def _simplify(graph: fx.Graph, node: fx.Node, modes: Mapping[fx.Node, bool | None]) -> None:
    if node.op != "call_function":
        return
    node.target = SYNONYMS.get(node.target, node.target)
    if node.target is aten.mT.default:
        node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)
    if node.target is aten.rms_norm.default and len(node.args) < 4:
        _bind_machine_epsilon(node)
    if node.target in (aten.type_as.default, aten.to.other):
        _read_dtype_off(node)
    if ir.is_call(node, aten.matmul.default, aten.mm.default):
        name_linear(graph, node)
    elif ir.is_call(node, aten.addmm.default):
        name_linear_with_bias(graph, node, modes)
    if node.target in METADATA_CHECKS:
        graph.erase_node(node)
    elif node.target in IDENTITIES:
        source = IDENTITIES[node.target](node)
        # Without gradients a view has none, whatever it is of; a cast that does nothing keeps it.
        is_view = node.target in ir.VIEWS
        if source is not None and (not is_view or modes[source] == modes[node]):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


# Facts that the callers check on their real inputs, once per call and not once per op.
METADATA_CHECKS = (aten._assert_tensor_metadata.default,)

# Two names of one op. A reshape is a view where one exists; later calls may have other strides.
SYNONYMS: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.absolute.default: aten.abs.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.divide.Tensor: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.special_erf.default: aten.erf.default,
    aten.special_expit.default: aten.sigmoid.default,
    aten.special_softmax.default: aten.softmax.int,
    aten.linalg_matmul.default: aten.matmul.default,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.true_divide.Tensor: aten.div.Tensor,
}


def _source(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and ir.tensor(source) is not None else None


def _dropped_nothing(node: fx.Node) -> fx.Node | None:
    a = ir.arguments(node)
    return _source(node) if a["p"] == 0 or not a["train"] else None


def _cast_nothing(node: fx.Node) -> fx.Node | None:
    before, after, a = _source(node), ir.tensor(node), ir.arguments(node)
    if before is None or after is None or a.get("copy") or a.get("memory_format") is not None:
        return None
    value = ir.tensor(before)
    assert value is not None
    unchanged = value.dtype == after.dtype and value.device == after.device
    return before if unchanged else None


def _moved_nothing(node: fx.Node) -> fx.Node | None:
    """What `node` is a view of all of, in the same order: behind views that undo one another."""
    source = _source(node) if ir.tensor(node) is not None else None
    if ir.is_call(node, aten.slice.Tensor) and ir.same(ir.shape(node), ir.shape(node.args[0])):
        return source  # as a dropout that was removed had memory of its own
    while source is not None:
        if ir.same_memory(source, node):
            return source
        source = _source(source) if ir.is_call(source, *ir.VIEWS) else None
    return None


IDENTITIES: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
    aten.dropout.default: _dropped_nothing,
    aten.feature_dropout.default: _dropped_nothing,
    aten.to.dtype: _cast_nothing,
    aten.to.dtype_layout: _cast_nothing,
    aten.to.device: _cast_nothing,
    aten.to.other: _cast_nothing,
    aten.type_as.default: _cast_nothing,
    **dict.fromkeys(ir.VIEWS - {operator.getitem}, _moved_nothing),
}


def _read_sizes_off_inputs(graph: fx.Graph) -> None:
    """A size is read off a placeholder that has it, not off a tensor that may go away."""
    known: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(ir.shape(node) if ir.tensor(node) is not None else ()):
            known.setdefault(ir.expression(size), (node, dim))
    for target in (aten.sym_size.int, operator.sub):
        for node in graph.find_nodes(op="call_function", target=target):
            size = ir.expression(node.meta["val"])
            if isinstance(size, (int, sympy.Integer)):
                _replace_by_constant(node, int(size))
            elif size in known:
                node.target, node.args = aten.sym_size.int, known[size]


def _replace_by_constant(node: fx.Node, value: int) -> None:
    def replaced(n: fx.Node) -> Any:
        return value if n is node else n

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, replaced), map_arg(user.kwargs, replaced)


def _join_slices(graph: fx.Graph, node: fx.Node, modes: Mapping[fx.Node, bool | None]) -> None:
    """x[:n] and x[n:] are a split: the same views, and one kernel for their gradient, not three."""
    slices = [u for u in node.users if ir.is_call(u, aten.slice.Tensor)]
    if len(slices) != 2 or ir.tensor(node) is None or len({modes[s] for s in slices}) != 1:
        return
    named = [ir.arguments(s) for s in slices]
    if any(a["step"] != 1 for a in named) or named[0]["dim"] != named[1]["dim"]:
        return
    order = sorted((0, 1), key=lambda i: named[i]["start"] not in (None, 0))
    (first, a), (second, b) = ((slices[i], named[i]) for i in order)
    starts, stops = (a["start"] in (None, 0), b["end"]), (a["end"], b["start"])
    to_the_end = starts[1] is None or starts[1] == 2**63 - 1
    same_cut = stops[0] is stops[1] or (isinstance(stops[0], int) and stops[0] == stops[1])
    is_size = isinstance(stops[0], fx.Node) or (isinstance(stops[0], int) and stops[0] > 0)
    if not (starts[0] and to_the_end and same_cut and is_size):
        return
    dim = a["dim"]
    before = min(slices)
    cut = stops[0].meta["val"] if isinstance(stops[0], fx.Node) else stops[0]
    if not ir.same(ir.shape(first)[dim], cut):
        return  # the cut lies behind the end
    with graph.inserting_before(before):
        if isinstance(stops[0], fx.Node) and stops[0] > before:
            return
        rest: Any = ir.shape(second)[dim]
        if not isinstance(rest, int):
            rest = call(graph, before, aten.sym_size.int, node, dim)
            rest = call(graph, before, operator.sub, rest, stops[0])
        split = call(graph, before, aten.split_with_sizes.default, node, [stops[0], rest], dim)
        split.meta[WERE_SLICES] = True
        for i, old in enumerate((first, second)):
            part = call(graph, old, operator.getitem, split, i)
            old.replace_all_uses_with(part)
    for old in slices:
        graph.erase_node(old)


def _read_dtype_off(node: fx.Node) -> None:
    """A cast to the dtype of another tensor depends on its dtype alone."""
    source, other = ir.tensor(node.args[0]), ir.tensor(node.args[1])
    if source is None or other is None or source.device != other.device:
        return
    rest = {k: v for k, v in node.kwargs.items() if k in ("non_blocking", "copy")}
    if not any(rest.values()) and node.kwargs.keys() == rest.keys() and len(node.args) == 2:
        node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], other.dtype), {}


def _bind_machine_epsilon(node: fx.Node) -> None:
    """`rms_norm(eps=None)` is the machine epsilon of what it computes in, never a constant."""
    a = ir.arguments(node)
    if a["eps"] is None:
        x = ir.dtype(node.args[0])  # type: ignore[arg-type]
        eps = machine_epsilon(x)
        node.args = (a["input"], a["normalized_shape"], a["weight"], eps)
        node.kwargs = {}


def machine_epsilon(dtype: torch.dtype) -> float:
    """The epsilon that `F.rms_norm(x, eps=None)` uses, read off its output."""
    if dtype == torch.float64:
        return torch.finfo(dtype).eps
    # x^2 = eps(fp32): normed to 1/sqrt(2) if fp32's epsilon is added, to almost 0 if dtype's is.
    x = torch.full((1, 8), torch.finfo(torch.float32).eps ** 0.5, dtype=dtype)
    is_fp32 = torch.nn.functional.rms_norm(x, (8,))[0, 0].item() > 0.3
    return torch.finfo(torch.float32 if is_fp32 else dtype).eps


def _share_common_subexpressions(graph: fx.Graph) -> None:
    seen: dict[Hashable, fx.Node] = {}
    returned, modes = returned_nodes(graph), grad_modes(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_pure(node):
            continue
        key = _key((modes[node], node.target, node.args, sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        # Who gets two tensors may write to one of them.
        if first is not node and not {first, node} <= returned:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    tags = getattr(node.target, "tags", None)
    return isinstance(node.target, torch._ops.OpOverload) and RANDOM not in (tags or ())


def _key(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_key(v) for v in value))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    # 1 == 1.0 == True hash alike and mean different ops.
    return (type(value).__name__, value)
