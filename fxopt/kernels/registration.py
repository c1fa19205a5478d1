"""How an fxopt op becomes a PyTorch op: schema, providers, fake, autograd, FLOPs.

Every op has one semantic definition and several providers. The dispatcher picks the provider by
device: `native` (ATen, and loops in C++ for fp32 on a CPU) everywhere, `triton` on CUDA where
Triton is installed. Eager graphs, Dynamo and AOTAutograd all see the same `torch.ops.fxopt.<name>`
overload.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fxopt.kernels import sharding as shardings

LIBRARY = torch.library.Library("fxopt", "DEF")

PROVIDERS: dict[str, tuple[str, ...]] = {}
# Of what wants matrix units, the compute capability that has them.
CAPABILITIES: dict[str, tuple[int, int]] = {}
LAUNCHES: dict[str, Callable[..., int]] = {}
REREADS: dict[str, Callable[[Sequence[Any], Any], Sequence[Any]]] = {}
SECOND_FORMS: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
NATIVE: dict[Callable[..., Any], Callable[..., Any]] = {}
# Each op by its name, as `torch.ops.fxopt` has it: a call here goes past the dispatcher if that
# would only hand its arguments on, to a function in Python.
ops = SimpleNamespace()
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_CONSTANTS = frozenset({type(None), bool, int, float, str, torch.dtype})


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported; the answer does not import it."""
    return importlib.util.find_spec("triton") is not None


def opmath_of(x: torch.Tensor, *dtypes: torch.dtype) -> torch.dtype:
    """In what an op on `x` with results of these dtypes computes: fp32, or fp64 if one is."""
    return torch.float64 if torch.float64 in (x.dtype, *dtypes) else torch.float32


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which costs as much as an op on a small tensor even where it does nothing."""
    return x if x.dtype is dtype else x.to(dtype)


def provider(name: str, device: torch.device, capability: tuple[int, int] | None = None) -> str:
    """What runs `name` on `device`: "triton", "native", a PyTorch "library" kernel, or "emulation"
    of products that it has no units for.

    Args:
        capability: compute capability of a CUDA device that is not there; None to ask it.
    """
    providers, needed = PROVIDERS.get(name, ("library",)), CAPABILITIES.get(name)
    if device.type != "cuda":
        return providers[-1]
    if capability is None and needed is not None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
    return providers[-1 if capability and needed and capability < needed else 0]


def register(
    schema: str,
    *,
    native: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    function: type[torch.autograd.Function] | None = None,
    flops: Callable[..., int] | None = None,
    launches: Callable[..., int] | None = None,
    sharding: shardings.Rule | None = None,
    rereads: Callable[[Sequence[Any], Any], Sequence[Any]] | None = None,
    further: str = "",
    form: str = "counting",
    reference: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Define `fxopt::<schema>` and register its implementations.

    Args:
        schema: ATen schema, `name(Tensor x, ...) -> ...`.
        native: implementation for every device: ATen, or loops of `csrc` where these apply.
        fake: shapes, dtypes and strides of the outputs; runs under FakeTensorMode.
        triton: implementation for CUDA, or None.
        function: autograd Function. Its forward receives the op's arguments as given and calls
            `below_autograd(op, *args)`; None for ops that are not differentiable (backward ops).
        flops: FLOPs from the arguments' shapes; None for ops that do no matrix product.
        launches: kernels that a call with these arguments launches on a GPU; None for always one.
        sharding: how it runs on DTensors; None to refuse them.
        rereads: from arguments and outputs, those that a second of these kernels reads again.
        further: arguments of a second form of the op, `<name>_<form>`, with the same
            implementations, for `call_form`: those that it writes, as compilers want ops that
            write nothing, magnitudes that are known beforehand, and scales of arguments that are
            codes.
        form: what the second form does beside the op.
        reference: the op in plain differentiable ATen, which compilers get in its place; None for
            ops that they get as they are, or never.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.fxopt, name).default
    if launches is not None:
        LAUNCHES[f"fxopt::{name}"] = launches
    if rereads is not None:
        REREADS[f"fxopt::{name}"] = rereads
    if reference is not None:
        REFERENCES[op] = reference
    has_triton = triton is not None and triton_available()
    PROVIDERS[name] = ("triton", "native") if has_triton else ("native",)
    NATIVE[op] = native
    LIBRARY.impl(name, native, "CompositeExplicitAutograd")
    if has_triton:
        LIBRARY.impl(name, triton, "CUDA")
    torch.library.register_fake(f"fxopt::{name}", fake, lib=LIBRARY)
    if function is not None:
        by_grad = _by_grad(op, function)
        LIBRARY.impl(name, lambda _, *args: by_grad(*args), "Autograd", with_keyset=True)
        setattr(ops, name, _past_dispatcher(op, by_grad))
    register_flop_formula(getattr(torch.ops.fxopt, name))(flops or _no_flops)
    if sharding is not None:
        shardings.register(op, sharding)
    if further:
        arguments, returns = schema[len(name) :].rsplit(") -> ", 1)
        SECOND_FORMS[op] = register(
            f"{name}_{form}{arguments}, {further}) -> {returns}",
            native=native,
            fake=fake,
            triton=triton,
            launches=launches,
            rereads=rereads,
        )
    return op


def call_form(op: torch._ops.OpOverload, further: Sequence[Any], *args: Any) -> Any:
    """Call `op` without autograd, or its second form if any of the further arguments is not None;
    the last of these may be left out."""
    if all(argument is None for argument in further):
        return without_autograd(op, *args)
    form = SECOND_FORMS[op]
    absent = [None] * (len(form._schema.arguments) - len(args) - len(further))
    return form(*args, *further, *absent)


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Call `op` without its autograd kernel, or what the dispatcher would call for it."""
    run = direct(op, args) or op
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args)


