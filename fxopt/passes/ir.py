"""The one IR: pre-dispatch ATen in a `torch.fx.Graph`, and how rules read it.

Every tensor node carries its FakeTensor in `meta["val"]`, its module path in
`meta["nn_module_stack"]` and its source line in `meta["stack_trace"]`. Bodies of higher-order ops
(checkpoint, no_grad, autocast) are graphs of their own, reached with `graphs(gm)`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from typing_extensions import TypeIs

aten = torch.ops.aten

# Ops that return parts of one dim.
SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.split.sizes,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
    }
)
# Ops that move or reinterpret elements and compute nothing.
VIEWS = SPLITS | frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.unbind.int,
        aten.alias.default,
        aten.view_as.default,
        aten.expand_as.default,
        aten.reshape_as.default,
        aten.movedim.int,
        aten.movedim.intlist,
        operator.getitem,
    }
)
COPIES = frozenset({aten.contiguous.default, aten.clone.default})
CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)
# Key in the `meta` of a graph module: whether its example has a batch of 2 for the call's 1.
IS_DOUBLED = "fxopt_is_doubled"
# Key in the `meta` of a node: whether the body that it stands for is not in the IR.
IS_KEPT = "fxopt_is_kept"
# What `tensor.data` is in a graph: no op.
DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
LINEAR = aten.linear.default
SDPA = aten.scaled_dot_product_attention.default
# Where a region ends: what these produce is in memory already.
MATERIALIZED = frozenset(
    {
        LINEAR,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
        aten.einsum.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv2d.padding,
        aten.embedding.default,
        aten.scaled_dot_product_attention.default,
    }
)


def graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """`gm` and the bodies of the higher-order ops it calls, outermost first."""
    yield gm
    for node in gm.graph.nodes:
        if node.op == "get_attr" and IS_KEPT not in node.meta:
            body = getattr(gm, str(node.target), None)
            if isinstance(body, fx.GraphModule):
                yield from graphs(body)


class Call(fx.Node):
    """A call, as type checkers see it: what its arguments are depends on its op."""

    if TYPE_CHECKING:
        args: Any
        kwargs: Any


def is_call(node: Any, *targets: Any) -> TypeIs[Call]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def tensor(node: Any) -> torch.Tensor | None:
    """The FakeTensor that `node` produces; None if it produces something else."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor; one that the graph's own checks have settled is an integer."""
    val = tensor(node)
    assert val is not None, f"{node} is not a tensor"
    return tuple(int(expression(s)) if _is_settled(s) else s for s in val.shape)


