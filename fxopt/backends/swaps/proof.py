"""Run a module's own forward and its replacement on small inputs; compare values and gradients.

Both run on a replica on the CPU that has the module's structure and constants, and random
parameters: the module may be sharded, on a GPU or without values, and a projection that is zero at
the start of training would hide what it multiplies. Where a narrow replica can be built, it is: the
forward of a block does not depend on its width.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt.backends import checkpoints
from fxopt.backends.reads import Reads, recording
from fxopt.backends.swaps.branches import standing_for
from fxopt.backends.swaps.fused import counting
from fxopt.backends.swaps.quantized import Formats, quantizing
from fxopt.backends.swaps.swap import Arguments, Swap, Unfit
from fxopt.kernels.in_force import high_precision
from fxopt.passes.prove import ERROR_FACTOR, MEANING_TOLERANCE

RAISED = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
PROBE = "it does not run on a probe"
# Gradients that cancel to nothing (of a key's bias) are rounding: they are compared with this part
# of the largest result at least.
CANCELLED = 1e-3
# The error of one gradient on one input is a single throw of the dice: where it is too large, the
# mean square over so many inputs decides. Where gradients cancel, one input in thirty can be ten
# times as far off as the others, in either form: where eight do not hold the bound, more decide.
NUM_DRAWS = (8, 32)
# Factor on the first argument, the one that the norms see: eps decides at 1e-3.
SCALES = (1.0, 1e-3)
_STRUCTURAL = (Tensor, nn.Module, dict, list, tuple, set, str, int, float, type(None))
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


# float64 results, those of the module's own forward, and those of its replacement.
Draw = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]


@dataclass(frozen=True)
class Verdict:
    """`why_not` is None if the replacement may stand; `fired` are its substitutions, (rule, op).

    refused: paths of linears that a recipe leaves in the model's dtype, with the reasons.
    """

    why_not: str | None
    fired: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, tuple[str, ...]], ...] = ()


_verdicts: dict[Any, list[tuple[Reads, Verdict]]] = {}


def prove(
    module: nn.Module, swap: Swap, arguments: Arguments, formats: Formats
) -> tuple[Reads, Verdict]:
    """Judge `swap` on `module`; modules of one structure whose read attributes agree share it.

    Args:
        module: the module with its own forward; it is not run, its replica is.
        arguments: those of a call; only their kinds count.
        formats: which linears they would quantize is noted; all run in the model's dtype here.
    """
    key = (swap.name, structure(module), swap.signature(arguments), formats)
    known = _verdicts.setdefault(key, [])
    for reads, verdict in known:
        if reads.hold_for(module):
            return reads, verdict
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # of the CPU alone
        known.append(_prove(module, swap, arguments, formats))
    return known[-1]


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Classes of all submodules and the shapes and dtypes of their parameters."""
    return tuple(
        (path, type(m), tuple((n, p.shape, p.dtype) for n, p in _own_parameters(m)))
        for path, m in module.named_modules()
    )


def _own_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in module._parameters.items() if p is not None]


def _prove(
    module: nn.Module, swap: Swap, arguments: Arguments, formats: Formats
) -> tuple[Reads, Verdict]:
    reads = Reads()
    try:
        twin = replica(module, swap)
        example = swap.like(arguments, twin)
        with (
            recording(twin) as reads,
            counting() as fired,
            standing_for(module, twin),
            quantizing(formats, None, twin) as low,
            high_precision(),
        ):
            why_not = _compare(twin, module, swap, example, fired)
        paths = {m: path for path, m in twin.named_modules()}
        refused = tuple((paths[m], reasons) for m, reasons in low.refused.items())
        verdict = Verdict(why_not, tuple(fired), refused)
    except Unfit as reason:
        verdict = Verdict(str(reason))
    except Exception as error:  # a guess that cannot even run is a wrong guess
        first = (str(error).splitlines() or [""])[0]
        verdict = Verdict(f"{PROBE}: {type(error).__name__}: {first}")
    return _without_incidental(reads, module), verdict


