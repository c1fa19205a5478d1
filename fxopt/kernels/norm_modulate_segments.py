"""`fxopt::norm_modulate_segments`: `norm_modulate` whose gate, scale and shift are rows of tables.

    y = norm(residual + gate[i] * (x + x_bias)) * (scale_offset + scale[i]) + shift[i]

`index` says for each token its row i: one table serves noisy and clean tokens, the images of a
packed batch, or the frames of a video, and is never written out per token.

Shapes: B all dims before the tokens, S tokens, N rows of a table, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels import native_norm_modulate as native
from fxopt.kernels import norm_modulate as plain
from fxopt.kernels.native_norm_modulate import outputs, outputs_backward, wanted
from fxopt.kernels.norm_modulate import in_dtypes, keep, kept, operand_gradients
from fxopt.kernels.registration import below_autograd, opmath_of, register
from fxopt.kernels.saving import unpacked
from fxopt.kernels.sharding import Arguments, rows

TABLES = ("gate", "scale", "shift")


def reference(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    index: Tensor,
    shift_per_token: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """`norm_modulate.reference` with gate, scale and shift looked up: table[index] per token.

    Args:
        x: `[*B, S, D]`, any float dtype and strides.
        gate, scale, shift: `[N, D]`, or any shape that broadcasts to `[*B, N, D]`, or None; one row
            serves all.
        index: `[S]`, or any shape that broadcasts to `[*B, S]`; integers, or bool for two rows.
            From -N to N - 1, as in `table[index]`. Another one raises nothing, which would wait for
            the device, and reads nothing outside the table: the token is NaN.
        shift_per_token: whether shift is `[*B, S, D]` and not looked up: what a sandwich norm is
            added to.
        residual, weight, bias, x_bias, settings: as in `norm_modulate.reference`.
    """
    gate, scale, shift = per_token(gate, scale, shift, index, shift_per_token, x.dim())
    return plain.reference(x, residual, gate, weight, bias, scale, shift, x_bias, *settings)


def num_segments_of(*tables: Tensor | None) -> int:
    """N, the rows of the tables."""
    return max(t.shape[-2] if t.dim() > 1 else 1 for t in tables if t is not None)


def _rows(index: Tensor, num_segments: int, rank: int) -> Tensor:
    """`index` as `[*B, S, 1]` from 0 to N - 1, or -1."""
    index = index.long().reshape(*[1] * (rank - 1 - index.dim()), *index.shape, 1)
    index = torch.where(index < 0, index + num_segments, index)
    return torch.where((index >= 0) & (index < num_segments), index, -1)


def _looked_up(table: Tensor | None, index: Tensor, rank: int) -> Tensor | None:
    if table is None or num_segments_of(table) == 1:
        return table
    table = table.reshape(*[1] * (rank - table.dim()), *table.shape)
    rows = _rows(index, table.shape[-2], rank)
    # `take_along_dim` does not look whether all indices are inside.
    return torch.where(rows < 0, torch.nan, torch.take_along_dim(table, rows.clamp(0), -2))


def per_token(
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor,
    shift_per_token: bool,
    rank: int,
) -> tuple[Tensor | None, ...]:
    """gate, scale and shift as `norm_modulate` takes them."""
    gate, scale = (_looked_up(t, index, rank) for t in (gate, scale))
    return gate, scale, shift if shift_per_token else _looked_up(shift, index, rank)


def native_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    residual, gate, weight, bias, scale, shift, x_bias, index, shift_per_token, *settings = args
    gate, scale, shift = per_token(gate, scale, shift, index, shift_per_token, x.dim())
    return native.forward(x, residual, gate, weight, bias, scale, shift, x_bias, *settings)


def native_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, h: Tensor, x: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    gate, weight, bias, scale, shift, x_bias, index, shift_per_token, mean, rstd, *settings = args
    tables = {2: gate, 5: scale} | ({} if shift_per_token else {6: shift})
    # In fp32, as what is summed must not be rounded before.
    gate, scale, shift = (None if t is None else t.to(rstd.dtype) for t in (gate, scale, shift))
    gate, scale, shift = per_token(gate, scale, shift, index, shift_per_token, h.dim())
    operands = (gate, weight, bias, scale, shift, x_bias)
    found = [*native.backward(grad_y, grad_h, h, x, *operands, mean, rstd, *settings)]
    wants = wanted(grad_y, operands, settings[-2])
    for at, table in tables.items():
        if wants[at - 2] and table is not None:
            found[at] = _summed(found[at], index, table).to(table.dtype)
    return tuple(found)


def _summed(grad: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """Sum a gradient per token to the rows of its table.

    A sum per row is deterministic everywhere and as accurate as a sum gets; `index_add_` is not.
    """
    num_segments = num_segments_of(table)
    if num_segments == 1:
        return grad
    rows = _rows(index, num_segments, grad.dim())
    parts = [torch.where(rows == i, grad, 0).sum(-2) for i in range(num_segments)]
    return torch.stack(parts, -2).sum_to_size(table.shape)


def _fake(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return outputs(x, residual, *(args[i] for i in (8, 12, 13)))


def _fake_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, h: Tensor, x: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    operands, (dtype, needs, recompute) = args[:6], args[-3:]
    wants = wanted(grad_y, operands, needs)
    return outputs_backward(grad_y, h, x, operands, wants, dtype, needs, recompute)


class NormModulateSegments(torch.autograd.Function):
    """Autograd of `fxopt::norm_modulate_segments`: saves what that of `norm_modulate` saves."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = below_autograd(norm_modulate_segments, *args)
        index, ctx.shift_per_token = args[8:10]
        keep(ctx, args[:8], args[10:], results, None, index)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_h = grads[:2]
        no_grads = (None,) * 8
        if grad_y is None and grad_h is None:
            return (None,) * 8 + no_grads
        needs = ctx.needs_input_grad[:8]
        saved = kept(ctx, grad_h, unpacked(ctx, ctx.saved_tensors))
        of_backward = saved, ctx.shift_per_token, ctx.constants, needs, False
        operands, _ = gradients(grad_y, grad_h, *of_backward)
        return *in_dtypes(ctx, operands), *no_grads


