"""Native provider of `fxopt::norm_modulate`, in ATen where no loop applies, and shared shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels import cpp_norm_modulate as loops
from fxopt.kernels.counters import raise_to
from fxopt.kernels.registration import in_dtype, opmath_of

MAX_FEATURES_MEASURED = 5120


class Affine:
    """Affine and modulation as one map n -> n * a + c; `a` and `c` broadcast to n, or are None."""

    def __init__(
        self, operands: Sequence[Tensor | None], offsets: tuple[float, float], dtype: torch.dtype
    ) -> None:
        weight, self.bias, scale, shift = (
            None if t is None else in_dtype(t, dtype) for t in operands
        )
        self.dtype = dtype
        self.weight = None if weight is None else weight + offsets[0]
        self.scale = None if scale is None else scale + offsets[1]
        self.a = self.scale if self.weight is None else _times(self.weight, self.scale)
        bias = None if self.bias is None else _times(self.bias, self.scale)
        self.c = shift if bias is None else bias if shift is None else bias + shift

    def grads(
        self, dy: Tensor, n: Tensor, wants: Sequence[bool], room: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of weight, bias, scale and shift that are wanted, not yet in their shapes."""
        shape = _joint_shape(dy.shape[-1], self.a, self.c)
        da = dc = dweight = dbias = dscale = None
        if wants[0] or wants[2]:
            da = _summed_product(n, dy, shape, room)
            dweight = _times(da, self.scale) if wants[0] else None
            dscale = _times(da, self.weight) if wants[2] else None
        if wants[1] or wants[3] or (wants[2] and self.bias is not None):
            dc = dy.sum_to_size(shape)
            dbias = _times(dc, self.scale) if wants[1] else None
            if dscale is not None and self.bias is not None:
                dscale = dscale + dc * self.bias
        return [dweight, dbias, dscale, dc]


def _times(t: Tensor, factor: Tensor | None) -> Tensor:
    return t if factor is None else t * factor


def _summed_product(a: Tensor, b: Tensor, shape: Sequence[int], room: Tensor | None) -> Tensor:
    """a * b summed to a shape, by way of `room` if the product is not the result itself."""
    room = None if tuple(shape) == tuple(a.shape) else room
    return torch.mul(a, b, out=room).sum_to_size(shape)


def _map(n: Tensor, a: Tensor | None, c: Tensor | None) -> Tensor:
    """n * a + c; overwrites n."""
    if a is None:
        return n if c is None else n.add_(c)
    return n.mul_(a) if c is None else torch.addcmul(c, n, a, out=n)


def forward(
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
) -> tuple[Tensor, ...]:
    if x.numel() == 0:
        return outputs(x, residual, norm, h_dtype, dtype)
    operands, constants = (gate, weight, bias, scale, shift, x_bias), (weight_offset, scale_offset)
    found = loops.forward(
        (x, residual, *operands, norm, eps, *constants, h_dtype, dtype),
        lambda: outputs(x, residual, norm, h_dtype, dtype),
    )
    if found is not None:
        return found
    opmath = opmath_of(x, h_dtype, dtype)
    h = None
    if residual is not None:
        h = _gated_residual(in_dtype(x, opmath), residual, gate, x_bias)
        x = h = in_dtype(h, h_dtype).contiguous()
    y = mean = rstd = None
    affine = Affine((weight, bias, scale, shift), (weight_offset, scale_offset), opmath)
    if norm == "layer":
        y, mean, rstd = _layer_norm(x, affine, eps, dtype)
        mean = mean.squeeze(-1)
    elif norm == "rms":
        x = in_dtype(x, opmath)
        rstd = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = _map(x * rstd, affine.a, affine.c)
    return (
        x.new_empty(0, dtype=dtype) if y is None else in_dtype(y, dtype).contiguous(),
        x.new_empty(0, dtype=h_dtype) if h is None else h,
        x.new_empty(0, dtype=opmath) if mean is None else mean,
        x.new_empty(0, dtype=opmath) if rstd is None else rstd.squeeze(-1),
    )


def _gated_residual(
    x: Tensor, residual: Tensor, gate: Tensor | None, x_bias: Tensor | None
) -> Tensor:
    """residual + gate * (x + x_bias)."""
    if gate is None:
        h = x + residual
        return h if x_bias is None else h.add_(x_bias)
    gate = in_dtype(gate, x.dtype)
    h = torch.addcmul(residual, x, gate) if residual.dtype == x.dtype else (x * gate).add_(residual)
    return h if x_bias is None else h.add_(x_bias * gate)


