"""Write autocast out: the casts that the dispatcher would insert become nodes of the graph.

Which op casts which argument is not listed here: each op is run once on its FakeTensors under
autocast, and the casts that happen are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.passes import ir
from fxopt.passes.ir import aten


class NotWrittenOut(Exception):
    """An op whose casts under autocast no cast of its arguments gives."""


@dataclass(frozen=True)
class Autocast:
    """The autocast state that a graph runs in."""

    device_type: str
    dtype: torch.dtype | None
    enabled: bool

    @staticmethod
    def current(device_type: str) -> Autocast:
        known = torch.amp.is_autocast_available(device_type)  # "meta" is not
        enabled = known and torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if enabled else None
        return Autocast(device_type, dtype, enabled)


@contextmanager
def suspended(device_type: str) -> Iterator[None]:
    """Run ops in the dtypes that they are given, on this kind of device and on the CPU."""
    with ExitStack() as stack:
        for kind in {device_type, "cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def without(autocast: Autocast, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, a graph that is written out, where the caller's `autocast` is on: its casts are part
    of it, and those of regions without autocast, too."""
    if not autocast.enabled:
        return run

    def call(*inputs: Any) -> Any:
        with suspended(autocast.device_type):
            return run(*inputs)

    return call


def write_out(gm: fx.GraphModule, ambient: Autocast) -> None:
    """Inline autocast regions of `gm` and make every cast explicit, in place.

    It is then to run `without` autocast: what the model has taken out of it stays out.

    Raises:
        NotWrittenOut: see there.
    """
    _write_out(gm, ambient)
    for body in ir.graphs(gm):
        body.graph.eliminate_dead_code()
        body.recompile()


def _write_out(gm: fx.GraphModule, state: Autocast) -> None:
    fake_mode = detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes])
    states = [state]
    entered: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        state = states[-1]
        if node.target is torch.amp.autocast_mode._enter_autocast:
            states.append(_nested(state, *node.args[:3]))
            entered.append(node)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            states.pop()
            gm.graph.erase_node(node)
            gm.graph.erase_node(entered.pop())
        elif is_region(node):
            _inline(gm, node, state)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            _write_out_bodies(gm, node, state)
        elif state.enabled and isinstance(node.target, torch._ops.OpOverload):
            _cast_arguments(gm.graph, node, state, fake_mode)


def _write_out_bodies(gm: fx.GraphModule, node: fx.Node, state: Autocast) -> None:
    """What a checkpoint runs, it runs in the state that it is called in."""
    for body in (n for n in node.all_input_nodes if n.op == "get_attr"):
        module = getattr(gm, str(body.target))
        if ir.IS_KEPT not in body.meta and isinstance(module, fx.GraphModule):
            _write_out(module, state)
        elif isinstance(module, torch.nn.Module) and state.enabled:
            raise NotWrittenOut(f"{node.target} stays as it is, which is under autocast")


def _nested(outer: Autocast, device_type: Any, dtype: Any, enabled: Any) -> Autocast:
    """The state inside a region; one for another device type leaves the outer state as it is."""
    if device_type != outer.device_type:
        return outer
    return Autocast(device_type, dtype or outer.dtype, bool(enabled))


def is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == (
        "wrap_with_autocast"
    )


def _inline(gm: fx.GraphModule, node: fx.Node, outer: Autocast) -> None:
    device_type, dtype, enabled, _cache, body_node, *operands = node.args
    body = getattr(gm, body_node.target)  # type: ignore[union-attr, arg-type]
    _write_out(body, _nested(outer, device_type, dtype, enabled))
    values = dict(
        zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True)
    )
    with gm.graph.inserting_before(node):
        for inner_node in body.graph.nodes:
            if inner_node.op == "get_attr":
                name = f"{body_node.target}_{inner_node.target}"  # type: ignore[union-attr]
                setattr(gm, name, getattr(body, str(inner_node.target)))
                values[inner_node] = gm.graph.get_attr(name)
            elif inner_node.op == "call_function":
                copy = gm.graph.node_copy(inner_node, lambda n: values[n])
                values[inner_node] = copy
            elif inner_node.op == "output":
                results = map_arg(inner_node.args[0], lambda n: values[n])
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


