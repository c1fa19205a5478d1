"""One block, one example: export, canonicalize, rewrite, and what the result relies on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from fxopt.backends.calls import (
    PLAIN,
    TENSORS,
    Call,
    Leaf,
    is_plain,
    leaves_of,
    size_guards,
    sizes_fit,
    state_sources,
)
from fxopt.backends.exporting import export_forward
from fxopt.backends.failures import giving_up
from fxopt.backends.reads import Reads
from fxopt.backends.unseen import CannotCapture as CannotCapture
from fxopt.backends.weight_reads import keep_origins
from fxopt.hardware import Target
from fxopt.passes import ir
from fxopt.passes.autocast import Autocast, without, write_out
from fxopt.passes.canonicalize import canonicalize
from fxopt.passes.choose_attention import choose_attention
from fxopt.passes.kernel_scopes import keep_on_attentions
from fxopt.passes.meter import Meter
from fxopt.passes.past_dispatcher import past_dispatcher
from fxopt.passes.returned_pieces import free_returned_pieces
from fxopt.passes.rewriter import Outcome, rewrite
from fxopt.passes.rule import Rule

State = dict[str, tuple[Any, ...]]
# Shapes that are remembered, the latest: one that was forgotten is checked again, not captured.
MAX_SHAPES = 256


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
    # Its forward takes another way without grad mode.
    needs_grad_mode: bool
    state: State
    leaves: list[Leaf]
    guards: list[Any]
    outcome: Outcome
    # By which sizes are 1: why it may not run there, or None.
    tried: dict[Hashable, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fit = functools.partial(sizes_fit, self.leaves, self.guards)
        self.sizes_fit = functools.lru_cache(MAX_SHAPES)(fit)

    def accepts(self, call: Call) -> bool:
        """Whether a call is one that the graph was captured for."""
        if call.spec != self.in_spec or call.autocast != self.autocast:
            return False
        if self.needs_grad_mode and not call.grad_mode:
            return False
        if not all(map(Leaf.matches, self.leaves, call.leaves)):
            return False
        return self.sizes_fit(call.shapes)

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` would have given the same graph."""
        return state_of(module) == self.state and self.reads.hold_for(module)


def state_of(module: nn.Module) -> State:
    """Shapes and dtypes of all parameters and buffers by FQN, and which of them are one tensor."""
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    first: dict[int, str] = {}
    return {
        name: (t.shape, t.dtype, type(t) in TENSORS or type(t), first.setdefault(id(t), name))
        for name, t in named
    }


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rules: Sequence[Rule],
    attention: str = "pytorch",
    *,
    planned_for: Target | None = None,
) -> Plan:
    """The first of `captures`.

    attention: of the recipe, as in `choose_attention`.
    planned_for: a device that it will not run on now; the substitutions then say what would run
        them there, and what they save on this call.

    Raises:
        CannotCapture: the inputs or the forward cannot be exported.
    """
    call = Call.of(args, kwargs)
    return next(captures(module, forward, call, rules, attention, planned_for=planned_for))


def captures(
    module: nn.Module,
    forward: Callable[..., Any],
    call: Call,
    rules: Sequence[Rule],
    attention: str = "pytorch",
    earlier: Sequence[Plan] = (),
    planned_for: Target | None = None,
) -> Iterator[Plan]:
    """Export `module` for all sizes of its inputs and apply `rules`, the most general plan first.

    Channels (the last dim of a floating-point input) are taken as fixed, unless one of the
    `earlier` plans had another number. A batch of 1 would be taken for a constant, so it is
    exported as 2 first, if the sizes then still agree with those of the call.

    Raises:
        CannotCapture: the inputs or the forward cannot be exported.
    """
    device = check_inputs(module, call)
    rewriting = rules, attention, device, planned_for
    fixed = [_channels_are_fixed(i, v, call.spec, earlier) for i, v in enumerate(call.leaves)]
    if any(isinstance(v, Tensor) and v.dim() and v.shape[0] == 1 for v in call.leaves):
        with contextlib.suppress(CannotCapture):
            doubled = [_doubled(v) for v in call.leaves]
            plan = _capture(module, forward, call, doubled, fixed, *rewriting)
            if plan.accepts(call):
                yield plan
    yield _capture(module, forward, call, call.leaves, fixed, *rewriting)


