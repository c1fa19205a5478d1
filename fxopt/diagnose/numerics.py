"""Does the candidate compute what the baseline computes: values and gradients, in numbers.

Both run from the same state and seed. Memory that a step allocates without writing it holds NaN,
and so does every result of an earlier call, so what was not computed now cannot pass. The second
check, after timing, gives parameters and inputs other values: a stored result would not follow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from fxopt.diagnose.errors import NotAStep, StepsDiffer
from fxopt.diagnose.subjects import Make, Subject, kept_state, refresh, take_values
from fxopt.diagnose.truth import in_float64

# Against float64: error over the baseline's own error.
FACTOR = 2.0
# Against the baseline: roundings of the coarsest dtype, and a floor for fp32, whose sums of some
# thousand terms lose more than a rounding. Gradients pass through twice the ops and sum over rows.
ROUNDINGS, FLOOR, OF_GRADIENTS = 8.0, 1e-4, 4.0

# Of the values, for what misses its bound against float64.
NUM_DRAWS = 4

Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Difference:
    """How far one tensor of the candidate is off.

    Args:
        name: "output ..." or "gradient of ...".
        error: relative L2 distance from the truth, or from the baseline where there is none; None
            if it is not finite, here and below.
        bound: largest error that passes.
        own: the baseline's error, where it is judged against float64.
        cosine: of the angle to the baseline's tensor.
        bias: mean of the signed difference over the baseline's root mean square; a bias adds up
            over steps where noise averages out.
    """

    name: str
    error: float | None
    bound: float | None
    cosine: float | None
    bias: float | None
    own: float | None = None

    @property
    def severity(self) -> float:
        """Error over bound: what is above 1 fails."""
        if self.error is None or self.bound is None:
            return math.inf
        return self.error / self.bound if self.bound else (math.inf if self.error else 0.0)


# By name; in words if only one side gave the tensor, None if neither did.
Differences = dict[str, "Difference | str | None"]


@dataclass(frozen=True)
class Check:
    """The comparison at one time.

    Args:
        when: "before" or "after" timing.
        against: "baseline" or "float64".
        num_outputs, num_gradients: tensors compared.
        failures: in words; empty if it passes.
        worst: the differences nearest to their bound or past it.
    """

    when: str
    against: str
    num_outputs: int
    num_gradients: int
    failures: tuple[str, ...]
    worst: tuple[Difference, ...]


def observe(subject: Subject, seed: int) -> Tensors:
    """Call the step once; its outputs and gradients by name, copied. What it returned turns to NaN.

    Raises:
        NotAStep: if it returns no tensor and leaves no gradient.
    """
    leaves = subject.leaves()
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(seed)
    result = subject()
    found: Tensors = {}
    for path, leaf in tree_flatten_with_path(result)[0]:
        if isinstance(leaf, (Tensor, float)):
            key = "".join(map(str, path)) or "0"
            found[f"output {key}"] = _comparable(torch.as_tensor(leaf))
    if not found and all(leaf.grad is None for leaf in leaves.values()):
        raise NotAStep(
            subject.name,
            f"its step returned {type(result).__name__} and left no gradient, so nothing "
            "can be compared",
        )
    for name, leaf in leaves.items():
        found[name] = None if leaf.grad is None else _comparable(leaf.grad)
        leaf.grad = None
    _spoil(result, subject)
    return found


def _comparable(tensor: Tensor) -> Tensor:
    """A real floating-point copy."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.clone() if tensor.is_floating_point() else tensor.double()


def _spoil(result: Any, subject: Subject) -> None:
    """Overwrite what a call returned, except for memory that is the subject's own state."""
    own = {t.untyped_storage()._cdata for t in subject.state()}
    with torch.no_grad():
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and tensor.is_floating_point()
                and tensor.untyped_storage()._cdata not in own
            ):
                with contextlib.suppress(RuntimeError):  # an expanded result cannot be written
                    tensor.detach().fill_(math.nan)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, `torch.empty` gives NaN instead of whatever the memory held."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warning)


def check(
    when: str,
    baseline: Subject,
    candidate: Subject,
    truth: Make | None,
    seed: int,
    tolerance: float | None = None,
) -> Check:
    """Compare one call of each; against float64, a few where one does not settle it.

    The error of a small tensor on one input is a single throw of the dice: what misses its bound is
    judged by the root mean square of its errors over `NUM_DRAWS` draws of the values.

    Args:
        when: "before" leaves all values and poisons allocations; "after" refreshes the values and
            leaves allocations alone, as that mode makes compilers compile anew.
        truth: builds a subject whose model and inputs are then cast to float64; None compares with
            the baseline.
        tolerance: largest relative L2 error of outputs, in place of the default; gradients get
            `OF_GRADIENTS` times that. Not used with a truth.

    Raises:
        StepsDiffer: if the two do not return tensors of the same names and shapes.
    """
    exact = in_float64(truth) if truth is not None else None

    def draw(number: int) -> Differences:
        poison = poisoned_allocations() if when == "before" else contextlib.nullcontext()
        with kept_state(baseline, candidate), poison:
            if when == "after" or number:
                refresh(baseline, seed + 1 + number)
                refresh(candidate, seed + 1 + number)
            if exact is not None:
                take_values(exact, baseline)
            # The baseline speaks first: its mistakes are not the candidate's.
            expected, found = observe(baseline, seed), observe(candidate, seed)
            return compare_all(
                expected, found, observe(exact, seed) if exact is not None else None, tolerance
            )

    found = draw(0)
    if exact is not None and any(
        d.severity > 1 for d in found.values() if isinstance(d, Difference)
    ):
        draws = [found, *(draw(number) for number in range(1, NUM_DRAWS))]
        found = {name: _pooled([each[name] for each in draws]) for name in found}
    return as_check(when, "baseline" if exact is None else "float64", found)


