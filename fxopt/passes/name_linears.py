"""Products with a parameter, under the name of the linear as which they run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.slice_writes import call

TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def name_linear(graph: fx.Graph, node: ir.Call) -> None:
    """Call x @ W.T a linear, as which it runs, where W or what it is cast from is an input."""
    x, factor = node.args
    swap = _behind_casts(factor)
    if not ir.is_call(swap, *TRANSPOSES) or len(ir.shape(x)) < 2 or len(ir.shape(swap)) != 2:
        return
    weight = swap.args[0]
    before, after = ir.tensor(weight), ir.tensor(swap)
    assert before is not None and after is not None
    swapped = before.shape[::-1], before.stride()[::-1]
    if weight.op != "placeholder" or not all(map(ir.same, swapped, (after.shape, after.stride()))):
        return
    if swap is not factor:
        with graph.inserting_before(node):
            weight = call(graph, factor, aten.transpose.int, factor, 0, 1)
    node.target, node.args = ir.LINEAR, (x, weight)


def name_linear_with_bias(
    graph: fx.Graph, node: ir.Call, modes: Mapping[fx.Node, bool | None]
) -> None:
    """Call addmm(b, x, W) linear(x, W.T, b), as which it runs, where W or what it is cast from is
    an input: GPT-2 stores its weights [in, out]. Views of x as rows and back are the linear's own.
    """
    bias, rows, factor = node.args
    stored = _behind_casts(factor)
    if node.kwargs or stored.op != "placeholder" or ir.tensor(bias) is None:
        return
    if len(ir.shape(bias)) != 1 or not ir.same(ir.shape(bias)[0], ir.shape(factor)[1]):
        return
    with graph.inserting_before(node):
        weight = call(graph, node, aten.transpose.int, factor, 0, 1)
    node.target, node.args = ir.LINEAR, (rows, weight, bias)
    flat = _behind_casts(rows)  # autocast casts the rows
    casts = _casts(rows)
    if not ir.is_call(flat, *RESHAPES) or any(cast.kwargs for cast in casts):
        return
    x: fx.Node = flat.args[0]
    whole = (*ir.shape(x)[:-1], ir.shape(factor)[1])
    is_flat = ir.same(ir.shape(x)[-1:], ir.shape(rows)[-1:]) and _is_contiguous(x)
    same_mode = len({modes[n] for n in (flat, *casts, node, *node.users)}) == 1
    if not (is_flat and same_mode):
        return
    if node.users and all(
        ir.is_call(u, *RESHAPES) and ir.same(ir.shape(u), whole) for u in node.users
    ):
        with graph.inserting_before(node):
            for cast in reversed(casts):
                x = call(graph, cast, cast.target, x, *cast.args[1:])
        node.args = (x, weight, bias)
        node.meta["val"] = next(iter(node.users)).meta["val"]
        for view in list(node.users):
            view.replace_all_uses_with(node)
            graph.erase_node(view)


def _casts(node: fx.Node) -> list[ir.Call]:
    """Those that make `node` of something, the last one first."""
    found = []
    while ir.is_call(node, *ir.CASTS):
        found.append(node)
        node = node.args[0]
    return found


def _behind_casts(node: fx.Node) -> fx.Node:
    casts = _casts(node)
    return casts[-1].args[0] if casts else node


def _is_contiguous(x: fx.Node) -> bool:
    """Whether it is in any call; a linear on other memory adds its bias apart."""
    value = ir.tensor(x)
    assert value is not None
    size = 1
    for length, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not ir.same(stride, size):
            return False
        size = size * length
    return True
