"""Judging a rewrite by its distance from the float64 truth, next to eager's own distance."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.diagnose.truth import Float64Islands
from tests.families import outputs, project

Tensors = Mapping[str, Tensor | None]
Draw = tuple[Tensors, Tensors, Tensors]

FACTOR = 2.0
# The ratio of two errors is known about three times better from eight draws than from one. Where
# gradients cancel, one draw in thirty can be ten times as far off as the others, in either result.
NUM_DRAWS = (8, 32)


def run(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Tensors:
    """Run forward and backward; return `output i` and, by parameter name, `gradient of ...`.

    Args:
        dtype: what the model (in place) and its floating-point inputs are cast to; None casts
            neither. A parameter that the loss does not reach has None for its gradient.
    """
    if dtype is not None:
        model, inputs = model.to(dtype), cast(inputs, dtype)
    model.zero_grad(set_to_none=True)
    results = outputs(model, inputs)
    project(results).backward()
    named: dict[str, Tensor | None] = {
        f"output {index}": result.detach() for index, result in enumerate(results)
    }
    for name, parameter in model.named_parameters():
        named[f"gradient of {name}"] = parameter.grad
    model.zero_grad(set_to_none=True)
    return named


def truth(model: nn.Module, inputs: dict[str, Any]) -> Tensors:
    """`run` on a float64 copy of the model as it is, with its fp32 islands in float64 as well."""
    with Float64Islands():
        named = run(copy.deepcopy(model), inputs, torch.float64)
    for what, tensor in named.items():
        assert tensor is None or tensor.dtype == torch.float64, f"{what} left float64"
    return named


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Cast every floating-point tensor in a nest of containers."""
    return tree_map(
        lambda leaf: (
            leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        inputs,
    )


class Judge:
    """What a model gives before it is changed, and the float64 truth about it.

    A call asserts that the changed model is as accurate. Where the first inputs do not settle it,
    more are drawn: the error of one small tensor on one input is a single throw of the dice.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.own, self.inputs = copy.deepcopy(model), inputs
        self.eager, self.exact = run(self.own, inputs), truth(self.own, inputs)

    def __call__(
        self, model: nn.Module, what: str = "result", found: Tensors | None = None
    ) -> None:
        """Judge `model`; `found` is what it gave on the first inputs, if it was run already."""

        def again(seed: int) -> Draw:
            inputs = redrawn(self.inputs, seed)
            return run(model, inputs), run(self.own, inputs), truth(self.own, inputs)

        found = run(model, self.inputs) if found is None else found
        assert_as_accurate(found, self.eager, self.exact, what=what, again=again)


def holds_features(t: Tensor) -> bool:
    """Whether `t` may hold a feature per token."""
    return t.is_floating_point() and t.dim() >= 3


def holds_tokens(t: Tensor) -> bool:
    """Whether `t` may hold a number per token."""
    return t.dtype == torch.int64 and t.dim() == 2


def redrawn(inputs: Any, seed: int, changes: Callable[[Tensor], bool] = holds_features) -> Any:
    """Other inputs of the same sizes: random signs on the tensors that `changes` picks, or, if it
    picks none, as of a language model, the tokens in another order."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]

    def flip(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not changes(leaf):
            return leaf
        signs = 2 * torch.randint(0, 2, leaf.shape, generator=generator) - 1
        return (leaf.detach() * signs.to(leaf)).requires_grad_(leaf.requires_grad)

    def reorder(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not holds_tokens(leaf):
            return leaf
        order = torch.randperm(leaf.shape[1], generator=torch.Generator().manual_seed(seed))
        return leaf[:, order.to(leaf.device)]  # the same for all: a mask goes with its tokens

    assert any(changes(t) or holds_tokens(t) for t in tensors), "no other inputs can be drawn"
    return tree_map(flip if any(map(changes, tensors)) else reorder, inputs)


def assert_as_accurate(
    actual: Tensor | Tensors,
    eager: Tensor | Tensors,
    truth: Tensor | Tensors,
    what: str = "result",
    again: Callable[[int], Draw] | None = None,
) -> None:
    """Assert that `actual` is at most FACTOR times as far from `truth` as `eager` is.

    Judged per tensor, in relative L2 error and in the largest error over the largest value, each
    with a floor of one unit roundoff of the dtype: the last rounding alone costs that much, so an
    eager result that is exact by luck must not fail a correct one.

    Args:
        actual, eager, truth: one tensor each, or mappings with the same keys, such as `run` gives.
        what: named in the failure message.
        again: gives another draw of the three by its number. Tensors that miss the bound on the
            first are judged by the root mean square of their errors on the first of NUM_DRAWS, and
            those that miss it there on the second.
    """
    if isinstance(actual, Tensor):
        actual, eager, truth = {what: actual}, {what: eager}, {what: truth}
    assert actual.keys() == eager.keys() == truth.keys(), f"{what}: different tensors"
    draws: list[Draw] = [(actual, eager, truth)]
    failures = _failures(draws, actual)
    for num_draws in NUM_DRAWS if again is not None else ():
        if failures:
            draws += [again(number) for number in range(len(draws), num_draws)]
            failures = _failures(draws, failures)
    lines = [f"  {name}: {failure}" for name, failure in failures.items()]
    assert not failures, "\n".join([f"{what}: {len(lines)} of {len(actual)} tensors", *lines])


def _failures(draws: Sequence[Draw], names: Iterable[str]) -> dict[str, str]:
    found = {name: inaccuracy([tuple(t[name] for t in draw) for draw in draws]) for name in names}
    return {name: failure for name, failure in found.items() if failure}


def inaccuracy(draws: Sequence[tuple[Tensor | None, ...]]) -> str | None:
    """What is wrong with a tensor, given as (actual, eager, truth) for each draw; or None."""
    actual, eager, _ = draws[0]
    if any(t is None for draw in draws for t in draw):
        same = all(t is None for draw in draws for t in draw)
        return None if same else f"None in {[t is None for t in draws[0]]}"
    if (actual.dtype, actual.shape) != (eager.dtype, eager.shape):
        return f"{actual.dtype} {list(actual.shape)}, not {eager.dtype} {list(eager.shape)}"
    roundoff = torch.finfo(actual.dtype).eps / 2
    for metric, error in (("L2", relative_l2), ("max", relative_max)):
        ours = root_mean_square([error(actual, truth) for actual, _, truth in draws])
        theirs = root_mean_square([error(eager, truth) for _, eager, truth in draws])
        bound = FACTOR * theirs + roundoff
        if not ours <= bound:
            return (
                f"{metric} error {ours:.2e} > {bound:.2e} (eager {theirs:.2e}, {len(draws)} draws)"
            )
    return None


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def relative_l2(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||; 0 / 0 is 0."""
    return ratio((actual.double() - truth).norm(), truth.double().norm())


def relative_max(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth| / max |truth|; 0 / 0 is 0."""
    return ratio((actual.double() - truth).abs().max(), truth.double().abs().max())


def ratio(error: Tensor, size: Tensor) -> float:
    if size.item() == 0:
        return 0.0 if error.item() == 0 else math.inf
    return (error / size).item()
