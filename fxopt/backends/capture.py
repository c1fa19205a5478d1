"""One block, one example: export, canonicalize, rewrite, and what the result relies on."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from fxopt.backends.reads import Reads, recording
from fxopt.passes import ir
from fxopt.passes.autocast import Autocast, write_out
from fxopt.passes.canonicalize import canonicalize
from fxopt.passes.rewriter import Outcome, rewrite
from fxopt.passes.rule import Rule

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class CannotCapture(Exception):
    """The block stays as it is; the message says why, for the report."""


@dataclass
class Plan:
    """A rewritten graph and everything it was specialized to.

    slots: for each leading placeholder, the state it reads: ("parameter" | "buffer", fqn), or a
        constant tensor that the capture lifted.
    """

    run: Callable[..., Any]
    gm: fx.GraphModule
    slots: list[tuple[str, Any]]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    reads: Reads
    autocast: Autocast
    state: dict[str, tuple[torch.Size, torch.dtype]]
    leaves: list[_Leaf]
    guards: list[Any]
    outcome: Outcome
    _shapes: dict[Any, bool] = field(default_factory=dict)

    def accepts(self, leaves: Sequence[Any], spec: pytree.TreeSpec, autocast: Autocast) -> bool:
        """Whether a call with these inputs is one that the graph was captured for."""
        if spec != self.in_spec or autocast != self.autocast:
            return False
        if not all(leaf.matches(value) for leaf, value in zip(self.leaves, leaves, strict=True)):
            return False
        shapes = tuple(v.shape for v in leaves if isinstance(v, Tensor))
        if shapes not in self._shapes:
            self._shapes[shapes] = self._sizes_hold(shapes)
        return self._shapes[shapes]

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` would have given the same graph."""
        return state_of(module) == self.state and self.reads.hold_for(module)

    def _sizes_hold(self, shapes: Sequence[torch.Size]) -> bool:
        values: dict[Any, int] = {}
        pairs = [
            (ir.expression(expected), actual)
            for leaf, shape in zip(
                (x for x in self.leaves if x.shape is not None), shapes, strict=True
            )
            for expected, actual in zip(leaf.shape or (), shape, strict=True)
        ]
        for expected, actual in pairs:
            if isinstance(expected, sympy.Symbol):
                if values.setdefault(expected, actual) != actual or actual == 0:
                    return False
        return all(
            sympy.sympify(e).subs(values) == a for e, a in pairs if not isinstance(e, sympy.Symbol)
        ) and all(g.subs(values) == sympy.true for g in self.guards)


@dataclass(frozen=True)
class _Leaf:
    """What one input of a call must look like."""

    value: Any
    shape: tuple[Any, ...] | None
    dtype: torch.dtype | None
    device: torch.device | None
    trainable: bool

    def matches(self, value: Any) -> bool:
        if self.shape is None:
            return type(value) is type(self.value) and bool(value == self.value)
        return (
            isinstance(value, Tensor)
            and value.dtype == self.dtype
            and value.device == self.device
            and value.dim() == len(self.shape)
            and (self.trainable or not value.requires_grad)
        )


def state_of(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of all parameters and buffers by FQN."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: (t.shape, t.dtype) for name, t in named}


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rules: Sequence[Rule],
    earlier: Sequence[Plan] = (),
) -> Plan:
    """Export `module` for all sizes of its inputs and apply `rules`.

    Channels (the last dim of a floating-point input) are taken as fixed, unless one of the
    `earlier` plans had another number. A batch of 1 would be taken for a constant, so it is exported as 2, if the sizes then still
    agree with those of the call.

    Raises:
        CannotCapture: the inputs or the forward cannot be exported.
    """
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    fixed = [_channels_are_fixed(i, v, in_spec, earlier) for i, v in enumerate(leaves)]
    has_single = any(isinstance(v, Tensor) and v.dim() and v.shape[0] == 1 for v in leaves)
    if has_single:
        try:
            doubled = [_doubled(v) for v in leaves]
            plan = _capture(module, forward, leaves, in_spec, doubled, fixed, rules)
        except CannotCapture:
            plan = None
        if plan is not None and plan.accepts(leaves, in_spec, plan.autocast):
            return plan
    return _capture(module, forward, leaves, in_spec, leaves, fixed, rules)


def _capture(
    module: nn.Module,
    forward: Callable[..., Any],
    leaves: list[Any],
    in_spec: pytree.TreeSpec,
    example: list[Any],
    fixed: list[bool],
    rules: Sequence[Rule],
) -> Plan:
    device = _check_inputs(module, leaves)
    autocast = Autocast.current(device.type)
    example = [v.detach() if isinstance(v, Tensor) else v for v in example]
    example_args, example_kwargs = pytree.tree_unflatten(example, in_spec)
    dims = [_dims(v, f) for v, f in zip(example, fixed, strict=True)]
    dynamic = pytree.tree_unflatten(dims, in_spec)
    with recording(module) as reads, _quiet(), _original(module, forward), torch.no_grad():
        try:
            program = export(
                module,
                example_args,
                example_kwargs,
                dynamic_shapes=_by_name(module, forward, dynamic),
                strict=False,
            )
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise CannotCapture(f"torch.export: {type(error).__name__}: {first}") from error
    gm = program.graph_module
    write_out(gm, autocast)
    canonicalize(gm)
    slots, learned = _slots(program)
    outcome = rewrite(gm, rules, device=device, parameters=learned)
    return Plan(
        run=_without(autocast, gm.forward),
        gm=gm,
        slots=slots,
        in_spec=in_spec,
        out_spec=program.call_spec.out_spec,
        reads=reads,
        autocast=autocast,
        state=state_of(module),
        leaves=_leaves(gm, len(slots), leaves, outcome.constants),
        guards=_size_guards(gm),
        outcome=outcome,
    )