def _without_incidental(reads: Reads, module: nn.Module) -> Reads:
    """What the replica read, without its mode and its sizes: those of the module may differ."""
    kept = Reads()
    for (path, name), value in reads.values.items():
        is_size = isinstance(value, tuple) and value[0] in (int, tuple, torch.Size)
        one = Reads({(path, name): value})
        if name != "training" and (not is_size or one.hold_for(module)):
            kept.values |= one.values
    return kept


def replica(module: nn.Module, swap: Swap) -> nn.Module:
    """A copy on the CPU, without hooks, its parameters random float64; narrow where it can be."""
    twin = swap.small(module) if swap.small is not None else None
    if twin is None or not _alike(twin, module):
        twin = _copy(module)
    for submodule in twin.modules():
        submodule.__dict__.pop("forward", None)
    for p in twin.parameters():
        if p.is_floating_point():
            p.data = _random(p)
    return twin.to("cpu").eval()


def _alike(twin: nn.Module, module: nn.Module) -> bool:
    """Give `twin` the plain attributes of `module`, sizes aside; False if it is built otherwise."""
    pairs = list(zip(twin.named_modules(), module.named_modules(), strict=False))
    if len(list(twin.modules())) != len(list(module.modules())):
        return False
    for (path, a), (own_path, b) in pairs:
        names = [n for n, _ in _own_parameters(a)]
        same_class = type(a) is type(b) or not path  # sharding changes the class of a block
        if path != own_path or not same_class or names != [n for n, _ in _own_parameters(b)]:
            return False
        for name, value in vars(b).items():
            plain = isinstance(value, (bool, str, float, type(None)))
            if name in vars(a) and (plain or not isinstance(value, _STRUCTURAL)):
                a.__dict__[name] = value
    return True


def _copy(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, device="cpu"))
        if p.is_floating_point()
        else p.detach().cpu()
        for p in module.parameters()
    }
    for submodule in module.modules():
        for name, value in vars(submodule).items():
            if name in _HOOKS:
                memo[id(value)] = type(value)()
            elif not isinstance(value, _STRUCTURAL):
                memo[id(value)] = value  # a config or a processor: shared, not copied
    return copy.deepcopy(module, memo)


def _random(parameter: Tensor) -> Tensor:
    # Unit gain for matrices; vectors spread about one, so that no norm weight is one or zero.
    fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
    x = torch.randn(parameter.shape, dtype=torch.float64, device="cpu") * fan_in**-0.5
    return x if parameter.dim() > 1 else x + 1


def _compare(
    twin: nn.Module,
    module: nn.Module,
    swap: Swap,
    example: Arguments,
    fired: list[tuple[str, str]],
) -> str | None:
    dtypes = [p.dtype for p in module.parameters()]
    for p, dtype in zip(twin.parameters(), dtypes, strict=True):
        p.data = p.data.to(dtype).to(p.dtype)  # what the model's own dtype can hold
    own = partial(checkpoints.within(twin.forward), **_left_out(twin, example))
    fused = partial(swap.forward, twin)
    first = next(iter(example))
    with Raised():
        for scale in reversed(SCALES):
            wide = pytree.tree_map_only(Tensor, _raise, example)
            wide[first] = wide[first] * scale
            truth = _run(twin, own, wide, swap)
            fired.clear()
            found = _run(twin, fused, wide, swap)
            why_not = _disagreement(truth, found, scale)
            if why_not:
                return why_not
    count = list(fired)

    def draw(number: int) -> Draw:
        drawn = _redrawn(example, swap, number) if number else example
        for p in twin.parameters():
            p.data = _raise(p.data)
        with Raised():
            truth = _run(twin, own, pytree.tree_map_only(Tensor, _raise, drawn), swap)
        for p, dtype in zip(twin.parameters(), dtypes, strict=True):
            p.data = p.data.to(dtype)
        return truth, _run(twin, own, drawn, swap), _run(twin, fused, drawn, swap)

    draws = [draw(0)]
    why_not = _inaccuracy(draws)
    for num_draws in NUM_DRAWS:
        if why_not:
            draws += map(draw, range(len(draws), num_draws))
            why_not = _inaccuracy(draws)
    fired[:] = count
    return why_not