class _RecordCasts(TorchDispatchMode):
    """Notes the dtype to which each of the given tensors is cast."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.watched = {id(t) for t in tensors}
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and id(args[0]) in self.watched:
            self.casts.setdefault(id(args[0]), out.dtype)
        return out


def _run(
    node: fx.Node, state: Autocast, fake_mode: Any, *, enabled: bool
) -> tuple[Any, dict[int, torch.dtype]]:
    """The node's result with and without autocast, and the casts of its arguments."""
    tensors = [v for v in (ir.tensor(n) for n in node.all_input_nodes) if v is not None]
    recorder = _RecordCasts(tensors)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    autocast = torch.autocast(state.device_type, state.dtype, enabled, cache_enabled=False)
    with torch.no_grad(), autocast, enable_python_dispatcher(), fake_mode, recorder:
        return node.target(*args, **kwargs), recorder.casts  # type: ignore[operator]


def _cast_arguments(graph: fx.Graph, node: fx.Node, state: Autocast, fake_mode: Any) -> None:
    if ir.is_call(node, *ir.CASTS, *ir.VIEWS) or ir.tensor(node) is None or fake_mode is None:
        return
    result, casts = _run(node, state, fake_mode, enabled=True)
    if result.dtype != ir.dtype(node):  # otherwise it keeps the value that its views share
        node.meta["val"] = result
    # Only autocast narrows. What an op widens itself shows once its arguments go together.
    _insert_casts(graph, node, {k: d for k, d in casts.items() if d != torch.float32}, fake_mode)
    if torch.float32 in casts.values():
        casts, own = _run(node, state, fake_mode, enabled=True)[1], _own(node, state, fake_mode)[1]
        foreign = {key: dtype for key, dtype in casts.items() if own.get(key) != dtype}
        _insert_casts(graph, node, foreign, fake_mode)
    if _own(node, state, fake_mode)[0] == result.dtype:
        return
    # The casts were made inside a composite op, on views of its arguments.
    for source in node.all_input_nodes:
        if ir.is_floating(source) and ir.dtype(source) != result.dtype:
            _insert_cast(graph, node, source, result.dtype, fake_mode)
    if _own(node, state, fake_mode)[0] != result.dtype:
        raise NotWrittenOut(f"the casts that autocast makes in {node.target} cannot be written out")


def _own(
    node: fx.Node, state: Autocast, fake_mode: Any
) -> tuple[torch.dtype | None, dict[int, torch.dtype]]:
    """The dtype of the node's result and the casts of its arguments without autocast; None and no
    casts for dtypes that do not go together.
    """
    try:
        result, casts = _run(node, state, fake_mode, enabled=False)
    except RuntimeError:
        return None, {}
    return result.dtype, casts


def _insert_casts(
    graph: fx.Graph, node: fx.Node, casts: dict[int, torch.dtype], fake_mode: Any
) -> None:
    """Cast those arguments of `node` whose values `casts` has, by identity."""
    for source in node.all_input_nodes:
        dtype = casts.get(id(source.meta.get("val")))
        if dtype is not None and dtype != ir.dtype(source):
            _insert_cast(graph, node, source, dtype, fake_mode)


def _insert_cast(
    graph: fx.Graph, node: fx.Node, source: fx.Node, dtype: torch.dtype, fake_mode: Any
) -> None:
    with graph.inserting_before(node):
        cast = graph.call_function(aten.to.dtype, (source, dtype))
    cast.meta = {k: v for k, v in node.meta.items() if k != "val"}
    with torch.no_grad(), fake_mode:
        cast.meta["val"] = source.meta["val"].to(dtype)
    node.replace_input_with(source, cast)
