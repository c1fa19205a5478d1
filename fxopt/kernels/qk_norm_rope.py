"""`fxopt::qk_norm_rope`: norm the query and key heads, rotate them, write one joint buffer of each.

Shape suffixes: B batch, S tokens of a section, H heads, d head dim, r rotated channels of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.kernels import magnitudes, rotary
from fxopt.kernels import qk_norm_rope_providers as providers
from fxopt.kernels.linears import without_autocast
from fxopt.kernels.qk_norm_rope_arguments import (
    NUM_ARGUMENTS,
    Arguments,
    grouped,
    math_tables,
    num_groups_of,
    rotated_rows,
    split_backward_arguments,
)
from fxopt.kernels.qk_norm_rope_providers import (
    forward_launches,
    has_whole_blocks,
    split_codes,
)
from fxopt.kernels.registration import (
    below_autograd,
    call_form,
    register,
)
from fxopt.kernels.saving import kept_in, packed, read_codes, room_for
from fxopt.kernels.sharding import of_section_gradients, of_sections, sections
from fxopt.kernels.stacks import empty_stacks
from fxopt.kernels.together import run


def reference(*args: Any) -> list[Tensor]:
    """Norm each section of the queries and keys, rotate it, and join those of each along tokens.

        n = norm(x + x_bias) * (weight_offset + weight) + bias
        interleaved: out[2i] = n[2i] cos[2i] - n[2i+1] sin[2i]
                     out[2i+1] = n[2i+1] cos[2i+1] + n[2i] sin[2i+1]
        half:        the same with the pairs (i, i + r/2) in place of (2i, 2i+1)
        matrices:    out[2i] = n[2i] cos[2i] + n[2i+1] sin[2i]
                     out[2i+1] = n[2i] cos[2i+1] + n[2i+1] sin[2i+1], or its like by halves

    Args: those of `Arguments`.

    Returns:
        One [B, sum of S, H, d] per entry of `joined`.

    Raises:
        ValueError: tables rotate no whole pairs, or more than a head or the section's tokens.

    Numerics: fp32 throughout (fp64 if x or the output is fp64) and one cast to `dtype`.
    """
    a = Arguments(*args)
    parts: list[list[Tensor]] = [[] for _ in a.joined]
    for s in a.sections:
        n = s.x_BSHd.to(a.math)
        if s.x_bias is not None:
            n = n + s.x_bias.to(a.math).view(n.shape[2:])
        n = grouped(n, a.across_heads)
        if a.norm == "layer":
            n = torch.layer_norm(n, n.shape[-1:], eps=s.eps)
        elif a.norm == "rms":
            n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + s.eps)
        if s.weight is not None:
            n = n * (a.weight_offset + s.weight.to(a.math))
        if s.bias is not None:
            n = n + s.bias.to(a.math)
        n = n.view(s.x_BSHd.shape)
        if a.rotation != "none" and s.tables is not None:
            tables = rotary.signed(*math_tables(a, s), a.rotation, a.tables)
            n = _rotated(n, tables, a, rotated_rows(a, s))
        parts[s.output].append(n)
    return [torch.cat(part, 1).to(a.dtype) for part in parts]


def _rotated(n_BSHd: Tensor, tables: tuple[Tensor, Tensor], a: Arguments, rows: slice) -> Tensor:
    """All tokens, of which `rows` are rotated."""
    if a.rotated == "all":
        return rotary.rotate(n_BSHd, *tables, a.rotation)
    rotated = rotary.rotate(n_BSHd[:, rows], *tables, a.rotation)
    return torch.cat((n_BSHd[:, : rows.start], rotated, n_BSHd[:, rows.stop :]), 1)


def outputs(a: Arguments) -> tuple[list[Tensor], Tensor, Tensor]:
    """Uninitialised (outs, mean, rstd); the statistics of the sections follow one another."""
    firsts = [a.x[sum(a.joined[:i])] for i in range(len(a.joined))]
    outs = [
        x.new_empty((x.shape[0], sum(lengths), *x.shape[2:]), dtype=a.dtype)
        for x, lengths in zip(firsts, a.lengths, strict=True)
    ]
    num_groups, math = sum(num_groups_of(a, x) for x in a.x), a.math
    mean = a.x[0].new_empty(num_groups if a.norm == "layer" else 0, dtype=math)
    rstd = a.x[0].new_empty(num_groups if a.norm != "none" else 0, dtype=math)
    return outs, mean, rstd


def _fake(*args: Any) -> list[Tensor]:
    outs, mean, rstd = outputs(Arguments(*args[:NUM_ARGUMENTS]))
    return [*outs, mean, rstd]


def outputs_backward(a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients, None where not needed; those of x are stacks (`kernels.stacks`)."""
    wanted = [t if need else None for t, need in zip(a.differentiable, needs, strict=True)]
    others = wanted[len(a.x) :]
    return [
        *empty_stacks(wanted[: len(a.x)]),
        *(None if t is None else t.new_empty(t.shape) for t in others),
    ]


def _fake_backward(grads: Sequence[Tensor], *args: Any) -> list[Tensor]:
    a, _, _, needs = split_backward_arguments(split_codes(args)[0])
    return [a.x[0].new_empty(0) if g is None else g for g in outputs_backward(a, needs)]


def _launches_backward(grads: Sequence[Tensor], *args: Any) -> int:
    """One pass over the rows, and one over the partial sums if a parameter needs its gradient."""
    a, _, _, needs = split_backward_arguments(args)
    parameters = list(zip(a.differentiable, needs, strict=True))[len(a.x) :]
    return 1 + any(t is not None and need for t, need in parameters)


