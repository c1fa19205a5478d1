"""Judging a rewrite by its distance from the float64 truth, next to eager's own distance."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxopt.diagnose.truth import Float64Islands
from tests.families import outputs, project

Tensors = Mapping[str, Tensor | None]


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


def assert_as_accurate(
    actual: Tensor | Tensors,
    eager: Tensor | Tensors,
    truth: Tensor | Tensors,
    factor: float = 2.0,
    what: str = "result",
) -> None:
    """Assert that `actual` is at most `factor` times as far from `truth` as `eager` is.

    Judged per tensor, in relative L2 error and in the largest error over the largest value, each
    with a floor of one unit roundoff of the dtype: the last rounding alone costs that much, so an
    eager result that is exact by luck must not fail a correct one.

    Args:
        actual, eager, truth: one tensor each, or mappings with the same keys, such as `run` gives.
        what: named in the failure message.
    """
    if isinstance(actual, Tensor):
        actual, eager, truth = {what: actual}, {what: eager}, {what: truth}
    assert actual.keys() == eager.keys() == truth.keys(), f"{what}: different tensors"
    failures = [
        f"  {name}: {failure}"
        for name in actual
        if (failure := inaccuracy(actual[name], eager[name], truth[name], factor))
    ]
    assert not failures, "\n".join([f"{what}: {len(failures)} of {len(actual)} tensors", *failures])


def inaccuracy(
    actual: Tensor | None, eager: Tensor | None, truth: Tensor | None, factor: float
) -> str | None:
    """What is wrong with `actual`, or None."""
    if actual is None or eager is None or truth is None:
        same = actual is None and eager is None and truth is None
        return None if same else f"None in {[actual is None, eager is None, truth is None]}"
    if (actual.dtype, actual.shape) != (eager.dtype, eager.shape):
        return f"{actual.dtype} {list(actual.shape)}, not {eager.dtype} {list(eager.shape)}"
    roundoff = torch.finfo(actual.dtype).eps / 2
    # An allowance, not a measurement: the largest of few errors is a single draw. The L2 error,
    # over all elements, is held to `factor` itself.
    for metric, error, scatter in (("L2", relative_l2, 1.0), ("max", relative_max, 2.0)):
        ours, theirs = error(actual, truth), error(eager, truth)
        bound = scatter * (factor * theirs + roundoff)
        if not ours <= bound:
            return f"{metric} error {ours:.2e} > {bound:.2e} (eager {theirs:.2e})"
    return None


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
