"""The first door: capture each distinct block once, rewrite it, install it in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fxopt.backends import checkpoints, options, precision, replicas, state, trial
from fxopt.backends.blocks import find_blocks
from fxopt.backends.capture import Plan, capture
from fxopt.backends.compiled import CompiledBlocks
from fxopt.backends.rewritten import Bound, Captures, RewrittenForward
from fxopt.backends.weight_reads import Read
from fxopt.hardware import Target
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.saving import saving
from fxopt.recipes import Recipe
from fxopt.report import Declined, Report


def optimize(
    model: nn.Module,
    *,
    recipe: str | Recipe = "bf16",
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    execution: str = "eager",
    strict: str | Sequence[str] = (),
    targets: Sequence[str | type[nn.Module]] | None = None,
) -> nn.Module:
    """Rewrite the repeated blocks of `model` in place; the same object comes back.

    Each distinct block is captured once, at its first call, for all batch and sequence sizes, and
    checked against the module's own result on that call's inputs. What cannot be captured stays as
    it is; `fxopt.report(model)` says why. Parameters, `state_dict` and hooks are untouched. Asked
    again for the same, it leaves the model as it is.

    Args:
        model: any module; its parameters may be sharded, frozen or wrapped later on.
        recipe: numerics, a name or a `Recipe`; "bf16" keeps the model's own dtypes.
        example_inputs: positional (tuple) or keyword (mapping) inputs of the model, to capture
            now instead of at the first call.
        execution: "eager" runs the rewritten graphs as they are; "compile" compiles each block in
            place with `torch.compile(backend="fxopt")`.
        strict: name or names of rules that must fire, checked when the first call is over.
        targets: FQN globs or classes of the modules to rewrite; None for the repeated blocks.

    Raises:
        FxoptError: one class per mistake, see `fxopt.errors`; the model is as it was.
    """
    state.require_module(model)
    strict = options.rule_names(strict)
    chosen = options.check(recipe=recipe, execution=execution, rules=strict)
    blocks = find_blocks(model, targets)
    precision.check_model(chosen, model)
    settings = state.Settings(chosen, blocks, targets, execution)
    opened = [d for d in state.doors(model) if isinstance(d, (Optimized, CompiledBlocks))]
    for door in opened:
        door.settings.require(settings)
    if example_inputs is not None:
        options.check_inputs(model, example_inputs)
    is_new = not opened
    if is_new:
        opens: type[Optimized | CompiledBlocks]
        opens = CompiledBlocks if execution == "compile" else Optimized
        opened = [opens(settings, precision.outside(chosen, model, blocks))]
        state.remember(model, opened[0])
    (door,) = opened
    check = state.StrictOnce(model, door, strict, closes=is_new) if strict else None
    if example_inputs is not None:
        try:
            # An example is of no step, and its result is not looked at.
            with high_precision() if chosen.is_scheduled or chosen.is_delayed else nullcontext():
                _run(model, example_inputs)
        except BaseException:
            if check is not None:
                check.handle.remove()
            if is_new and door in state.doors(model):
                state.close(model, door)
            raise
    return model


def _run(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> None:
    with torch.no_grad(), trial.same_random_numbers():
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs)


class RewrittenCallable:
    """A block's rewritten forward, not installed; parameters are read from the block at call time.

    report: what was rewritten, as `fxopt.report` gives it.
    """

    def __init__(self, block: nn.Module, plan: Plan, recipe: Recipe) -> None:
        self.bound, self.saved = Bound(block, plan), recipe.saved
        first = next(block.parameters(), None)
        target = options.target_name(None if first is None else first.device)
        self.report = state.with_fqn(
            plan.outcome.report("optimize", recipe.name, target),
            "",
            type(block).__name__,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with saving(self.saved):
            return self.bound(*args, **kwargs)


def rewrite_block(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recipe: str | Recipe = "bf16",
    target: Target | None = None,
    planned_for: Target | None = None,
) -> RewrittenCallable:
    """Rewrite `block` for calls like this one without running or changing it.

    Args:
        block: may live on the meta device.
        args, kwargs: inputs of its forward; only shapes and dtypes are read.
        target: what to plan for; None for no cost model.
        planned_for: as in `capture`.

    Raises:
        CannotCapture: the block cannot be exported.
    """
    chosen = options.check(recipe=recipe)
    rules = options.rules_for(chosen, target=target)
    call = block, checkpoints.within(block.forward), args, kwargs
    plan = capture(*call, rules, chosen.asked_attention, planned_for=planned_for)
    return RewrittenCallable(block, plan, chosen)


class Optimized:
    """One use of `optimize` on a model."""

    def __init__(self, settings: state.Settings, outside: tuple[Declined, ...]) -> None:
        self.settings, self.outside = settings, outside
        recipe, blocks = settings.recipe, settings.blocks
        target = options.target_of(_device(blocks))
        shared: dict[Any, Captures] = {}
        self.blocks: list[RewrittenForward] = []
        for fqn, module in blocks.items():
            key = type(module), _function(module), precision.exceptions(recipe, fqn, module)
            rules = options.rules_for(recipe, block=fqn, target=target)
            captures = shared.setdefault(key, Captures(rules, recipe.asked_attention, recipe.saved))
            self.blocks.append(RewrittenForward(fqn, module, captures))
        for block in self.blocks:
            replicas.install(block.module, block)

    @property
    def forwards(self) -> Sequence[replicas.Forward]:
        return self.blocks

    def restore(self, model: nn.Module) -> None:
        replicas.withdraw(self.forwards)

    def weights_read(self) -> dict[str, Read]:
        """By FQN, how the blocks read the weights that they quantize."""
        return {
            f"{block.fqn}.{path}".lstrip("."): read
            for block in self.blocks
            for path, read in block.weights_read().items()
        }

    def report(self) -> Report:
        applied = [a for b in self.blocks for a in b.applied()]
        declined = [*self.outside, *(d for b in self.blocks for d in b.declined())]
        device = next((b.device for b in self.blocks if b.device is not None), None)
        recipe, target = self.settings.recipe, options.target_name(device)
        given = tuple(applied), tuple(declined)
        attentions = tuple(a for b in self.blocks for a in b.attentions())
        more: dict[str, Any] = {"attentions": attentions, "saved": recipe.saved}
        return Report("optimize", recipe.name, target, *given, **more)


def _device(blocks: Mapping[str, nn.Module]) -> torch.device:
    parameters = (p for block in blocks.values() for p in block.parameters())
    return next((p.device for p in parameters), torch.device("cpu"))


def _function(module: nn.Module) -> Any:
    """What the forwards of one class share; whoever replaced one has it for himself."""
    forward = getattr(module.forward, "original", module.forward)  # another door's
    return getattr(forward, "__func__", forward)
