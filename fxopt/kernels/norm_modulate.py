"""`fxopt::norm_modulate`: gated residual, LayerNorm or RMSNorm, affine and modulation in one op.

    h = residual + gate * (x + x_bias)
    y = (norm(h) * (weight_offset + weight) + bias) * (scale_offset + scale) + shift

The forward saves `h` (or `x`, without a residual) and the row statistics; the backward rebuilds the
normalized value from them, so neither `y` nor `norm(h)` is kept for it. `x_bias` is the bias of the
linear that made `x`: its gradient falls out of the same pass.

Shapes: D features, R rows that share their modulation, G groups of such rows. Per-sample modulation
`[B, 1, D]` of `x` `[B, S, D]` gives G = B, R = S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels import magnitudes
from fxopt.kernels import native_norm_modulate as native
from fxopt.kernels.native_norm_modulate import (
    leave_magnitude,
    measured,
    outputs,
    outputs_backward,
    passes_through,
    wanted,
)
from fxopt.kernels.quantize import can_cast
from fxopt.kernels.registration import below_autograd, call_form, opmath_of, register
from fxopt.kernels.saving import (
    fill,
    is_packing,
    kept_in,
    packed,
    read_codes,
    room_for,
    valued,
    values_of,
)
from fxopt.kernels.sharding import rows
from fxopt.kernels.together import run


def reference(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    norm: str,
    eps: float,
    weight_offset: float,
    scale_offset: float,
    h_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return `(y, h)` of the op in plain, differentiable PyTorch.

    h = residual + gate * (x + x_bias), n = norm(h) * (weight_offset + weight) + bias,
    y = n * (scale_offset + scale) + shift. An absent operand drops its term (without `weight` or
    `scale` there is no multiplication, whatever the offset).

    Args:
        x: `[..., D]`, any float dtype and strides.
        residual: shape of `x`, or None; without it h is x, `gate` is None and the `h` returned is
            empty.
        gate, scale, shift: broadcastable to `x`, any float dtype, or None.
        weight, bias: `[D]`, any float dtype, or None.
        x_bias: `[D]`, any float dtype, or None; needs a residual.
        norm: "layer" (biased variance), "rms", or "none" (needs a residual; `y` is then empty).
        eps: added to the variance or mean square.
        weight_offset, scale_offset: constants added to `weight` and `scale`.
        h_dtype, dtype: dtypes of `h` and `y`.

    Numerics: fp32 throughout (fp64 where `x` or a result is fp64), `h` and `y` rounded once, the
    norm taken of the rounded `h`.
    """
    opmath = opmath_of(x, h_dtype, dtype)
    h = x
    if residual is not None:
        branch = x.to(opmath) if x_bias is None else x.to(opmath) + x_bias.to(opmath)
        branch = branch if gate is None else gate.to(opmath) * branch
        h = (residual.to(opmath) + branch).to(h_dtype)
    h_out = x.new_empty(0, dtype=h_dtype) if residual is None else h
    if norm == "none":
        return x.new_empty(0, dtype=dtype), h_out
    n = h.to(opmath)
    if norm == "layer":  # one op: written out, Inductor may get it wrong (pytorch/pull/185855)
        n = torch.layer_norm(n, n.shape[-1:], eps=eps)
    else:
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    for factor, offset, addend in ((weight, weight_offset, bias), (scale, scale_offset, shift)):
        n = n if factor is None else n * (offset + factor.to(opmath))
        n = n if addend is None else n + addend.to(opmath)
    return n.to(dtype), h_out


