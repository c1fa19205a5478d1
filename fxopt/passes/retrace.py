"""A Dynamo graph to the one IR: pre-dispatch ATen, placeholders and metadata kept.

Higher-order ops (checkpoint, ...) cannot be traced through: they stay as nodes. A body that takes
its operands as they come becomes a graph of the IR on its own; others (custom autograd functions,
branches, what torch.func transforms) stay as Dynamo wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import (
    PreDispatchTorchFunctionMode,
    TorchFunctionMetadataMode,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils import _pytree as pytree

from fxopt.passes import ir
from fxopt.passes.kernel_scopes import SWITCH
from fxopt.passes.outline_transforms import outline_transforms

TRACING = (PreDispatchTorchFunctionMode, TorchFunctionMetadataMode)


class NotRetraced(Exception):
    """The graph would lose what is named."""


def retrace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The same computation in pre-dispatch ATen.

    Args:
        gm: Dynamo's graph.
        example_inputs: real or fake tensors and sizes, one per placeholder.

    Raises:
        NotRetraced: see there.
    """
    fake_mode = detect_fake_mode(example_inputs)
    assert fake_mode is not None, "Dynamo runs its backends under a fake mode"
    fakes = [_as_fake(fake_mode, v) for v in example_inputs]
    retracer = _Retracer(outline_transforms(gm), fake_mode)

    def run(*inputs: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return retracer.run(*inputs)

    allowed = mock.patch.object(fake_mode, "allow_non_fake_inputs", True)
    with fake_mode, allowed, closing(retracer):
        traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    # Not above: a trace notes down the changes of grad mode that are made in one inside of it.
    for name, (body, operands, regions) in retracer.bodies.items():
        with ExitStack() as entered:
            for region in regions:
                entered.enter_context(torch.autocast(*region))
            setattr(traced, name, retrace(body, operands))
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, str(node.target)), FakeTensor):
            users = sorted(str(u.target) for u in node.users)
            raise NotRetraced(f"where the operand of {users} comes from is lost in tracing")
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
    """Runs Dynamo's graph under a tracer; a higher-order op becomes one node with its bodies."""

    def __init__(self, gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.fake_mode = fake_mode
        # By attribute of the graph to be: what is still to be retraced, on what, in which regions.
        self.bodies: dict[str, tuple[fx.GraphModule, list[Any], list[tuple[Any, ...]]]] = {}
        # Regions of autocast, a tracer only notes them down: what follows would have other dtypes.
        self.regions: list[tuple[Any, ...]] = []
        self.entered: list[torch.autocast] = []

    def close(self) -> None:
        """Leave the regions that an error has left open."""
        while self.entered:
            self.entered.pop().__exit__(None, None, None)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A real tensor, as an optimizer has: to be written to in the steps to come, not now."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        mode = get_proxy_mode()
        assert mode is not None
        tracer: Any = mode.tracer
        with disable_proxy_modes_tracing():
            fake = self.fake_mode.from_tensor(value, static_shapes=True)
        setattr(tracer.root, target, value)
        proxy = tracer.create_proxy("get_attr", target, (), {})
        return track_tensor_tree(fake, proxy, constant=None, tracer=tracer)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is SWITCH:  # what is inside is marked
            return None
        if target is _enter_autocast:
            self.regions.append((*args[:3], False))  # a cache would keep casts of fakes
            with _untraced_functions():
                self.entered.append(torch.autocast(*self.regions[-1]).__enter__())
        elif target is _exit_autocast:
            self.regions.pop()
            with _untraced_functions():
                self.entered.pop().__exit__(None, None, None)
        # `.data` is no op, so a tracer would not see it.
        if not isinstance(target, torch._ops.HigherOrderOperator) and target is not ir.DATA:
            return super().call_function(target, args, kwargs)
        if target is triton_kernel_wrapper_mutation:
            raise NotRetraced("a Triton kernel of the model's own writes to its arguments")
        mode = get_proxy_mode()
        assert mode is not None
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        versions = [t._version for t in tensors]
        with disable_proxy_modes_tracing(), _untraced_functions():
            result = target(*args, **kwargs)
        if versions != [t._version for t in tensors]:
            raise NotRetraced(f"{target} writes to its operands in place")
        tracer: Any = mode.tracer
        is_open = _takes_operands(args, kwargs)
        proxied, named = pytree.tree_map(
            lambda a: self.proxy(tracer, a, args[1:] if is_open else None), (args, kwargs)
        )
        proxy = tracer.create_proxy("call_function", target, proxied, named)
        proxy.node.meta |= {k: v for k, v in fx_traceback.get_current_meta().items() if k != "val"}
        return track_tensor_tree(result, proxy, constant=None, tracer=tracer)

    def proxy(self, tracer: Any, value: Any, operands: tuple[Any, ...] | None) -> Any:
        """`value` as an argument of a node; a body that is to be retraced is so on `operands`."""
        if isinstance(value, torch.nn.Module):
            name = f"body_{len(list(tracer.root.children()))}"
            setattr(tracer.root, name, value)
            proxy = tracer.create_proxy("get_attr", name, (), {})
            if operands is not None and isinstance(value, fx.GraphModule):
                self.bodies[name] = (value, list(operands), list(self.regions))
            else:
                proxy.node.meta[ir.IS_KEPT] = True
            return proxy
        is_traced = isinstance(value, (torch.Tensor, torch.SymInt))
        return tracer.unwrap_proxy(value) if is_traced else value


@contextmanager
def _untraced_functions() -> Iterator[None]:
    """A tracer's modes for torch functions are off."""
    with ExitStack() as stack:
        modes = _get_current_function_mode_stack()
        while modes and isinstance(modes.pop(), TRACING):
            stack.enter_context(_pop_mode_temporarily())
        yield


def _takes_operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call runs one body on the rest of its arguments, as checkpoints do."""
    body, *operands = args or (None,)
    if not isinstance(body, fx.GraphModule):
        return False
    is_only = not any(isinstance(v, fx.GraphModule) for v in pytree.tree_leaves((operands, kwargs)))
    is_flat = all(isinstance(o, (torch.Tensor, torch.SymInt, int)) for o in operands)
    return is_only and is_flat and len(body.graph.find_nodes(op="placeholder")) == len(operands)
