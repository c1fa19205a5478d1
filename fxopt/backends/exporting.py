"""`torch.export` of a module's own forward, on one example."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch.export import Dim, ExportedProgram, export
from torch.fx.traceback import preserve_node_meta

from fxopt.backends.calls import Call
from fxopt.backends.failures import described, giving_up
from fxopt.backends.quiet import quiet
from fxopt.backends.reads import HOOKS, Reads, recording, same_attributes
from fxopt.backends.turns import CAPTURING
from fxopt.backends.unseen import CannotCapture, refusing


def export_forward(
    module: nn.Module,
    forward: Callable[..., Any],
    call: Call,
    example: list[Any],
    fixed: list[bool],
) -> tuple[ExportedProgram, Reads, bool]:
    """The program, what it read of the module, and whether it holds in grad mode alone.

    Args:
        example: the call's leaves, or others of their kind.
        fixed: for each whether its last dim is.

    Raises:
        CannotCapture: with what was read until then.
    """
    # In grad mode and with the inputs' own requires_grad: without, regions that a model takes out
    # of its gradient would not be told from the rest.
    with torch.inference_mode(False):
        args, kwargs = call.arguments(list(map(_leaf, example)))
    forward = _spelled_out(forward, kwargs)
    dynamic = _by_name(forward, *call.arguments(list(map(_dims, example, fixed))))
    reads = Reads()
    with giving_up(reads, _of_export):
        with (
            CAPTURING,
            _standing_for(module, forward) as alike,
            quiet(),
            torch.inference_mode(False),
            torch.enable_grad(),
            recording(module, reads),
            preserve_node_meta(),  # the marks of `kernel_scopes`
            # Under symbolic sizes remembering an op takes longer than most take to run again.
            config.patch(fake_tensor_cache_enabled=False),
            refusing(module) as asked,
        ):
            program = export(alike, args, kwargs, dynamic_shapes=dynamic, strict=False)
        if asked.grad_mode and not call.grad_mode:
            raise CannotCapture("its forward asks for the grad mode, which is off")
        if not reads.hold_for(module):
            raise CannotCapture("its forward changes its own attributes: a graph would not")
    return program, reads, asked.grad_mode


def _of_export(error: Exception) -> str:
    """What torch.export raises, or the module's own code in it."""
    return f"torch.export: {described(error)}"


def _leaf(value: Any) -> Any:
    """The input without its history; a copy if it was made in inference mode."""
    if not isinstance(value, Tensor):
        return value
    leaf = value.clone() if value.is_inference() else value.detach()
    return leaf.requires_grad_(value.requires_grad)


def _dims(value: Any, channels_are_fixed: bool) -> Any:
    if not isinstance(value, Tensor):
        return None
    return dict.fromkeys(range(value.dim() - channels_are_fixed), Dim.AUTO)


def _spelled_out(forward: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """`forward` with what goes into its `**kwargs` in the signature, which export relies on."""
    signature = inspect.signature(forward)
    named = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n not in named]
    if not extra or len(named) == len(signature.parameters):
        return forward
    if not set(named) - {"args"}:  # another door's, which runs the module's own in a capture
        return forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    parameters = [*named.values(), *extra]
    # What `inspect.signature` looks for first; typeshed's functions do not have it.
    vars(call)["__signature__"] = signature.replace(parameters=parameters)
    return call


def _by_name(forward: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Dynamic shapes by parameter name of forward, as export wants them."""
    try:
        return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CannotCapture(str(error)) from error


@contextlib.contextmanager
def _standing_for(module: nn.Module, forward: Callable[..., Any]) -> Iterator[nn.Module]:
    """A module of the same submodules and tensors, for the export to call `forward` by.

    It has no hooks, which run around the module's own forward already, and no `__call__` of its
    class, such as one that checkpoints. The module itself goes on for other threads. The export
    leaves copies in the place of lists and dicts that modules hold.
    """
    own = type(module)
    if own.__call__ is not nn.Module.__call__:
        own = type(own.__name__, (own,), {"__call__": nn.Module.__call__})
    alike = object.__new__(own)  # FSDP2 has a `__new__` that makes another
    vars(alike).update(vars(module), **{name: OrderedDict() for name in HOOKS}, forward=forward)
    with same_attributes(module):
        yield alike