def _fake(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return outputs(x, residual, *(args[i] for i in (6, 10, 11)))


def fake_one_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, h: Tensor, x: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    operands, (dtype, needs, recompute), scales = args[:6], args[11:14], args[14:16]
    wants = wanted(grad_y, operands, needs)
    h_scales, x_scales = scales or (None, None)
    h = h if h_scales is None else valued(h, dtype)
    x = x if x is None or x_scales is None else valued(x, dtype)
    return outputs_backward(grad_y, h, x, operands, wants, dtype, needs, recompute)


class NormModulate(torch.autograd.Function):
    """Autograd of `fxopt::norm_modulate`: saves the norm's input and the row statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        rooms = rooms_of(ctx, args[:8], args[8:], ctx.needs_input_grad[2])
        op = call_form, norm_modulate, rooms
        results: tuple[Tensor, ...] = below_autograd(*op, *args)
        keep(ctx, args[:8], args[8:], results, rooms)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_h = grads[:2]
        no_grads = (None,) * 6
        if grad_y is None and grad_h is None:
            return (None,) * 8 + no_grads
        saved, scales = run(read_codes(ctx, ctx.saved_tensors, ctx.constants[3]))
        h, x, gate, *others = kept(ctx, grad_h, saved)
        like = measured(ctx.constants[0], h, gate, grad_y)
        room = magnitudes.room_for(ctx, 0, like)
        needs, shift = ctx.needs_input_grad[:8], others[3]
        asks = asked(needs, shift, h)
        given = grad_y, grad_h, h, x, gate, *others, *ctx.constants, asks, False
        found = call_form(norm_modulate_backward, (*scales, *magnitudes.seen_in(room)), *given)
        operands = operand_gradients(found, grad_y, grad_h, h, gate, shift, needs)
        magnitudes.hand_on([room], operands)
        return *in_dtypes(ctx, operands), *no_grads


def rooms_of(
    ctx: Any, tensors: Sequence[Any], settings: Sequence[Any], needs_gate: bool
) -> list[Tensor | None]:
    """Where a norm_modulate of these arguments leaves codes of the norm's input and of x."""
    if not is_packing():
        return room_for(ctx, tensors[0], (None, None))
    x, residual, shift, (norm, *_, h_dtype, _) = tensors[0], tensors[1], tensors[6], settings
    norm_input = x if residual is None else torch.empty(x.shape, dtype=h_dtype, device="meta")
    activations = None if norm == "none" else norm_input, x if needs_gate else None
    return room_for(ctx, x, activations, (is_own(x, residual, shift), True))


def keep(
    ctx: Any,
    tensors: Sequence[Any],
    settings: Sequence[Any],
    results: Sequence[Tensor],
    rooms: Sequence[Tensor | None] | None,
    *more: Tensor,
) -> None:
    """What a norm_modulate keeps for `kept` and `in_dtypes`: no y, and x only for its gate.

    Args:
        tensors: x, residual, gate, weight, bias, scale, shift, x_bias.
        settings: norm, eps, weight_offset, scale_offset, h_dtype, dtype.
        results: y, h, mean, rstd.
        rooms: those of `rooms_of`, filled; None where the op leaves no codes.
        more: to be kept between operands and statistics.
    """
    (x, residual, *operands), (y, h, mean, rstd) = tensors, results
    norm, _, weight_offset, scale_offset, _, dtype = settings
    ctx.constants = norm, weight_offset, scale_offset, dtype
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    absent = [t for t, is_absent in ((y, norm == "none"), (h, residual is None)) if is_absent]
    ctx.mark_non_differentiable(mean, rstd, *absent)
    branch = x if ctx.needs_input_grad[2] else None
    norm_input = None if norm == "none" else x if residual is None else h
    if rooms is None:
        own = is_own(x, residual, operands[4]), True
        activations = packed(ctx, (norm_input, branch), own)
    else:
        activations = kept_in(rooms, (norm_input, branch))
    ctx.save_for_backward(*activations, *operands, *more, mean, rstd)


def kept(ctx: Any, grad_h: Tensor | None, saved: Sequence[Any]) -> tuple[Any, ...]:
    """h, x, gate, weight, bias, scale, shift, x_bias, what else was kept, mean and rstd."""
    norm_input, branch, *others = saved
    h: Any = grad_h if norm_input is None else norm_input  # its shape and dtype, without a norm
    x = h.new_empty(0, dtype=ctx.dtypes[0]) if branch is None else branch
    return h, x, *others


def in_dtypes(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of all operands, those of x and residual in the dtypes of these."""
    given = zip(grads, ctx.dtypes, strict=False)
    return [*(None if g is None else g.to(dtype) for g, dtype in given), *grads[2:]]


def is_own(x: Tensor, residual: Tensor | None, shift: Tensor | None) -> bool:
    """Whether the op alone keeps what its norm reads: the sum that it has made itself, or a branch
    that it adds to a shift of full size. Another x is a residual stream, which others may keep."""
    return residual is not None or passes_through(shift, x)


def asked(needs: Sequence[bool], shift: Tensor | None, h: Tensor) -> list[bool]:
    """What the backward op is to compute of `needs`: not the gradient of a shift of full size.

    Asked here and not there, as what one process has of a DTensor's shift may look like that.
    """
    return [*needs[:6], needs[6] and not passes_through(shift, h), *needs[7:]]


def operand_gradients(
    found: Sequence[Tensor],
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, residual, gate, weight, bias, scale, shift and x_bias, None where not needed.

    `found` is what the backward op returned; what it leaves out is a gradient that came in.
    """
    grads: list[Tensor | None] = [*found[2:-1]]
    dresidual, dx = grad_h if grad_y is None else found[0], found[1]
    if grad_y is None:
        grads[1:5] = [None] * 4
    elif shift is not None and passes_through(shift, h):
        grads[4] = grad_y.to(shift.dtype)
    every = (dresidual if gate is None else dx, dresidual, *grads)
    return [g if need else None for g, need in zip(every, needs, strict=True)]


SCHEMA = (
    "norm_modulate(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor? x_bias, str norm, float eps, float weight_offset, "
    "float scale_offset, ScalarType h_dtype, ScalarType dtype) "
    "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)
BACKWARD_SCHEMA = (
    "norm_modulate_backward(Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor? x, Tensor? gate, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, Tensor mean, "
    "Tensor rstd, str norm, float weight_offset, float scale_offset, ScalarType dtype, "
    "bool[8] needs, bool recompute) -> (Tensor dh, Tensor dx, Tensor dgate, Tensor dweight, "
    "Tensor dbias, Tensor dscale, Tensor dshift, Tensor dx_bias, Tensor y)"
)


def _launches_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, h: Tensor, x: Tensor | None, *args: Any
) -> int:
    """One pass over the rows, and one over the partial sums if there are any."""
    wants = zip(args[:6], wanted(grad_y, args[:6], args[12]), strict=True)
    return 1 + any(want and operand.shape != h.shape for operand, want in wants)


def native_forward(*args: Any) -> tuple[Tensor, ...]:
    """Behind the arguments: where codes and scales of the norm's input and of x are left."""
    found = native.forward(*args[:NUM_ARGUMENTS])
    fill_rooms(args, found)
    return found


def fill_rooms(args: Sequence[Any], found: Sequence[Tensor]) -> None:
    """The same in a pass of its own."""
    fill((args[0] if args[1] is None else found[1], args[0]), args[NUM_ARGUMENTS:])


def native_backward(*args: Any) -> tuple[Tensor, ...]:
    """Behind the arguments: scales of h and x, which then are codes of values of `dtype`; and
    where the magnitude of the gradient of x is left."""
    found = native.backward(*decoded(args))
    leave_magnitude(found, args[4], *args[NUM_BACKWARD_ARGUMENTS + 2 :])
    return found


def decoded(args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of the backward with the values of h and x."""
    values = args[:NUM_BACKWARD_ARGUMENTS]
    scales, dtype = args[NUM_BACKWARD_ARGUMENTS:][:2] or (None, None), args[15]
    h, x = (values_of(t, s, dtype) for t, s in zip(args[2:4], scales, strict=True))
    return *values[:2], h, x, *values[4:]


def _triton(*args: Any) -> Any:
    from fxopt.kernels import triton_norm_modulate

    if opmath_of(args[0], *args[12:14]) == torch.float64:
        return native_forward(*args)
    if can_cast(args[0]):
        return triton_norm_modulate.forward(*args)
    found = triton_norm_modulate.forward(*args[:NUM_ARGUMENTS])
    fill_rooms(args, found)
    return found


def _triton_backward(*args: Any) -> Any:
    from fxopt.kernels import triton_norm_modulate

    if args[11].dtype == torch.float64:
        return native_backward(*args)
    if can_cast(args[2]):
        return triton_norm_modulate.backward(*args)
    found = triton_norm_modulate.backward(*decoded(args))
    leave_magnitude(found, args[4], *args[NUM_BACKWARD_ARGUMENTS + 2 :])
    return found


NUM_ARGUMENTS, NUM_BACKWARD_ARGUMENTS = 14, 18
ROOMS = "Tensor(a!)? h_codes, Tensor(b!)? h_scales, Tensor(c!)? x_codes, Tensor(d!)? x_scales"
_OPERANDS = ("gate", "weight", "bias", "scale", "shift", "x_bias")

norm_modulate = register(
    SCHEMA,
    native=native_forward,
    fake=_fake,
    triton=_triton,
    further=ROOMS,
    form="packing",
    function=NormModulate,
    sharding=rows("x", "residual", operands=_OPERANDS, outputs=[None] * 4),
    reference=reference,
)
norm_modulate_backward = register(
    BACKWARD_SCHEMA,
    native=native_backward,
    fake=fake_one_backward,
    triton=_triton_backward,
    further="Tensor? h_scales, Tensor? x_scales, Tensor(a!)? seen",
    form="packed",
    launches=_launches_backward,
    sharding=rows(
        "h", "grad_h", "grad_y", operands=_OPERANDS, outputs=[None, None, *_OPERANDS, None]
    ),
)