def _capture(
    module: nn.Module,
    forward: Callable[..., Any],
    call: Call,
    example: list[Any],
    fixed: list[bool],
    rules: Sequence[Rule],
    attention: str,
    device: torch.device,
    planned_for: Target | None,
) -> Plan:
    program, reads, needs_grad_mode = export_forward(module, forward, call, example, fixed)
    with giving_up(reads):
        gm = program.graph_module
        write_out(gm, call.autocast)
        keep_on_attentions(gm)
        canonicalize(gm)
        slots, learned = _slots(program)
        inputs = gm.graph.find_nodes(op="placeholder")[len(slots) :]
        learned |= {n.name for n, v in zip(inputs, call.leaves, strict=True) if _requires_grad(v)}
        for body in ir.graphs(gm):
            body.meta[ir.IS_DOUBLED] = example is not call.leaves
        meter = None
        if planned_for is not None:
            meter = Meter(gm, module, state_sources(module, slots), *call.arguments(call.leaves))
            device = torch.device("cuda")
        outcome = rewrite(
            gm,
            rules,
            device=device,
            parameters=frozenset(learned),
            meter=meter,
            capability=None if planned_for is None else planned_for.capability,
        )
        free_returned_pieces(gm)
        keep_origins(gm)
        target = None if planned_for is None else planned_for.name
        outcome.attentions = choose_attention(gm, attention, target)
        return Plan(
            run=without(call.autocast, past_dispatcher(gm).forward),
            gm=gm,
            slots=slots,
            in_spec=call.spec,
            out_spec=program.call_spec.out_spec,
            reads=reads,
            autocast=call.autocast,
            needs_grad_mode=needs_grad_mode,
            state=state_of(module),
            leaves=leaves_of(gm, len(slots), call.leaves, outcome.constants),
            guards=size_guards(gm),
            outcome=outcome,
        )


def check_inputs(module: nn.Module, call: Call) -> torch.device:
    """The device of a call that can be captured.

    Raises:
        CannotCapture: it holds what a graph does not know.
    """
    for value in call.leaves:
        if not isinstance(value, (*PLAIN, Tensor)):
            raise CannotCapture(f"an input is a {type(value).__name__}, not a tensor or a number")
    tensors = [v for v in call.leaves if isinstance(v, Tensor)]
    for value in (*tensors, *module.parameters(), *module.buffers()):
        if not is_plain(value):
            name = type(value).__name__
            raise CannotCapture(f"a tensor is a {name}, whose layout a graph would drop")
    if not tensors:
        raise CannotCapture("it is called without a tensor")
    return tensors[0].device


def _doubled(value: Any) -> Any:
    """The input with a batch of 2 for a batch of 1; only its shape is read."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        doubled = value.new_empty((2, *value.shape[1:]))
        return doubled.requires_grad_(value.requires_grad)
    return value


def _channels_are_fixed(
    index: int, value: Any, spec: pytree.TreeSpec, earlier: Sequence[Plan]
) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return False
    shapes = [p.leaves[index].shape for p in earlier if p.in_spec == spec]
    return all(s is None or ir.same(s[-1], value.shape[-1]) for s in shapes if s)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _slots(program: ExportedProgram) -> tuple[list[tuple[str, Any]], set[str]]:
    """The state that the leading placeholders read, and the names of those of parameters."""
    slots: list[tuple[str, Any]] = []
    learned: set[str] = set()
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}
    for spec in program.graph_signature.input_specs:
        if spec.kind in kinds:
            slots.append((kinds[spec.kind], spec.target))
            if spec.kind is InputKind.PARAMETER:
                learned.add(spec.arg.name)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            slots.append(("constant", program.constants[spec.target or ""]))
        elif spec.kind is not InputKind.USER_INPUT:
            raise CannotCapture(f"the export lifted a {spec.kind.name.lower()}")
    for output in program.graph_signature.output_specs:
        if isinstance(output.arg, ConstantArgument) and output.arg.value is not None:
            raise CannotCapture("it returns a value that is no tensor")
    return slots, learned
