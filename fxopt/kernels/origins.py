"""Which parameter a weight is, or is a cast of: histories and telemetry are kept by parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ATTRIBUTE = "_fxopt_origin"


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`, of which `leaf_of` knows the origin also where autograd notes none: of a
    frozen parameter, and without gradients."""
    made = weight.to(dtype)
    if made is not weight:
        setattr(made, ATTRIBUTE, weight)
    return made


def uncast(weight: Tensor) -> Tensor:
    """What `cast` made a weight of; else the weight."""
    found: Tensor = getattr(weight, ATTRIBUTE, weight)
    return found


def leaf_of(weight: Tensor) -> Tensor:
    """What a weight was cast from, by autocast or by `cast`; else the weight."""
    node: Any = weight.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    found = getattr(node, "variable", None)
    return uncast(weight) if found is None else found