def compare_all(
    expected: Tensors, found: Tensors, truth: Tensors | None, tolerance: float | None
) -> Differences:
    """What two steps gave, tensor by tensor; in words where only one of them gave something."""
    _require_same_form(expected, found)
    scales = {kind: _largest(kind, expected) for kind in ("output", "gradient")}
    differences: Differences = {}
    for name, wanted in expected.items():
        got = found[name]
        if wanted is not None and got is not None:
            exact = truth[name] if truth is not None else None
            scale = scales[name.split()[0]]
            differences[name] = compare(name, wanted, got, exact, scale, tolerance)
        elif wanted is not got:
            absent, present = ("baseline", "candidate")[:: 1 if wanted is None else -1]
            differences[name] = f"{name}: the {absent} leaves none, the {present} does"
        else:
            differences[name] = None
    return differences


def _pooled(draws: Sequence[Difference | str | None]) -> Difference | str | None:
    """One tensor's difference over several draws."""
    found = [d for d in draws if isinstance(d, Difference)]
    if len(found) < len(draws) or any(d.error is None or d.own is None for d in found):
        return next((d for d in draws if isinstance(d, str)), draws[0])
    error, own = (
        math.sqrt(statistics.fmean((getattr(d, part) or 0.0) ** 2 for d in found))
        for part in ("error", "own")
    )
    roundoff = (found[0].bound or 0.0) - FACTOR * (found[0].own or 0.0)
    return dataclasses.replace(found[0], error=error, own=own, bound=FACTOR * own + roundoff)


def as_check(when: str, against: str, found: Differences) -> Check:
    """The differences of all tensors as one check."""
    failures = [d for d in found.values() if isinstance(d, str)]
    differences = [d for d in found.values() if isinstance(d, Difference)]
    for difference in differences:
        if difference.severity > 1:
            error = "not finite" if difference.error is None else f"{difference.error:.2e}"
            failures.append(
                f"{difference.name}: relative error {error}, bound {difference.bound:.2e}"
            )
    num_gradients = sum(name.startswith("gradient") for name in found)
    worst = sorted(differences, key=lambda d: -d.severity)[:5]
    return Check(
        when, against, len(found) - num_gradients, num_gradients, tuple(failures), tuple(worst)
    )


def _require_same_form(expected: Tensors, found: Tensors) -> None:
    for name in [*expected, *found]:
        if name not in expected or name not in found:
            raise StepsDiffer(
                name, *("present" if name in t else "absent" for t in (expected, found))
            )
        one, other = expected[name], found[name]
        if one is not None and other is not None and one.shape != other.shape:
            raise StepsDiffer(name, str(list(one.shape)), str(list(other.shape)))


def _largest(kind: str, tensors: Tensors) -> float:
    """Largest root mean square of the tensors of a kind, "output" or "gradient"."""
    same = [t for name, t in tensors.items() if t is not None and name.startswith(kind)]
    return max(map(_rms, same), default=0.0)


def compare(
    name: str,
    wanted: Tensor,
    got: Tensor,
    exact: Tensor | None,
    scale: float,
    tolerance: float | None = None,
) -> Difference:
    """One tensor's difference and the bound that it is held to.

    A tensor much smaller than `scale` (below the root of the roundoff) is compared relative to that
    share of it: the gradient of a key's bias, for one, is zero but for rounding.
    """
    roundoff = max(torch.finfo(t.dtype).eps / 2 for t in (wanted, got))
    reference = wanted.double() if exact is None else exact.double()
    size = max(_rms(reference), math.sqrt(roundoff) * scale)
    delta = got.double() - wanted.double()

    def error(tensor: Tensor) -> float:
        return _over(_rms(tensor.double() - reference), size)

    own = error(wanted) if exact is not None else None
    if own is not None:
        bound = FACTOR * own + roundoff
    else:
        bound = tolerance if tolerance is not None else max(ROUNDINGS * roundoff, FLOOR)
        bound *= OF_GRADIENTS if name.startswith("gradient") else 1
    a, b = wanted.double().flatten(), got.double().flatten()
    return Difference(
        name=name,
        error=_finite(error(got)),
        bound=_finite(bound),
        cosine=_finite(_over(float(a @ b), float(a.norm() * b.norm()), 1.0)),
        bias=_finite(_over(float(delta.mean()) if delta.numel() else 0.0, _rms(wanted))),
        own=None if own is None else _finite(own),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def _over(value: float, size: float, otherwise: float = 0.0) -> float:
    """value / size; 0 / 0 is `otherwise`, and any other value over 0 infinite."""
    if size == 0:
        return otherwise if value == 0 else math.copysign(math.inf, value)
    return value / size
