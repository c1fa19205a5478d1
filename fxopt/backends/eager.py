"""The third door: replace forwards of known modules, by class and structure; nothing is captured.

A module keeps its class, parameters, hooks and `state_dict`. Its forward becomes an instance
attribute that runs the fused form, or, where that does not fit a call, the module's own.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.backends import checkpoints, options, precision, replicas, state
from fxopt.backends.blocks import find_blocks
from fxopt.backends.calls import is_traced, is_transformed
from fxopt.backends.failures import described
from fxopt.backends.precision import source
from fxopt.backends.reads import Watch, has_global_hooks, hooks
from fxopt.backends.swaps import candidates
from fxopt.backends.swaps.attending import Attending, attending
from fxopt.backends.swaps.proof import PROBE, Verdict, prove
from fxopt.backends.swaps.quantized import Formats, quantizing
from fxopt.backends.swaps.swap import Arguments, Draw, Swap, Unfit
from fxopt.backends.weight_reads import Read, quantized
from fxopt.errors import StillRewritten
from fxopt.kernels.attention import named
from fxopt.kernels.gathered import require_whole
from fxopt.kernels.registration import provider
from fxopt.kernels.saving import saving
from fxopt.passes.autocast import Autocast
from fxopt.passes.rules import CATALOGUE, linear_cross_entropy, quantized_linear
from fxopt.recipes import Recipe
from fxopt.report import Applied, Attention, Declined, Report

OUT_OF_REACH = "swap sees modules, this pattern lies between them, in the forward of {}"
UNREACHED = "swap does not replace the forward of {} that calls it: {!r} is not what runs"
REMEDY = "fxopt.optimize(model) reads the forward itself"
TIERS = {rule.name: rule.tier for rule in CATALOGUE}


def swap(
    model: nn.Module,
    *,
    recipe: str | Recipe = "bf16",
    strict: str | Sequence[str] = (),
    targets: Sequence[str | type[nn.Module]] | None = None,
) -> nn.Module:
    """Replace forwards of known blocks, or of their parts, in place; the same object comes back.

    Blocks of the known families are replaced whole; in others, attention, AdaLN, MLPs and norms.
    Each distinct replacement is first proved against the module's own forward, on small random
    inputs, values and gradients; what fails keeps its own, and `fxopt.report(model)` says why.

    Args:
        model: any module; parameters, `state_dict`, hooks and classes are untouched.
        recipe: numerics, a name or a `Recipe`; "bf16" keeps the model's own dtypes.
        strict: name or names of rules that must find a place.
        targets: FQN globs or classes of the modules to look into; None for the repeated blocks.

    Raises:
        FxoptError: one class per mistake, see `fxopt.errors`; the model is as it was.
    """
    state.require_module(model)
    strict = options.rule_names(strict)
    chosen = options.check(recipe=recipe, rules=strict)
    blocks = find_blocks(model, targets)
    precision.check_model(chosen, model)
    settings = state.Settings(chosen, blocks, targets)
    for opened in state.doors(model):
        if isinstance(opened, Swaps):
            opened.settings.require(settings)
            state.require_fired(opened, strict)
            return model
    door = Swaps(settings, precision.outside(chosen, model, blocks))
    try:
        for fqn, block in blocks.items():
            door.enter(fqn, block)
        state.require_fired(door, strict)
    except BaseException:
        door.restore(model)
        raise
    state.remember(model, door)
    return model


class Swaps:
    """One use of `swap` on a model."""

    def __init__(self, settings: state.Settings, outside: tuple[Declined, ...]) -> None:
        self.settings, self.recipe = settings, settings.recipe
        self.installed: list[SwappedForward] = []
        self.declined: list[Declined] = list(outside)
        self.unreached: list[Attention] = []
        self.device: torch.device | None = None

    def enter(self, fqn: str, block: nn.Module) -> None:
        """Swap a block, or what can be swapped inside it."""
        first = next(block.parameters(), None)
        self.device = self.device or (None if first is None else first.device)
        if isinstance(block.__dict__.get("forward"), SwappedForward):
            return  # one module under two names
        if "forward" in block.__dict__:
            why = "its forward is replaced already, by another door or by the user"
            self.declined.append(declined("swap", fqn, block, (why,)))
            return
        found = list(self._swap_within(fqn, block))
        if any(f.module is block for f in found):
            return
        asked, name = named(self.recipe.asked_attention), type(block).__name__
        if asked is not None and not any(f.swap.name.startswith("attention") for f in found):
            self.unreached.append(Attention("pytorch", UNREACHED.format(name, asked), fqn, name))
        fired = {rule for f in found for rule, _ in f.verdict.fired}
        fired.add(linear_cross_entropy.RULE.name)  # lies in no block
        for rule in (r.name for r in options.rules_for(self.recipe) if r.name not in fired):
            reason = OUT_OF_REACH.format(name)
            self.declined.append(declined(rule, fqn, block, (reason,), REMEDY))

    def _swap_within(self, fqn: str, module: nn.Module) -> Iterator[SwappedForward]:
        forward = self._first_proved(fqn, module)
        if forward is not None:
            replicas.install(module, forward)
            self.installed.append(forward)
            yield forward
            return
        for name, child in module.named_children():
            if "forward" not in child.__dict__:
                yield from self._swap_within(f"{fqn}.{name}" if fqn else name, child)

    def _first_proved(self, fqn: str, module: nn.Module) -> SwappedForward | None:
        reasons = []
        for candidate in candidates(module, self.recipe):
            forward = SwappedForward(fqn, module, candidate, self.recipe)
            if forward.verdict.why_not is None:
                return forward
            reasons.append(f"{candidate.name}: {forward.verdict.why_not}")
        if reasons:
            likeliest = min(reasons, key=lambda reason: PROBE in reason)
            tried = (f"{len(reasons)} forms tried, the likeliest is {likeliest}",)
            self.declined.append(declined("swap", fqn, module, tried))
        return None

    @property
    def forwards(self) -> Sequence[replicas.Forward]:
        return self.installed

    def restore(self, model: nn.Module) -> None:
        replicas.withdraw(self.forwards)

    def weights_read(self) -> dict[str, Read]:
        """By FQN, how the swapped forwards read the weights that they quantize."""
        return {fqn: read for f in self.installed for fqn, read in f.weights_read().items()}

    def report(self) -> Report:
        applied = tuple(a for f in self.installed for a in f.applied(self.device))
        refused = tuple(d for f in self.installed for d in f.declined())
        target = options.target_name(self.device)
        chosen = (a for f in self.installed for a in f.attentions())
        given = applied, (*self.declined, *refused)
        more: dict[str, Any] = {
            "attentions": (*self.unreached, *chosen),
            "saved": self.recipe.saved,
        }
        return Report("swap", self.recipe.name, target, *given, **more)


class SwappedForward:
    """Stands in for a module's forward: runs the fused form where it was proved, else the own.

    A proof holds for the kind of arguments it was made with; another kind is proved when it comes.
    """

    installed = None
    is_withdrawn = False

    def __init__(self, fqn: str, module: nn.Module, candidate: Swap, recipe: Recipe) -> None:
        self.fqn, self.module, self.swap = fqn, module, candidate
        self.formats = Formats(recipe, precision.exceptions(recipe, fqn, module))
        first = next(module.parameters(), None)
        target = None if first is None else options.target_of(first.device)
        self.theta = options.threshold(recipe, target)
        self.own: Callable[..., Any] = module.forward
        self.original = checkpoints.within(self.own)
        self.names = [
            p.name
            for p in inspect.signature(module.forward).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        self.refusals: dict[str, None] = {}
        self.met: dict[nn.Module, dict[Read, None]] = {}
        self._forget()
        self.verdict = self._first_verdict()

    def _first_verdict(self) -> Verdict:
        why_not = self._intercepted()
        if why_not is not None:
            return Verdict(why_not)
        try:
            return self._verdict(next(self.swap.examples(self.module, Draw(self.module))))
        except Exception as error:  # of a class that is known, but not of its structure
            return Verdict(f"it is not built as expected: {described(error)}")

    def _forget(self) -> None:
        self.verdicts: dict[Any, Verdict] = {}
        self.attention = Attending(self.formats.recipe.asked_attention)
        self.watches: list[Watch] | None = []
        self.inner = [m.__dict__ for m in self.module.modules() if m is not self.module]
        self.hooks = hooks(self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> SwappedForward:
        twin = SwappedForward.__new__(SwappedForward)
        memo[id(self)] = twin
        twin.__dict__ |= self.__dict__ | {"refusals": {}, "met": {}}
        twin.attention = Attending(self.attention.asked)
        twin.module = copy.deepcopy(self.module, memo)
        twin.own = type(twin.module).forward.__get__(twin.module)
        twin.original = checkpoints.within(twin.own)
        twin.watches = None  # the copy of the module is not complete yet
        return twin

    def __reduce__(self) -> Any:
        raise StillRewritten(self.fqn)

    def replicated(self) -> None:
        self.refusals[replicas.REPLICATED] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_surplus = len(args) > len(self.names) and not self.swap.ignores_more
        if self.is_withdrawn or is_traced() or is_transformed() or is_surplus:
            return self.own(*args, **kwargs)
        return checkpoints.call(self.own, self.within_checkpoint, args, kwargs)

    def within_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Run the fused form, or else the own."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        arguments = {n: v for n, v in arguments.items() if not _is_absent(v)}
        try:
            why_not = self._why_not(arguments)
            if why_not is None:
                return self._run_fused(arguments)
        except Unfit as reason:
            why_not = str(reason)
        self.refusals[why_not] = None
        require_whole(self.module.parameters(), f"{self.fqn} runs its own forward: {why_not}")
        return self.original(*args, **kwargs)

    def _run_fused(self, arguments: Arguments) -> Any:
        asked, low = self.formats.recipe, quantizing(self.formats, self.theta, self.module)
        with low as active, attending(self.attention), saving(asked.saved):
            out = self.swap.forward(self.module, **arguments)
        if asked.all_gather != "model":
            for linear, recipe in active.accepted.items():
                self.met.setdefault(linear, {})[recipe] = None
            for linear, why_not in active.refused.items():
                self.met.setdefault(linear, {})["; ".join(why_not)] = None
        return out

    def weights_read(self) -> dict[str, Read]:
        """How the calls so far read the weights that any of them quantizes, by FQN."""
        found = quantized([self.met])
        paths = {m: path for path, m in self.module.named_modules()}
        return {".".join(filter(None, (self.fqn, paths[m], "weight"))): found[m] for m in found}

    def _why_not(self, arguments: Arguments) -> str | None:
        """Why this call has to run the module's own forward, or None."""
        if self.watches is None or not all(watch.unchanged() for watch in self.watches):
            self._forget()
        why_not = self._intercepted()
        if why_not is not None:
            return why_not
        first = next((v for v in arguments.values() if isinstance(v, Tensor)), None)
        if first is not None and Autocast.current(first.device.type).enabled:
            return "autocast is on: the casts lie between the modules"
        key = self.swap.signature(arguments)
        if key not in self.verdicts:
            self.verdicts[key] = self._verdict(arguments)
        return self.verdicts[key].why_not

    def _intercepted(self) -> str | None:
        """What the user has put between the submodules, which the fused form would not call."""
        if any(self.hooks) or has_global_hooks():
            return "a submodule has hooks, which the fused form would not call"
        if any("forward" in held for held in self.inner):
            return "the forward of a submodule is replaced"
        return None

    def _verdict(self, arguments: Arguments) -> Verdict:
        """Judge the fused form for arguments of this kind."""
        # A checkpoint around this call counts what is saved in it: nothing of the proof.
        uncounted = saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.inference_mode(False), _disable_current_modes(), uncounted:
            reads, verdict = prove(self.module, self.swap, arguments, self.formats)
        self.watches = [*(self.watches or ()), Watch(self.module, reads)]
        return verdict

    def _in_force(self) -> list[Verdict]:
        """Of the kinds of calls that ran fused; before any, of the one that is expected."""
        held = [v for v in self.verdicts.values() if v.why_not is None]
        return held or ([] if self.refusals else [self.verdict])

    def applied(self, device: torch.device | None) -> Iterator[Applied]:
        """The substitutions; of several kinds of calls the most that one has."""
        where, name = source(self.module), type(self.module).__name__
        most: Counter[tuple[str, str]] = Counter()
        for verdict in self._in_force():
            most |= Counter(verdict.fired)
        for (rule, op), count in most.items():
            by = provider(op, device or torch.device("cpu"))
            yield Applied(rule, self.fqn, count, by, TIERS[rule], where, block_class=name)

    def attentions(self) -> Iterator[Attention]:
        for backend, why in dict.fromkeys(self.attention.choices.values()):
            yield Attention(backend, why, self.fqn, type(self.module).__name__)

    def declined(self) -> Iterator[Declined]:
        if self.refusals:
            yield declined("swap", self.fqn, self.module, tuple(self.refusals))
        refused = (r for verdict in self._in_force() for r in verdict.refused)
        for path, reasons in dict.fromkeys(refused):
            yield Declined(
                quantized_linear.RULE.name,
                self.fqn,
                path,
                source(self.module),
                reasons,
                quantized_linear.REMEDY,
                type(self.module).__name__,
            )


def declined(
    rule: str, fqn: str, module: nn.Module, reasons: tuple[str, ...], remedy: str = ""
) -> Declined:
    name = type(module).__name__
    return Declined(rule, fqn, name, source(module), reasons, remedy, block_class=name)


def _is_absent(argument: Any) -> bool:
    """Whether an argument says no more than its default: None, or a dict without an item."""
    return argument is None or (type(argument) is dict and not argument)
