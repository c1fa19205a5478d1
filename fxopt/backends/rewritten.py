"""A block's forward as `optimize` installs it: run the graph that fits the call, or capture one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.backends import checkpoints, left_behind, replicas, trial
from fxopt.backends.calls import Call, is_traced, is_transformed, state_sources
from fxopt.backends.capture import MAX_SHAPES, Plan, State, captures, check_inputs, state_of
from fxopt.backends.collectives import ALONE, Collectives
from fxopt.backends.host_random import same_generators
from fxopt.backends.reads import Reads, Watch, has_global_hooks, hooks
from fxopt.backends.turns import Turns
from fxopt.backends.unseen import CannotCapture
from fxopt.backends.weight_reads import Read, merged, parameters_read, quantized
from fxopt.errors import StillRewritten
from fxopt.kernels.gathered import require_whole
from fxopt.kernels.saving import saving
from fxopt.passes.rule import Rule
from fxopt.report import Applied, Attention, Declined

# More captures of one block class than this mean that its inputs change in kind at every call.
MAX_CAPTURES = 8
HOOKED = "a submodule has hooks, which a graph would not call"
CHANGING = "its inputs change in kind, or in a number, which a graph holds: pass it as a tensor"
EMPTY = "a call without elements runs its own forward"
NOT_CALLED = (
    "not called yet, or by torch.compile and torch.func alone, which see its own forward: a block "
    'is captured at its first call in eager execution; for a compiler there is backend="fxopt"'
)


@dataclass(eq=False)
class Refusal:
    """A kind of call that could not be captured, and for which modules."""

    kind: Hashable
    reason: str
    reads: Reads
    state: State

    def fits(self, module: nn.Module) -> bool:
        return state_of(module) == self.state and self.reads.hold_for(module)


@dataclass
class Captures:
    """What the blocks of one class share; `saved` is that of the recipe. Where their forward runs
    `collectives`, one graph is tried, at a call that all processes make."""

    rules: Sequence[Rule]
    attention: str = "pytorch"
    saved: str = "model"
    plans: list[Plan] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    collectives: Collectives = field(default_factory=Collectives)

    def __deepcopy__(self, memo: dict[int, Any]) -> Captures:
        return self


class Bound:
    """A plan with one module's parameters, read where they are at the time of the call."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.plan, self.watch = plan, Watch(module, plan.reads)
        # Sizes that were tried, or are like those that were; the latest last. Calls only look here,
        # as blocks are called from several threads.
        self.admitted: dict[tuple[torch.Size, ...], None] = {}
        self.sources = state_sources(module, plan.slots)

    def takes(self, call: Call) -> bool:
        known = call.shapes in self.admitted
        return known and self.plan.accepts(call) and self.watch.unchanged()

    def admit(self, call: Call) -> None:
        """Under the lock of captures."""
        self.admitted[call.shapes] = None
        if len(self.admitted) > MAX_SHAPES:
            del self.admitted[next(iter(self.admitted))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(pytree.tree_leaves((args, kwargs)))

    def run(self, leaves: Sequence[Any]) -> Any:
        out = self.plan.run(*[held[name] for held, name in self.sources], *leaves)
        return pytree.tree_unflatten(out, self.plan.out_spec)


class RewrittenForward:
    """Stands in for a block's forward."""

    def __init__(self, fqn: str, module: nn.Module, captures: Captures) -> None:
        self.fqn, self.module, self.captures = fqn, module, captures
        self.installed: Any = module.__dict__.get("forward")
        self._take(module.forward)
        self.device: torch.device | None = None
        self.is_withdrawn = False
        self._forget()

    def _take(self, own: Callable[..., Any]) -> None:
        """The forward to stand in for, and what it runs within its checkpoint, if it makes one."""
        self.own, self.original = own, checkpoints.within(own)

    def _forget(self) -> None:
        self.turns = Turns()
        self.bounds: list[Bound] = []
        self.refused: dict[Hashable, Watch] = {}
        self.reasons: dict[str, None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenForward:
        twin = RewrittenForward.__new__(RewrittenForward)
        memo[id(self)] = twin
        twin.__dict__ |= self.__dict__
        twin.module = copy.deepcopy(self.module, memo)
        twin.installed = copy.deepcopy(self.installed, memo)
        function = getattr(self.own, "__func__", None)
        twin._take(function.__get__(twin.module) if function else twin.installed)
        twin._forget()
        return twin

    def __reduce__(self) -> Any:
        raise StillRewritten(self.fqn)

    def replicated(self) -> None:
        self.reasons[replicas.REPLICATED] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_withdrawn or is_traced() or is_transformed():
            require_whole(self.module.parameters(), f"{self.fqn} runs its own forward")
            return self.own(*args, **kwargs)
        return checkpoints.call(self.own, self.within_checkpoint, args, kwargs)

    def within_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Run the call by a graph, or else as it was."""
        call = Call.of(args, kwargs)
        with self.turns.beside():
            is_known, bound = self._known(call)
            if is_known:
                return self._run(bound, call, args, kwargs)
        found = self._bind(call)
        with self.turns.beside():
            out = self._run(found if isinstance(found, Bound) else None, call, args, kwargs)
        if isinstance(found, Refusal):  # not if the call itself is at fault, and has just failed
            self._refuse(found)
        return out

    def _known(self, call: Call) -> tuple[bool, Bound | None]:
        """Whether it is settled who runs this call, and the graph that does, if any."""
        bound = next((b for b in self.bounds if b.takes(call)), None)
        if bound is not None:
            return True, bound
        watch = self.refused.get(call.kind())
        if watch is not None and watch.unchanged():
            return True, None
        is_hooked = any(hooks(self.module)) or has_global_hooks()
        if is_hooked or call.is_empty():  # neither is worth a graph, nor one that serves others
            self.reasons[HOOKED if is_hooked else EMPTY] = None
            return True, None
        return False, None

    def _run(
        self, bound: Bound | None, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if bound is not None:
            if not bound.watch.hooked():
                with saving(self.captures.saved):
                    return bound.run(call.leaves)
            self.reasons[HOOKED] = None
        require_whole(self.module.parameters(), f"{self.fqn} runs its own forward")
        return self.original(*args, **kwargs)

    def _bind(self, call: Call) -> Bound | Refusal | None:
        """A graph for this call: one that another thread or block has captured, or a new one."""
        with self.turns.alone() as is_alone, trial.aside(), same_generators(self.module):
            if not is_alone:
                return None
            is_known, bound = self._known(call)
            return bound if is_known else self._shared(call) or self._capture(call)

    def _shared(self, call: Call) -> Bound | Refusal | None:
        for plan in self.captures.plans:
            if plan.accepts(call) and plan.fits(self.module):
                bound = Bound(self.module, plan)
                if self._agrees(bound, call) is None:
                    return self._keep(bound, call)
        fitting = (r for r in self.captures.refusals if r.kind == call.kind())
        return next((r for r in fitting if r.fits(self.module)), None)

    def _capture(self, call: Call) -> Bound | Refusal | None:
        known = self.captures
        if known.collectives.were_run:  # no refusal: other sizes of the call's kind have a graph
            self.reasons[ALONE] = None
            return None
        reason, reads = f"captured {MAX_CAPTURES} times already: {CHANGING}", Reads()
        if max(len(known.plans), len(known.refusals)) < MAX_CAPTURES:
            try:
                check_inputs(self.module, call)
                left_behind.require_nothing(self.module, self.original, call)
                asked = known.rules, known.attention, known.plans
                for plan in captures(self.module, self.original, call, *asked):
                    bound = Bound(self.module, plan)
                    reads, why_not = plan.reads, self._agrees(bound, call)
                    if why_not is None:
                        known.plans.append(plan)
                        return self._keep(bound, call)
                    reason = why_not
                    if known.collectives.were_run:
                        break
            except CannotCapture as error:
                reason, reads = str(error), error.reads
        return Refusal(call.kind(), reason, reads, state_of(self.module))

    def _agrees(self, bound: Bound, call: Call) -> str | None:
        """Why a plan may not run where these sizes are 1, or None; tried once."""
        plan, singles, collectives = bound.plan, call.singles(), self.captures.collectives
        if singles not in plan.tried:
            if collectives.were_run:
                return ALONE
            trainable = [leaf.trainable for leaf in plan.leaves]
            plan.tried[singles] = trial.compare(
                self.module, self.original, bound, call, trainable, collectives
            )
        return plan.tried[singles]

    def _keep(self, bound: Bound, call: Call) -> Bound:
        for name, reads in parameters_read(bound.plan.gm, bound.plan.slots).items():
            if isinstance(read := merged(reads), str):
                # What functional_call puts there is no `nn.Parameter`.
                require_whole([attrgetter(name)(self.module)], f"in {self.fqn} {read}")
        self.device = call.device
        earlier = next((b for b in self.bounds if b.plan is bound.plan), None)
        if earlier is not None and earlier.watch.unchanged():
            bound = earlier
        else:
            self.bounds = [b for b in self.bounds if b is not earlier] + [bound]
        bound.admit(call)
        return bound

    def _refuse(self, refusal: Refusal) -> None:
        others = self.captures.refusals
        if not any(r.kind == refusal.kind and r.fits(self.module) for r in others):
            others.append(refusal)
        self.refused[refusal.kind] = Watch(self.module, refusal.reads)
        self.reasons[refusal.reason] = None

    def weights_read(self) -> dict[str, Read]:
        """How the graphs so far read the weights that any of them quantizes, by path."""
        plans = (bound.plan for bound in self.bounds)
        return quantized(parameters_read(plan.gm, plan.slots) for plan in plans)

    def applied(self) -> Iterator[Applied]:
        kind = type(self.module).__name__
        for bound in self.bounds[:1]:
            counts: dict[tuple[str, str, str, str], int] = {}
            for a in bound.plan.outcome.applied:
                key = (a.rule, a.provider, a.tier, a.source)
                counts[key] = counts.get(key, 0) + a.count
            for (rule, provider, tier, source), count in counts.items():
                yield Applied(rule, self.fqn, count, provider, tier, source, block_class=kind)

    def attentions(self) -> Iterator[Attention]:
        kind = type(self.module).__name__
        for bound in self.bounds[:1]:
            for backend, why in dict.fromkeys(bound.plan.outcome.attentions):
                yield Attention(backend, why, self.fqn, kind)

    def declined(self) -> Iterator[Declined]:
        kind = type(self.module).__name__
        for bound in self.bounds[:1]:
            for d in bound.plan.outcome.declined:
                yield replace(d, fqn=self.fqn, block_class=kind)
        reasons = tuple(self.reasons) if self.reasons or self.bounds else (NOT_CALLED,)
        if reasons:
            yield Declined("capture", self.fqn, "", "", reasons, block_class=kind)