def _is_settled(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.expr.is_number


def dtype(node: fx.Node) -> torch.dtype:
    val = tensor(node)
    assert val is not None, f"{node} is not a tensor"
    return val.dtype


def same(a: Any, b: Any) -> bool:
    """Whether two sizes or shapes are equal by construction or by a guard; adds no guard."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    x, y = expression(a), expression(b)
    if str(x) == str(y):
        return True
    # What is known of plain symbols stands in them: they are one symbol then.
    is_plain = all(isinstance(e, int) or e.is_Atom for e in (x, y))
    return not is_plain and statically_known_true(a == b)


def same_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the same elements of the same memory in the same order."""
    x, y = tensor(a), tensor(b)
    assert x is not None and y is not None
    if x.dtype != y.dtype or not (same(x.shape, y.shape) and same(x.stride(), y.stride())):
        return False
    return shares(a, b) and same(x.storage_offset(), y.storage_offset())


def expression(size: Any) -> Any:
    """The sympy expression behind a size, or the integer itself."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def num_rows(node: fx.Node) -> int:
    """Rows of the last dim, in the call that the graph was captured for; adds no guard."""
    sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in shape(node)[:-1]]
    owner = node.graph.owning_module
    is_doubled = owner is not None and owner.meta.get(IS_DOUBLED, False)
    return math.prod(sizes) // (2 if is_doubled else 1)


def is_floating(node: fx.Node) -> bool:
    val = tensor(node)
    return val is not None and (val.is_floating_point() or val.is_complex())


def mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and schema(node).is_mutable


def written(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call writes in place."""
    if not mutates(node):
        return []
    named = arguments(node)
    targets = [named[a.name] for a in schema(node).arguments if a.is_write]
    return [t for t in pytree.tree_leaves(targets) if isinstance(t, fx.Node)]


def memory(node: fx.Node) -> fx.Node:
    """The node that made the memory that `node` may share: behind views and in-place writes."""
    while True:
        if mutates(node):
            node = written(node)[0]
        elif _may_share(node):
            node = node.all_input_nodes[0]
        else:
            return node


def shares(node: fx.Node, other: fx.Node) -> bool:
    """Whether two examples share memory; of an einsum that transposes, no schema says so."""
    x, y = tensor(node), tensor(other)
    if x is None or y is None:
        return False
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _may_share(node: fx.Node) -> bool:
    """Whether a call may return memory of its first argument: by its schema, if its kind is not
    known."""
    if is_call(node, *CASTS):
        return dtype(node) == dtype(node.args[0])
    if is_call(node, *VIEWS, DATA):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    is_declared = any(r.alias_info is not None for r in schema(node).returns)
    return is_declared or shares(node, node.all_input_nodes[0])


def is_written(node: fx.Node, graph: fx.Graph) -> bool:
    """Whether anything in `graph` writes the memory of `node` in place."""
    return any(memory(t) is memory(node) for n in graph.nodes for t in written(n))


def skip_copies(node: fx.Node) -> fx.Node:
    """The node behind copies that change neither values nor dtype nor shape."""
    while is_call(node, *COPIES):
        node = node.args[0]
    return node


def skip_casts(node: fx.Node) -> fx.Node:
    """The node behind copies and floating-point casts."""
    while is_call(node, *COPIES, *CASTS) and is_floating(node.args[0]):
        node = node.args[0]
    return node


def fqn(node: fx.Node) -> str:
    """Module path of the call that made `node`; "" outside any module."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def source(node: fx.Node) -> str:
    """`file.py:123` of the user's line that made `node`; "" if the capture kept none."""
    lines = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith('File "')
    ]
    # The innermost line outside torch is the one a reader can act on.
    for line in reversed(lines):
        path, _, rest = line[len('File "') :].partition('", line ')
        if "/torch/" not in path and not path.startswith("torch/"):
            return f"{path}:{rest.split(',')[0]}"
    return ""


def schema(node: fx.Node) -> torch.FunctionSchema:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in."""
    declared = schema(node).arguments
    named = {a.name: a.default_value for a in declared if a.has_default_value()}
    named |= {a.name: v for a, v in zip(declared, node.args, strict=False)}
    return named | dict(node.kwargs)


def results(node: fx.Node) -> dict[int, fx.Node]:
    """What is taken of a call that returns several results: by index, in order, its node."""
    taken: dict[Any, fx.Node] = {u.args[1]: u for u in node.users if is_call(u, operator.getitem)}
    return dict(sorted(taken.items()))


def is_barrier(node: fx.Node) -> bool:
    """Whether other nodes may not be moved across: writes, random numbers, changes of mode."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        draws = torch.Tag.nondeterministic_seeded in node.target.tags
        return mutates(node) or (draws and arguments(node).get("dropout_p") != 0)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return not isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat))


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Remove what nothing uses, attention without dropout included; it only could draw numbers."""

    def stays(node: fx.Node) -> bool:
        return is_barrier(node) if is_call(node, SDPA) else node.is_impure()

    graph.eliminate_dead_code(stays)


def segments(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node the number of barriers before it, itself included."""
    found: dict[fx.Node, int] = {}
    count = 0
    for node in graph.nodes:
        count += is_barrier(node)
        found[node] = count
    return found


def toposort(graph: fx.Graph) -> None:
    """Order the nodes so that each follows its inputs, otherwise as they stood.

    Barriers keep their place: nodes are reordered between two of them only.
    """
    placed: set[fx.Node] = set()
    order: list[fx.Node] = []

    def place(node: fx.Node) -> None:
        stack = [node]
        while stack:
            current = stack[-1]
            pending = [i for i in current.all_input_nodes if i not in placed]
            if pending:
                stack += pending[::-1]
                continue
            stack.pop()
            if current not in placed:
                placed.add(current)
                order.append(current)

    for node in list(graph.nodes):
        place(node)
    cursor = graph._root
    for node in order:
        cursor.append(node)
        cursor = node
