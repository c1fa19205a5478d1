"""Triton provider of `fxopt::qk_norm_rope`: one launch forward; one and a sum backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels import triton_qk_norm_rope_kernels as kernels
from fxopt.kernels import triton_tables
from fxopt.kernels.qk_norm_rope import outputs, outputs_backward
from fxopt.kernels.qk_norm_rope_arguments import (
    NUM_ARGUMENTS,
    Arguments,
    Section,
    rotary_dim,
    rotated_rows,
    split_backward_arguments,
)
from fxopt.kernels.qk_norm_rope_providers import seen_of, split_codes
from fxopt.kernels.triton_add_up import add_up
from fxopt.kernels.triton_qk_norm_rope_kernels import Config, Gradients, Inputs
from fxopt.kernels.triton_sizes import LAST, unspecialized

MATH = {torch.float32: tl.float32, torch.float64: tl.float64}


def forward(*args: Any) -> list[Tensor]:
    """`fxopt::qk_norm_rope` in one launch."""
    a, rooms = Arguments(*args[:NUM_ARGUMENTS]), args[NUM_ARGUMENTS:]
    outs, mean, rstd = outputs(a)
    num_rows, num_tokens = _sizes(a)
    chosen = _parameters("qk_norm_rope forward", a, num_rows)
    plans = [_plan(a, s, chosen) for s in a.sections]
    num_programs = sum(n * p.num_blocks for n, p in zip(num_rows, plans, strict=True))
    if num_programs:
        with torch.cuda.device_of(a.x[0]):
            kernels.forward[(num_programs,)](
                _inputs(a, outs, *rooms),
                tuple(p.config for p in plans),
                mean,
                rstd,
                _unspecialized(num_rows),
                _unspecialized(num_tokens),
                NUM_SECTIONS=len(plans),
                num_warps=max(p.num_warps for p in plans),
            )
    return [*outs, mean, rstd]


def backward(grads: Sequence[Tensor], *args: Any) -> list[Tensor]:
    """`fxopt::qk_norm_rope_backward` in one launch, and one that adds up partial sums."""
    seen = seen_of(args)
    args, codes, scales = split_codes(args)
    a, mean, rstd, needs = split_backward_arguments(args)
    num_rows, num_tokens = _sizes(a)
    chosen = _parameters("qk_norm_rope backward", a, num_rows)
    plans = [_plan(a, s, chosen) for s in a.sections]
    # The norm and its sums double the registers of a tile: half as many elements per thread.
    num_warps = min(16, (1 if a.norm == "none" else 2) * max(p.num_warps for p in plans))
    num_resident = _num_resident(a.x[0].device, max(1, chosen["warps"] // num_warps))
    num_walkers = _share_out(num_resident, num_rows, plans)
    found = outputs_backward(a, needs)
    num_sections, sections = len(plans), range(len(plans))
    targets = list(found)
    outs, partials = [], []
    for i in range(num_sections, len(found)):
        if (t := found[i]) is not None:
            plan = plans[i % num_sections]
            # The heads of a token share a weight and a bias; x_bias has its own part for each.
            per_walker = 1 if i < 2 * num_sections else plan.num_blocks
            num_partials = num_walkers[i % num_sections] * per_walker
            targets[i] = partial = t.new_empty((num_partials, *t.shape), dtype=a.math)
            outs.append(t)
            partials.append(partial)
    num_programs = sum(n * p.num_blocks for n, p in zip(num_walkers, plans, strict=True))
    with torch.cuda.device_of(a.x[0]):
        kernels.backward[(num_programs,)](
            _inputs(a, grads, codes, scales),
            tuple(Gradients._make((*targets[i::num_sections], seen[i], LAST)) for i in sections),
            tuple(p.config for p in plans),
            mean,
            rstd,
            _unspecialized(num_rows),
            _unspecialized(num_tokens),
            _unspecialized(num_walkers),
            NUM_SECTIONS=num_sections,
            num_warps=num_warps,
        )
    add_up(outs, partials)
    return [a.x[0].new_empty(0) if t is None else t for t in found]


class Plan(NamedTuple):
    """What is compiled for a section, and its programs along the heads."""

    config: Config
    num_blocks: int
    num_warps: int


def _parameters(kernel: str, a: Arguments, num_rows: Sequence[int]) -> Mapping[str, int]:
    num_features = max(x.shape[2] * x.shape[3] for x in a.x)
    return triton_tables.parameters(kernel, num_features, sum(num_rows), a.x[0])


def _plan(a: Arguments, s: Section, chosen: Mapping[str, int]) -> Plan:
    num_heads, dim = s.x_BSHd.shape[2:]
    if dim % 2:
        raise ValueError(f"qk_norm_rope works on pairs, but the head dim is {dim}: pad it to even")
    pairs = triton.next_power_of_2(dim // 2)
    heads = triton.next_power_of_2(num_heads)
    if not a.across_heads:
        # The fewest padded heads, then the fewest programs: 24 heads of 128 are 3 blocks of 8.
        sizes = [1 << i for i in range(heads.bit_length()) if (2 * pairs << i) <= chosen["tile"]]
        heads = min(sizes, key=lambda size: (-(-num_heads // size) * size, -size))
    num_blocks = triton.cdiv(num_heads, heads)
    tables = s.tables if a.rotation != "none" else None
    per_head = tables is not None and any(t.dim() > 1 and t.shape[-2] > 1 for t in tables)
    compiled = (
        *(num_heads, dim, 1 if a.across_heads else num_heads, num_blocks, heads, pairs),
        *(a.norm, a.across_heads, a.rotation != "half", a.weight_offset, MATH[a.math]),
        *(s.eps, rotary_dim(a, s) or dim, a.tables, per_head, a.rotated != "all"),
    )
    num_warps = max(1, min(16, 2 * heads * pairs // (chosen["elements_per_thread"] * 32)))
    return Plan(Config(*map(tl.constexpr, compiled)), num_blocks, num_warps)


def _inputs(
    a: Arguments,
    ys: Sequence[Tensor],
    codes: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
) -> tuple[Inputs, ...]:
    absent = [None] * len(a.x)
    each = zip(a.sections, codes or absent, scales or absent, strict=True)
    return tuple(_section_inputs(a, s, ys[s.output][:, s.rows], *own) for s, *own in each)


def _section_inputs(
    a: Arguments, s: Section, y: Tensor, codes: Tensor | None, scales: Tensor | None
) -> Inputs:
    x = s.x_BSHd
    parameters = (None if t is None else t.contiguous() for t in s[1:4])
    tables: list[Any] = [None] * 5
    if a.rotation != "none" and s.tables is not None:
        rows = rotated_rows(a, s)
        sizes = x.shape[0], rows.stop - rows.start, x.shape[2]
        cos, sin = (t.expand(*sizes, t.shape[-1]) for t in s.tables)
        rotated = None if a.rotated == "all" else _unspecialized((rows.start, rows.stop))
        tables = [cos, cos.stride(), sin, sin.stride(), rotated]
    codes = None if codes is None else codes.view(torch.uint8)
    given = x, x.stride(), codes, scales, *parameters, *tables, y, y.stride(), LAST
    return Inputs._make(given)


def _unspecialized(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(unspecialized, sizes))


def _sizes(a: Arguments) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows (tokens of all samples) and tokens of each section."""
    num_tokens = tuple(x.shape[1] for x in a.x)
    return tuple(x.shape[0] * x.shape[1] for x in a.x), num_tokens


def _share_out(num_programs: int, num_rows: tuple[int, ...], plans: list[Plan]) -> tuple[int, ...]:
    """How many programs walk over the rows of each section, for every block of its heads."""
    work = sum(n * plan.num_blocks for n, plan in zip(num_rows, plans, strict=True))
    return tuple(max(1, num_programs * n // max(work, num_programs)) for n in num_rows)


def _num_resident(device: torch.device, programs_per_sm: int) -> int:
    """Programs of the backward that run at once; independent of the number of tokens."""
    if device.type != "cuda":
        return 4
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return num_sms * programs_per_sm