def _layer_norm(
    x: Tensor, affine: Affine, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    a, c = affine.a, affine.c
    features = x.shape[-1:]
    if any(t is not None and t.numel() != features[0] for t in (a, c)):
        n, mean, rstd = torch.native_layer_norm(
            in_dtype(x, affine.dtype), features, None, None, eps
        )
        return _map(n, a, c), mean, rstd
    # On CPU ATen's LayerNorm reads and writes bf16 or fp16 beside fp32 statistics and parameters.
    mixes = x.is_cpu and a is not None and x.dtype == dtype
    a, c = (None if t is None else t.reshape(features) for t in (a, c))
    x = x if mixes else in_dtype(x, affine.dtype)
    return torch.native_layer_norm(x, features, a, c, eps)


def backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    weight_offset: float,
    scale_offset: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
    recompute: bool,
) -> tuple[Tensor, ...]:
    affine_operands, opmath = (weight, bias, scale, shift), rstd.dtype
    operands = (gate, *affine_operands, x_bias)
    wants = wanted(grad_y, operands, needs)
    if h.numel() == 0:
        empty = outputs_backward(grad_y, h, x, operands, wants, dtype, needs, recompute)
        return tuple(t.zero_() for t in empty)
    settings = norm, weight_offset, scale_offset, dtype, needs, recompute
    made = loops.backward(
        (grad_y, grad_h, h, x, *operands, mean, rstd, *settings),
        wants,
        lambda: outputs_backward(grad_y, h, x, operands, wants, dtype, needs, recompute),
    )
    if made is not None:
        return made
    dh = dx = dgate = dx_bias = y = room = None
    daffine: Sequence[Tensor | None] = [None] * 4
    dvalue = None if grad_h is None else in_dtype(grad_h, opmath)
    if grad_y is not None or recompute:
        affine = Affine(affine_operands, (weight_offset, scale_offset), opmath)
        value, rstd = in_dtype(h, opmath), rstd.unsqueeze(-1)
        mean_or_none = mean.unsqueeze(-1) if norm == "layer" else None
        n = _normalize(value, mean_or_none, rstd)
    if grad_y is not None:
        dy = in_dtype(grad_y, opmath)
        dn = _times(dy, affine.a)
        dnorm = _norm_backward(dn, n, value, mean_or_none, rstd)
        room = None if dn is dy else dn
        dvalue = dnorm if dvalue is None else dnorm.add_(dvalue)
        dh = in_dtype(dvalue, h.dtype).contiguous()
        if any(wants[1:5]):
            each = affine.grads(dy, n, wants[1:5], room)
            daffine = _reduced(each, affine_operands, wants[1:5], grad_y)
    if recompute:
        y = in_dtype(_map(n, affine.a, affine.c), dtype).contiguous()
    if dvalue is not None:
        if gate is not None and needs[0]:
            x_dtype = h.dtype if x is None else x.dtype
            dx = in_dtype(dvalue * in_dtype(gate, opmath), x_dtype).contiguous()
        if wants[0] or wants[5]:
            pair = _gate_backward(dvalue, x, gate, x_bias, wants[0], room)
            dgate, dx_bias = _reduced(pair, (gate, x_bias), (wants[0], wants[5]), dh, grad_h)
    dtypes = {1: h.dtype if x is None else x.dtype, 8: dtype}
    found = (dh, dx, dgate, *daffine, dx_bias, y)
    return tuple(
        h.new_empty(0, dtype=dtypes.get(i, h.dtype)) if t is None else t
        for i, t in enumerate(found)
    )


def _joint_shape(num_features: int, a: Tensor | None, c: Tensor | None) -> Sequence[int]:
    """The smallest shape that both broadcast into, the last dim that of a row."""
    present = [t.shape for t in (a, c) if t is not None]
    shape = present[0] if present[0] == present[-1] else torch.broadcast_shapes(*present)
    return shape if shape[-1] == num_features else [*shape[:-1], num_features]


