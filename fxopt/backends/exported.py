"""The first door: capture each distinct block once, rewrite it, install it in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxopt.backends import options, state
from fxopt.backends.blocks import find_blocks
from fxopt.backends.capture import CannotCapture, Plan, capture
from fxopt.backends.compiled import CompiledBlocks
from fxopt.backends.reads import Watch
from fxopt.errors import FxoptError, StillRewritten
from fxopt.passes.autocast import Autocast
from fxopt.passes.rule import Rule
from fxopt.report import Applied, Declined, Report

# More captures of one block class than this mean that its inputs change in kind at every call.
MAX_PLANS = 8


def optimize(
    model: nn.Module,
    *,
    recipe: str = "bf16",
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    execution: str = "eager",
    strict: Sequence[str] = (),
    targets: Sequence[str | type[nn.Module]] | None = None,
) -> nn.Module:
    """Rewrite the repeated blocks of `model` in place; the same object comes back.

    Each distinct block is captured once, at its first call, for all batch and sequence sizes, and
    checked against the module's own result on that call's inputs. What cannot be captured stays as
    it is; `fxopt.report(model)` says why. Parameters, `state_dict` and hooks are untouched.

    Args:
        model: any module; its parameters may be sharded, frozen or wrapped later on.
        recipe: numerics; "bf16" keeps the model's own dtypes.
        example_inputs: positional (tuple) or keyword (mapping) inputs of the model, to capture
            now instead of at the first call.
        execution: "eager" runs the rewritten graphs as they are; "compile" compiles each block in
            place with `torch.compile(backend="fxopt")`.
        strict: names of rules that must fire, checked when the first call is over.
        targets: FQN globs or classes of the modules to rewrite; None for the repeated blocks.

    Raises:
        FxoptError: one class per mistake, see `fxopt.errors`; the model is as it was.
    """
    state.require_module(model)
    options.check(recipe=recipe, execution=execution, rules=strict)
    blocks = find_blocks(model, targets)
    if any(isinstance(door, (Optimized, CompiledBlocks)) for door in state.doors(model)):
        return model
    if example_inputs is not None:
        options.check_inputs(model, example_inputs)
    door: state.Door
    if execution == "compile":
        door = CompiledBlocks(recipe, blocks)
    else:
        door = Optimized(recipe, blocks)
    state.remember(model, door)
    state.check_after_first_call(model, door, strict)
    if example_inputs is not None:
        try:
            _run(model, example_inputs)
        except FxoptError:
            state.restore(model)
            raise
    return model


def _run(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> None:
    with torch.no_grad(), _same_random_numbers():
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave the random state as it is found."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


class RewrittenCallable:
    """A block's rewritten forward, not installed; parameters are read from the block at call time.

    report: what was rewritten, as `fxopt.report` gives it.
    """

    def __init__(self, block: nn.Module, plan: Plan, recipe: str) -> None:
        self.bound = _Bound(block, plan)
        target = options.target_name(next(block.parameters()).device)
        outcome = plan.outcome
        self.report = state.with_fqn(
            Report("optimize", recipe, target, tuple(outcome.applied), tuple(outcome.declined)),
            "",
            type(block).__name__,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bound.run(pytree.tree_leaves((args, kwargs)))


def rewrite_block(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: str = "bf16"
) -> RewrittenCallable:
    """Rewrite `block` for calls like this one without running or changing it.

    Args:
        block: may live on the meta device.
        args, kwargs: inputs of its forward; only shapes and dtypes are read.

    Raises:
        CannotCapture: the block cannot be exported.
    """
    plan = capture(block, block.forward, args, kwargs, options.rules_for(recipe))
    return RewrittenCallable(block, plan, recipe)


class Optimized:
    """One use of `optimize` on a model."""

    def __init__(self, recipe: str, blocks: Mapping[str, nn.Module]) -> None:
        self.recipe = recipe
        rules = options.rules_for(recipe)
        plans: dict[type[nn.Module], list[Plan | str]] = {}
        self.blocks = [
            RewrittenBlock(fqn, module, plans.setdefault(type(module), []), rules)
            for fqn, module in blocks.items()
        ]
        for block in self.blocks:
            block.module.forward = block

    def restore(self, model: nn.Module) -> None:
        for block in self.blocks:
            block.uninstall()

    def report(self) -> Report:
        applied = [a for b in self.blocks for a in b.applied()]
        declined = [d for b in self.blocks for d in b.declined()]
        device = next((b.device for b in self.blocks if b.device is not None), None)
        target = options.target_name(device)
        return Report("optimize", self.recipe, target, tuple(applied), tuple(declined))


class RewrittenBlock:
    """Stands in for a block's forward: runs the graph that fits the call, or captures one."""

    def __init__(
        self, fqn: str, module: nn.Module, plans: list[Plan | str], rules: Sequence[Rule]
    ) -> None:
        self.fqn, self.module, self.plans, self.rules = fqn, module, plans, rules
        self.installed: Any = module.__dict__.get("forward")
        self.original: Callable[..., Any] = module.forward
        self.bound: list[_Bound] = []
        self.refusals: dict[str, Any] = {}
        self.device: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenBlock:
        module = copy.deepcopy(self.module, memo)
        twin = RewrittenBlock.__new__(RewrittenBlock)
        memo[id(self)] = twin
        twin.__dict__ |= self.__dict__ | {"module": module, "bound": [], "refusals": {}}
        twin.installed = copy.deepcopy(self.installed, memo)
        function = getattr(self.original, "__func__", None)
        twin.original = function.__get__(module) if function else twin.installed
        return twin

    def __reduce__(self) -> Any:
        raise StillRewritten(self.fqn)

    def uninstall(self) -> None:
        if self.installed is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self.installed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        first = next((v for v in leaves if isinstance(v, Tensor)), None)
        autocast = Autocast.current("cpu" if first is None else first.device.type)
        for bound in self.bound:
            if bound.plan.accepts(leaves, spec, autocast) and bound.watch.unchanged():
                if bound.watch.hooked():
                    self.refusals["a submodule has hooks, which a graph would not call"] = None
                    break
                return bound.run(leaves)
        else:
            bound = self._bind(args, kwargs, leaves, spec, autocast)
            if bound is not None:
                self.device = None if first is None else first.device
                return bound.run(leaves)
        return self.original(*args, **kwargs)

    def _bind(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        spec: pytree.TreeSpec,
        autocast: Autocast,
    ) -> _Bound | None:
        """A graph for this call: one that another block of the kind has, or a new capture."""
        for plan in self.plans:
            if isinstance(plan, Plan) and plan.accepts(leaves, spec, autocast):
                if plan.fits(self.module):
                    return self._keep(_Bound(self.module, plan))
        if len(self.plans) >= MAX_PLANS:
            self.refusals[f"captured {MAX_PLANS} times already: its inputs change in kind"] = None
            return None
        if self.refusals and not self.bound:
            return None
        try:
            earlier = [p for p in self.plans if isinstance(p, Plan)]
            plan = capture(self.module, self.original, args, kwargs, self.rules, earlier)
            bound = _Bound(self.module, plan)
            if bound.watch.hooked():
                raise CannotCapture("a submodule has hooks, which a graph would not call")
            self._check(bound, args, kwargs, leaves)
        except CannotCapture as reason:
            self.plans.append(str(reason))
            self.refusals[str(reason)] = None
            return None
        self.plans.append(plan)
        return self._keep(bound)

    def _keep(self, bound: _Bound) -> _Bound:
        self.bound = [b for b in self.bound if b.plan is not bound.plan] + [bound]
        return bound

    def _check(
        self, bound: _Bound, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> None:
        """The graph reproduces the module's own result on the inputs of this very call."""
        with torch.no_grad():
            with _same_random_numbers():
                expected = pytree.tree_leaves(self.original(*args, **kwargs))
            with _same_random_numbers():
                try:
                    found = pytree.tree_leaves(bound.run(leaves))
                except Exception as error:
                    first = str(error).splitlines()[0]
                    raise CannotCapture(f"the graph does not run: {first}") from error
        for a, b in zip(expected, found, strict=True):
            if isinstance(a, Tensor) and a.is_floating_point() and not _is_meta(a):
                # Two roundings of one value differ by eps; a block chains a few dozen.
                bound_on_error = max(8 * torch.finfo(a.dtype).eps, 1e-4)
                difference = torch.linalg.vector_norm(a.double() - b.double())
                if not difference <= bound_on_error * torch.linalg.vector_norm(a.double()):
                    if torch.isfinite(a).all():
                        raise CannotCapture("the graph gives another result than the module")

    def applied(self) -> Iterator[Applied]:
        if not self.bound:
            return
        plan = self.bound[0].plan
        counts: dict[tuple[Any, ...], int] = {}
        for a in plan.outcome.applied:
            key = (a.rule, a.provider, a.tier, a.source)
            counts[key] = counts.get(key, 0) + a.count
        for (rule, provider, tier, source), count in counts.items():
            kind = type(self.module).__name__
            yield Applied(rule, self.fqn, count, provider, tier, source, block_class=kind)

    def declined(self) -> Iterator[Declined]:
        kind = type(self.module).__name__
        for plan in self.bound[:1]:
            for d in plan.plan.outcome.declined:
                yield Declined(
                    d.rule, self.fqn, d.node, d.source, d.reasons, d.remedy, block_class=kind
                )
        if self.refusals:
            yield Declined("capture", self.fqn, "", "", tuple(self.refusals), block_class=kind)


class _Bound:
    """A plan with one module's parameters, read where they are at the time of the call."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.plan, self.watch = plan, Watch(module, plan.reads)
        self.sources: list[tuple[dict[str, Any], str]] = []
        for kind, target in plan.slots:
            if kind == "constant":
                self.sources.append(({"": target}, ""))
                continue
            path, _, name = target.rpartition(".")
            holder = module.get_submodule(path)
            self.sources.append(
                (holder._parameters if kind == "parameter" else holder._buffers, name)
            )

    def run(self, leaves: list[Any]) -> Any:
        out = self.plan.run(*[held[name] for held, name in self.sources], *leaves)
        return pytree.tree_unflatten(out, self.plan.out_spec)


def _is_meta(t: Tensor) -> bool:
    return t.device.type == "meta" or isinstance(t, torch._subclasses.FakeTensor)