class QKNormRope(torch.autograd.Function):
    """Autograd of `fxopt::qk_norm_rope`; saves the statistics, and inputs that are normed."""

    @classmethod
    def apply(cls, *args: Any) -> list[Tensor]:
        """Run the op on its own arguments. Raises ValueError if a table requires grad."""
        tensors, settings = args[:6], args[6:]
        # Autograd tracks arguments, not what lists hold.
        found: Any = super().apply(settings, *(t for field in tensors for t in field))
        return list(found)

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        """Run the op on its tensors, field by field."""
        num_sections = len(tensors) // 6
        if any(t is not None and t.requires_grad for t in tensors[4 * num_sections :]):
            raise ValueError(
                "qk_norm_rope gives its cos and sin tables no gradient, but one requires grad: "
                "detach the tables, or keep the unfused ops if they are learned"
            )
        xs, others = tensors[:num_sections], tensors[num_sections:]
        has_weight = any(t is not None for t in tensors[2 * num_sections : 3 * num_sections])
        reads_x = settings[1] != "none" or has_weight
        assert xs[0] is not None
        rooms = room_for(ctx, xs[0], xs if reads_x else (), num_row_dims=2)
        fields = [rooms[::2], rooms[1::2]] if rooms and None not in rooms else []
        given = qk_norm_rope, fields, *_fields(tensors), *settings
        *outs, mean, rstd = below_autograd(call_form, *given)
        ctx.set_materialize_grads(False)
        trains = map(any, zip(*_fields(ctx.needs_input_grad[1:]), strict=True))  # by section
        of_outs = [any([*itertools.islice(trains, num)]) for num in settings[0]]
        constant = (out for out, needed in zip(outs, of_outs, strict=True) if not needed)
        ctx.mark_non_differentiable(*constant, mean, rstd)
        xs = xs if reads_x else tuple(map(_without_values, xs))
        saved = kept_in(rooms, xs) if fields else packed(ctx, xs, num_row_dims=2)
        ctx.save_for_backward(*saved, *others, mean, rstd)
        ctx.settings, ctx.shapes = settings, [out.shape for out in outs]
        return (*outs, mean, rstd)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, x_bias, weight and bias, None where there is none."""
        # Asked for once: a checkpoint computes them when they are.
        kept, dtype = ctx.saved_tensors, ctx.settings[-1]
        is_of_dtype = all(packed == dtype for packed in ctx.packed)
        can_read = is_of_dtype and all(map(has_whole_blocks, kept[: len(ctx.packed)]))
        saved, scales = run(read_codes(ctx, kept, dtype, can_read))
        *tensors, mean, rstd = saved
        num_sections = len(tensors) // 6
        num_differentiable = num_sections * 4
        if all(g is None for g in grads):
            return (None,) * (1 + len(tensors))
        filled = [
            mean.new_zeros(shape, dtype=ctx.settings[-1]) if g is None else g
            for shape, g in zip(ctx.shapes, grads, strict=False)
        ]
        needs = ctx.needs_input_grad[1 : 1 + num_differentiable]
        fields = _fields(tensors)
        given = filled, *fields, mean, rstd, *ctx.settings, needs
        rooms = magnitudes.rooms_for(ctx, range(num_sections), filled[:1] * num_sections)
        further = [*scales] if can_read else None, magnitudes.seen_in_each(rooms, mean)
        computed = call_form(qk_norm_rope_backward, further, *given)
        found = [g if need else None for g, need in zip(computed, needs, strict=True)]
        magnitudes.hand_on(rooms, found)
        return (None, *found, *[None] * (len(tensors) - num_differentiable))


def _without_values(x: Any) -> Tensor:
    """What has x's shape and dtype; a DTensor as it is, whose placements count as well."""
    is_plain = not is_traceable_wrapper_subclass(x)
    found: Tensor = x.new_empty(()).expand(x.shape) if is_plain else x
    return found


def _fields(tensors: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Of (x, x_bias, weight, bias, cos, sin), a list each."""
    num_sections = len(tensors) // 6
    return (tensors[i * num_sections : (i + 1) * num_sections] for i in range(6))


_TENSORS = (
    "Tensor[] x, Tensor?[] x_bias, Tensor?[] weight, Tensor?[] bias, Tensor?[] cos, Tensor?[] sin"
)
_SETTINGS = (
    "int[] joined, str norm, float[] eps, float weight_offset, bool across_heads, str rotation, "
    "str tables, str rotated, ScalarType dtype"
)

# One gradient per x, x_bias, weight and bias, field by field; 0 elements where `needs` is false.
qk_norm_rope_backward = register(
    f"qk_norm_rope_backward(Tensor[] grads, {_TENSORS}, Tensor mean, Tensor rstd, {_SETTINGS}, "
    "bool[] needs) -> Tensor[]",
    native=providers.native_backward,
    fake=_fake_backward,
    triton=providers.triton_backward,
    launches=_launches_backward,
    sharding=sections(of_section_gradients),
    further="Tensor[]? x_scales, Tensor(a!)[]? seen",
    form="packed",
)
# (outs..., mean, rstd)
qk_norm_rope = register(
    f"qk_norm_rope({_TENSORS}, {_SETTINGS}) -> Tensor[]",
    native=providers.native,
    fake=_fake,
    triton=providers.triton,
    function=QKNormRope,
    launches=forward_launches,
    sharding=sections(of_sections),
    further="Tensor(a!)[] codes, Tensor(b!)[] scales",
    form="packing",
    reference=reference,
)
