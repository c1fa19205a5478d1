"""A Dynamo graph to the one IR: pre-dispatch ATen, placeholders and metadata kept.

Higher-order ops (checkpoint, ...) cannot be traced through; they stay, and their bodies become
graphs of the IR on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from fxopt.passes.kernel_scopes import SWITCH


def retrace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The same computation in pre-dispatch ATen.

    Args:
        gm: Dynamo's graph.
        example_inputs: real or fake tensors and sizes, one per placeholder.
    """
    fake_mode = detect_fake_mode(example_inputs)
    assert fake_mode is not None, "Dynamo runs its backends under a fake mode"
    fakes = [_as_fake(fake_mode, v) for v in example_inputs]

    def run(*inputs: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return _Retracer(gm).run(*inputs)

    with fake_mode, mock.patch.object(fake_mode, "allow_non_fake_inputs", True):
        traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    old = gm.graph.find_nodes(op="placeholder")
    for before, after in zip(old, traced.graph.find_nodes(op="placeholder"), strict=True):
        after.meta = {**before.meta, **after.meta}
        after.target = before.target
    traced.meta = {**gm.meta, **traced.meta}
    return traced


def _as_fake(fake_mode: Any, value: Any) -> Any:
    """The FakeTensor that Dynamo made of a real input, with the sizes that it left symbolic."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch._subclasses.FakeTensor):
        return value
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context.get(value) if context is not None else None
    if symbolic is None:
        return fake_mode.from_tensor(value, static_shapes=True)
    # The source is the key under which Dynamo's own symbols are found again.
    source = getattr(symbolic, "tensor_source", None)
    return fake_mode.from_tensor(
        value, static_shapes=False, symbolic_context=symbolic, source=source
    )


class _Retracer(fx.Interpreter):
    """Runs Dynamo's graph under a tracer; a higher-order op becomes one node with its body."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is SWITCH:  # what is inside is marked
            return None
        has_body = any(isinstance(a, fx.GraphModule) for a in args)
        if not isinstance(target, torch._ops.HigherOrderOperator) or not has_body:
            return super().call_function(target, args, kwargs)
        mode = get_proxy_mode()
        assert mode is not None
        with disable_proxy_modes_tracing():
            result = target(*args, **kwargs)
        bodies = [retrace(a, _operands(args)) if isinstance(a, fx.GraphModule) else a for a in args]
        tracer: Any = mode.tracer
        proxied = pytree.tree_map(lambda a: _proxy(tracer, a), tuple(bodies))
        proxy = tracer.create_proxy("call_function", target, proxied, kwargs)
        proxy.node.meta |= {k: v for k, v in fx_traceback.get_current_meta().items() if k != "val"}
        return track_tensor_tree(result, proxy, constant=None, tracer=tracer)


def _operands(args: tuple[Any, ...]) -> list[Any]:
    return [a for a in args if not isinstance(a, fx.GraphModule)]


def _proxy(tracer: Any, value: Any) -> Any:
    if isinstance(value, fx.GraphModule):
        name = f"body_{len(list(tracer.root.children()))}"
        setattr(tracer.root, name, value)
        return tracer.create_proxy("get_attr", name, (), {})
    return tracer.unwrap_proxy(value) if isinstance(value, (torch.Tensor, torch.SymInt)) else value
