"""Triton provider of `fxopt::gated_activation`: one launch forward; one, and a sum, backward.

A launch serves one or more streams (text and image, say). Rows of a half of a packed projection are
read and written where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_tables
from fxopt.kernels.triton_add_up import add_up
from fxopt.kernels.triton_gated_activation_kernels import (
    Backward,
    Features,
    Forward,
    Rows,
    backward_kernel,
    forward_kernel,
)
from fxopt.kernels.triton_sizes import LAST, unspecialized

Stream = tuple[Tensor | None, ...]


def forward(streams: Sequence[Stream], activation: str) -> None:
    """Write `y = act(gate) * up` of each stream.

    A stream is (gate, up, gate_bias, up_bias, y): [..., F], y contiguous, biases [F].
    """
    plan = _plan("forward", [s[0] for s in streams])
    if plan is None:
        return
    given = [
        Forward._make(
            (*map(rows_of, (gate, up)), *map(_features_of, biases), rows_of(y), size, LAST)
        )
        for (gate, up, *biases, y), size in zip(streams, plan.sizes, strict=True)
    ]
    _launch(forward_kernel, plan, tuple(given), activation)


def backward(streams: Sequence[Stream], activation: str) -> None:
    """Write the gradients of gate and up, y unless it is None, and those of biases, of each stream.

    A stream is (grad, gate, up, gate_bias, up_bias, dgate, dup, y, dgate_bias, dup_bias). All but
    what is of biases, [F], are [..., F]. Outputs have evenly strided rows: they are contiguous or
    halves of a contiguous tensor.
    """
    sums = [t for s in streams for t in s[8:] if t is not None]
    which = "backward with sums" if sums else "backward"
    plan = _plan(which, [s[0] for s in streams])
    if plan is None:
        for t in sums:
            t.zero_()
        return
    partials: list[Tensor] = []

    def partial_of(sum_F: Tensor | None, num_programs: int) -> Rows | None:
        if sum_F is None:
            return None
        dtype = torch.float64 if sum_F.dtype == torch.float64 else torch.float32
        partials.append(sum_F.new_empty(num_programs, *sum_F.shape, dtype=dtype))
        return rows_of(partials[-1])

    given = []
    for stream, size, count in zip(streams, plan.sizes, plan.counts, strict=True):
        (grad, gate, up, *biases, dgate, dup, y), own_sums = stream[:8], stream[8:]
        inputs = *map(rows_of, (grad, gate, up)), *map(_features_of, biases)
        outputs = *map(rows_of, (dgate, dup, y)), *(partial_of(t, count) for t in own_sums)
        given.append(Backward._make((*inputs, *outputs, size, LAST)))
    _launch(backward_kernel, plan, tuple(given), activation, TILES=plan.tiles)
    add_up(sums, partials)


class Plan(NamedTuple):
    """Of a launch: number of rows `unspecialized` and of programs along them, of each stream."""

    like: Tensor
    sizes: list[int]
    counts: list[int]
    tiles: int
    settings: dict[str, int]


def _plan(which: str, tensors: Sequence[Tensor | None]) -> Plan | None:
    """How to launch a kernel on streams of these tensors; None where there is nothing to do."""
    firsts = [t for t in tensors if t is not None]
    like, num_features = firsts[0], firsts[0].shape[-1]
    if not any(t.numel() for t in firsts):
        return None
    num_rows = [t.numel() // num_features for t in firsts]
    chosen = triton_tables.parameters(
        f"gated_activation {which}", num_features, sum(num_rows), like
    )
    block_f = min(triton.next_power_of_2(num_features), chosen["columns"])
    block_n, tiles = chosen["tile"] // block_f, chosen.get("tiles", 1)
    counts = [triton.cdiv(n, block_n * tiles) for n in num_rows]
    settings = {"BLOCK_N": block_n, "BLOCK_F": block_f, "num_warps": chosen["num_warps"]}
    return Plan(like, list(map(unspecialized, num_rows)), counts, tiles, settings)


def _launch(
    kernel: Any, plan: Plan, streams: tuple[Any, ...], activation: str, **more: int
) -> None:
    num_features = plan.like.shape[-1]
    grid = sum(plan.counts), triton.cdiv(num_features, plan.settings["BLOCK_F"])
    math_type = tl.float64 if plan.like.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(plan.like):
        kernel[grid](
            streams, num_features, NUM_STREAMS=len(streams), ACTIVATION=activation,
            MATH=math_type, **plan.settings, **more,
        )  # fmt: skip


def _features_of(bias: Tensor | None) -> Features | None:
    return None if bias is None else Features(bias.contiguous(), len(bias))


def rows_of(x: Tensor | None) -> Rows | None:
    """View a tensor [..., F] as `Rows`."""
    if x is None:
        return None
    x_NF = x.reshape(-1, x.shape[-1])
    return Rows(x_NF, *x_NF.stride())