def _normalize(h: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    return h * rstd if mean is None else (h - mean).mul_(rstd)


def _norm_backward(dn: Tensor, n: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    if mean is not None:
        # Without a weight: ATen sums the weight's gradient row by row, 7 times eager's error.
        mask = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(
            dn, h, h.shape[-1:], mean, rstd, None, None, mask
        )[0]
    return torch.addcmul(dn, n, (dn * n).mean(-1, keepdim=True), value=-1).mul_(rstd)


def _gate_backward(
    dvalue: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    x_bias: Tensor | None,
    needs_gate: bool,
    room: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x_bias, summed over rows that share their gate."""
    shape = dvalue.shape[-1:] if gate is None else (*gate.shape[:-1], dvalue.shape[-1])
    dsum = dgate = dvalue
    if x_bias is not None:
        dsum = dvalue.sum_to_size(shape)
    if needs_gate and x is not None:
        dgate = _summed_product(dvalue, x, shape, room)
        dgate = (
            dgate if x_bias is None else torch.addcmul(dgate, dsum, in_dtype(x_bias, dsum.dtype))
        )
    return dgate, _times(dsum, gate)


def _reduced(
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    wants: Sequence[bool],
    *others: Tensor | None,
) -> list[Tensor | None]:
    """Gradients in the shape and dtype of their operands; None where not wanted.

    One that needed no sum may be another of them, or of `others`: an op may not return it twice, or
    what came in.
    """
    taken, found = {id(t) for t in others}, list[Tensor | None]()
    for g, t, want in zip(grads, operands, wants, strict=True):
        if not want or t is None or g is None:
            found.append(None)
            continue
        g = in_dtype(g if g.shape == t.shape else g.sum_to_size(t.shape), t.dtype)
        found.append(g.clone() if id(g) in taken else g)
        taken.add(id(g))
    return found


def measured(
    norm: str, h: Tensor | None, gate: Tensor | None, grad_y: Tensor | None
) -> Tensor | None:
    """h, if the backward is to leave the magnitude of the gradient of x where it is wanted.

    Not where it does not make that gradient: without a gate it is that of h. And not beside a norm
    of so many features that the kernel would spill.
    """
    if h is None or (gate is None and grad_y is None):
        return None
    return h if norm == "none" or h.shape[-1] <= MAX_FEATURES_MEASURED else None


def leave_magnitude(
    found: Sequence[Tensor], gate: Tensor | None, seen: Tensor | None = None
) -> None:
    """Raise `seen` to the magnitude of the gradient of x among what the backward has made."""
    raise_to(seen, found[0 if gate is None else 1])


def passes_through(shift: Tensor | None, h: Tensor) -> bool:
    """Whether `shift` is added element by element, so that its gradient is that of `y`."""
    return shift is not None and shift.shape == h.shape


def outputs(
    x: Tensor, residual: Tensor | None, norm: str, h_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate y, h, mean and rstd; those that there are not have 0 elements."""
    opmath, rows = opmath_of(x, h_dtype, dtype), x.shape[:-1]
    y = x.new_empty(0 if norm == "none" else x.shape, dtype=dtype)
    h = x.new_empty(0 if residual is None else x.shape, dtype=h_dtype)
    mean = x.new_empty(rows if norm == "layer" else 0, dtype=opmath)
    rstd = x.new_empty(0 if norm == "none" else rows, dtype=opmath)
    return y, h, mean, rstd


def wanted(
    grad_y: Tensor | None, operands: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[bool]:
    """Which of gate, weight, bias, scale, shift and x_bias the backward computes a gradient of."""
    gate, *affine, x_bias = (
        t is not None and need for t, need in zip(operands, needs[2:], strict=True)
    )
    return [gate, *(want and grad_y is not None for want in affine), x_bias]


def outputs_backward(
    grad_y: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    operands: Sequence[Tensor | None],
    wants: Sequence[bool],
    dtype: torch.dtype,
    needs: Sequence[bool],
    recompute: bool,
) -> tuple[Tensor, ...]:
    """Allocate the outputs of the backward; those not wanted have 0 elements.

    Without `grad_y` there is no `dh`: it is `grad_h` itself.
    """
    x_dtype = h.dtype if x is None else x.dtype
    has_dx = operands[0] is not None and needs[0]
    grads = (
        t.new_empty(t.shape) if want and t is not None else h.new_empty(0)
        for t, want in zip(operands, wants, strict=True)
    )
    return (
        h.new_empty(0 if grad_y is None else h.shape),
        h.new_empty(h.shape if has_dx else 0, dtype=x_dtype),
        *grads,
        h.new_empty(h.shape if recompute else 0, dtype=dtype),
    )