def _without(autocast: Autocast, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` as it was captured: its casts are part of it, those of regions without autocast too."""
    if not autocast.enabled:
        return run

    def call(*inputs: Any) -> Any:
        with torch.autocast(autocast.device_type, enabled=False):
            return run(*inputs)

    return call


def _check_inputs(module: nn.Module, leaves: Sequence[Any]) -> torch.device:
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    for value in leaves:
        if not isinstance(value, (*PLAIN, Tensor)):
            raise CannotCapture(f"an input is a {type(value).__name__}, not a tensor or a number")
    for value in (*tensors, *module.parameters()):
        kind = type(value)
        if kind not in (Tensor, nn.Parameter, nn.Buffer) and not _is_fake(value):
            raise CannotCapture(f"a tensor is a {kind.__name__}, whose layout a graph would drop")
    if not tensors:
        raise CannotCapture("it is called without a tensor")
    return tensors[0].device


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _doubled(value: Any) -> Any:
    """The input with a batch of 2 for a batch of 1; only its shape is read."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        return value.new_empty((2, *value.shape[1:]))
    return value


def _channels_are_fixed(
    index: int, value: Any, spec: pytree.TreeSpec, earlier: Sequence[Plan]
) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return False
    if value.shape[-1] == value.shape[-2]:
        return False  # a mask over pairs of tokens
    shapes = [p.leaves[index].shape for p in earlier if p.in_spec == spec]
    return all(s is None or ir.same(s[-1], value.shape[-1]) for s in shapes if s)


def _dims(value: Any, channels_are_fixed: bool) -> Any:
    if not isinstance(value, Tensor):
        return None
    num_dims = value.dim() - channels_are_fixed
    return dict.fromkeys(range(num_dims), Dim.AUTO)


def _by_name(module: nn.Module, forward: Callable[..., Any], dynamic: Any) -> Any:
    """Dynamic shapes by parameter name of forward, as export wants them."""
    bound = inspect.signature(forward).bind(*dynamic[0], **dynamic[1])
    return dict(bound.arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporting reports on itself; what matters goes to the report."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _original(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Show the export the module's own forward."""
    installed = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if installed is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = installed


def _slots(program: Any) -> tuple[list[tuple[str, Any]], frozenset[str]]:
    slots: list[tuple[str, Any]] = []
    learned = set()
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}
    for spec in program.graph_signature.input_specs:
        if spec.kind in kinds:
            slots.append((kinds[spec.kind], spec.target))
            if spec.kind is InputKind.PARAMETER:
                learned.add(spec.arg.name)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            slots.append(("constant", program.constants[spec.target]))
        elif spec.kind is not InputKind.USER_INPUT:
            raise CannotCapture(f"the export lifted a {spec.kind.name.lower()}")
    for output in program.graph_signature.output_specs:
        if isinstance(output.arg, ConstantArgument) and output.arg.value is not None:
            raise CannotCapture("it returns a value that is no tensor")
    return slots, frozenset(learned)


def _leaves(
    gm: fx.GraphModule, num_slots: int, leaves: Sequence[Any], constants: set[str]
) -> list[_Leaf]:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"][num_slots:]
    found = []
    for node, value in zip(placeholders, leaves, strict=True):
        if not isinstance(value, Tensor):
            found.append(_Leaf(value, None, None, None, True))
            continue
        trainable = str(node.target) not in constants
        found.append(_Leaf(None, ir.shape(node), value.dtype, value.device, trainable))
    return found


def _size_guards(gm: fx.GraphModule) -> list[Any]:
    """Conditions on sizes that the capture relied on, but for "not 0 or 1".

    A graph captured at 2 computes the same at 1: sizes only enter views, and the first call of
    every plan is checked against the module's own result.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    shapes = [ir.shape(n) for n in placeholders if ir.tensor(n) is not None]
    sizes = [s for shape in shapes for s in shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return []
    shape_env = sizes[0].node.shape_env
    assert shape_env is not None
    known = set().union(*(ir.expression(s).free_symbols for s in sizes))
    # Sizes found to be equal share one symbol from then on. Symbols that no shape holds are
    # strides: they decide whether a reshape copies, which the graph leaves open.
    guards = [shape_env.replace(g.expr) for g in shape_env.guards]
    guards = [g for g in guards if g != sympy.true and g.free_symbols <= known]
    return [g for g in guards if not _excludes_small(g)]


def _excludes_small(guard: Any) -> bool:
    """Whether a condition says no more than that one size is not 0 or 1."""
    if len(guard.free_symbols) != 1:
        return False
    (symbol,) = guard.free_symbols
    sizes = (*range(2, 18), 1000, 4097, 10**6, 2**40)
    return all(guard.subs(symbol, value) == sympy.true for value in sizes)