def _redrawn(example: Arguments, swap: Swap, seed: int) -> Arguments:
    """Other arguments of the same sizes: random signs on whatever holds a feature per token."""
    generator = torch.Generator().manual_seed(seed)

    def flip(name: str, value: Any) -> Any:
        is_features = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2
        if not is_features or name in swap.constants:
            return value
        signs = 2 * torch.randint(0, 2, value.shape, generator=generator) - 1
        return value * signs.to(value.dtype)

    return {name: flip(name, value) for name, value in example.items()}


def _left_out(module: nn.Module, example: Arguments) -> dict[str, None]:
    """Arguments without a default that the example stands for by leaving them out."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return dict.fromkeys(name for name in required if name not in example)


def _run(
    twin: nn.Module, forward: Callable[..., Any], example: Mapping[str, Any], swap: Swap
) -> list[Tensor | None]:
    """Outputs, then gradients of the arguments and of all parameters."""
    arguments: Arguments = {}
    wanted: list[Tensor] = list(twin.parameters())
    for name, value in example.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in swap.constants:
            value = value.detach().clone().requires_grad_()
            wanted.append(value)
        arguments[name] = value
    torch.default_generator.manual_seed(0)
    outputs = [o for o in pytree.tree_leaves(forward(**arguments)) if isinstance(o, Tensor)]
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs
    ]
    wanted = [w for w in wanted if w.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return [*(o.detach() for o in outputs), *gradients]


def _disagreement(
    truth: Sequence[Tensor | None], found: Sequence[Tensor | None], scale: float
) -> str | None:
    if len(truth) != len(found):
        return f"{len(truth) - len(found)} outputs are missing"
    least = _least_size(truth)
    for index, (t, f) in enumerate(zip(truth, found, strict=True)):
        if t is None or f is None:
            if t is not f and (t if t is not None else f).any():  # type: ignore[union-attr]
                return f"result {index} has no gradient in one of the two forms"
        elif t.shape != f.shape:
            return f"result {index} is {list(f.shape)}, not {list(t.shape)}"
        elif not _error(t, f, least) <= MEANING_TOLERANCE:
            difference = f"{_error(t, f, least):.2g} in float64 on inputs of scale {scale:g}"
            return f"result {index} differs by {difference}"
    return None


def _inaccuracy(draws: Sequence[Draw]) -> str | None:
    """Why the errors, pooled over draws, are too large; None if they are not."""
    least = [_least_size(truth) for truth, _, _ in draws]
    for index, (t, e, o) in enumerate(zip(*draws[0], strict=True)):
        if t is None or e is None or o is None:
            continue
        if e.dtype != o.dtype:
            return f"result {index} is {o.dtype}, not {e.dtype}"
        theirs, own = (
            math.hypot(
                *(
                    _error(d[0][index], d[i][index], size)
                    for d, size in zip(draws, least, strict=True)
                )
            )
            for i in (1, 2)
        )
        bound = ERROR_FACTOR * theirs + torch.finfo(e.dtype).eps * len(draws) ** 0.5
        if not own <= bound:
            return f"result {index}: error {own:.2g}, above {bound:.2g} (eager: {theirs:.2g})"
    return None


def _least_size(truth: Sequence[Tensor | None]) -> float:
    return CANCELLED * max(torch.linalg.vector_norm(t).item() for t in truth if t is not None)


def _error(truth: Tensor, found: Tensor, least_size: float) -> float:
    """Size of the difference, relative to that of the truth."""
    error = torch.linalg.vector_norm(truth - found.to(truth.dtype)).item()
    return error / max(torch.linalg.vector_norm(truth).item(), least_size) if error else 0.0


class Raised(TorchFunctionMode):
    """Raises every floating-point dtype that code names to double precision."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        args, kwargs = pytree.tree_map_only(torch.dtype, _raised, (args, kwargs or {}))
        return func(*args, **kwargs)


def _raised(dtype: torch.dtype) -> torch.dtype:
    return RAISED.get(dtype, dtype)


def _raise(value: Tensor) -> Tensor:
    return value.to(_raised(value.dtype))