def without_autograd(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Call `op`, where autograd takes no part, or what the dispatcher would call for it."""
    found = each_directly(op, [args])
    return op(*args) if found is None else found[0]


def each_directly(op: torch._ops.OpOverload, calls: Sequence[Sequence[Any]]) -> list[Any] | None:
    """Results of calls of `op` below autograd, where `direct` has what runs them; else None."""
    run = direct(op, calls)
    if run is None:
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return [run(*call) for call in calls]


def direct(op: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any] | None:
    """The native provider of `op`, if the dispatcher would only hand these arguments on to it."""
    run = NATIVE.get(op)
    return run if run is not None and _are_only_handed_on(args) else None


def _past_dispatcher(op: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, or the function that the dispatcher has for it."""

    def call(*args: Any) -> Any:
        return function(*args) if _are_only_handed_on(args) else op(*args)

    call.__name__ = op._opname
    return call


def _are_only_handed_on(args: Sequence[Any]) -> bool:
    """Whether the dispatcher has nothing to do with these arguments but to convert them, which
    takes it longer than many an op takes.

    Not wherever anything may come between: a mode, a functorch transform, a trace, a profile, a
    subclass of Tensor, another device than the CPU.
    """
    return not (
        torch.compiler.is_compiling()  # first: Dynamo knows nothing of the others
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ) and _are_plain(args)


def _are_plain(args: Sequence[Any]) -> bool:
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if not arg.is_cpu:
                return False
        elif kind not in _CONSTANTS and not (kind in (list, tuple) and _are_plain(arg)):
            return False
    return True


def _by_grad(
    op: torch._ops.OpOverload, function: type[torch.autograd.Function]
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        needs_grad = torch.is_grad_enabled() and _requires_grad(args)
        # Below autograd tangents would be lost; the Function refuses them.
        if needs_grad or forward_ad._current_level >= 0:
            return function.apply(*args)
        return below_autograd(op, *args)

    return run


def _requires_grad(args: Sequence[Any]) -> bool:
    return any(
        a.requires_grad if isinstance(a, torch.Tensor) else _requires_grad(a)
        for a in args
        if isinstance(a, (torch.Tensor, list, tuple))
    )


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0


def register_composite(schema: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define `fxopt::<schema>` as a composition of other ops that brings its own autograd.

    Dispatch modes, fake tensors and AOTAutograd see the ops inside it.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    op = getattr(torch.ops.fxopt, name).default
    setattr(ops, name, _past_dispatcher(op, function))
    return op