def gradients(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    saved: Sequence[Any],
    shift_per_token: bool,
    constants: tuple[Any, ...],
    needs: Sequence[bool],
    recompute: bool,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of x, residual, gate, weight, bias, scale, shift and x_bias, and y if recomputed.

    saved: h, x, gate, weight, bias, scale, shift, x_bias, index, mean, rstd.
    """
    (h, _, gate), shift, (mean, rstd) = saved[:3], saved[6], saved[9:]
    # The gradient of a shift per token is that of y.
    asks = [*needs[:6], needs[6] and not shift_per_token, needs[7]]
    found = norm_modulate_segments_backward(
        grad_y, grad_h, *saved[:9], shift_per_token, mean, rstd, *constants, asks, recompute
    )
    shift = shift if shift_per_token else None
    return operand_gradients(found, grad_y, grad_h, h, gate, shift, needs), found[-1]


SCHEMA = (
    "norm_modulate_segments(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, Tensor index, "
    "bool shift_per_token, str norm, float eps, float weight_offset, float scale_offset, "
    "ScalarType h_dtype, ScalarType dtype) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)
BACKWARD_SCHEMA = (
    "norm_modulate_segments_backward(Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor? x, "
    "Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? x_bias, "
    "Tensor index, bool shift_per_token, Tensor mean, Tensor rstd, str norm, "
    "float weight_offset, float scale_offset, ScalarType dtype, bool[8] needs, bool recompute) "
    "-> (Tensor dh, Tensor dx, Tensor dgate, Tensor dweight, Tensor dbias, Tensor dscale, "
    "Tensor dshift, Tensor dx_bias, Tensor y)"
)


def _launches_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, h: Tensor, x: Tensor | None, *args: Any
) -> int:
    """The order of the tokens, a pass over the rows, one over the partial sums if there are any."""
    return 2 + any(wanted(grad_y, args[:6], args[-2]))


def _triton(*args: Any) -> Any:
    from fxopt.kernels import triton_norm_modulate_segments

    in_fp64 = opmath_of(args[0], *args[-2:]) == torch.float64
    return native_forward(*args) if in_fp64 else triton_norm_modulate_segments.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from fxopt.kernels import triton_norm_modulate_segments

    in_fp64 = args[13].dtype == torch.float64
    return native_backward(*args) if in_fp64 else triton_norm_modulate_segments.backward(*args)


_OPERANDS = ("gate", "weight", "bias", "scale", "shift", "x_bias")


def _tables(a: Arguments) -> Sequence[str]:
    return TABLES[:2] if a["shift_per_token"] else TABLES


norm_modulate_segments = register(
    SCHEMA,
    native=native_forward,
    fake=_fake,
    triton=_triton,
    function=NormModulateSegments,
    sharding=rows("x", "residual", operands=_OPERANDS, tables=_tables, outputs=[None] * 4),
    reference=reference,
)
norm_modulate_segments_backward = register(
    BACKWARD_SCHEMA,
    native=native_backward,
    fake=_fake_backward,
    triton=_triton_backward,
    launches=_launches_backward,
    sharding=rows(
        "h", "grad_h", "grad_y", operands=_OPERANDS, tables=_tables,
        outputs=[None, None, *_OPERANDS, None],
    ),
)  # fmt: skip
