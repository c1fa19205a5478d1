"""`fxopt::norm_modulate` in plain ATen: the native provider, and shapes that providers share.

Shapes: D features, R rows that share their modulation, G groups of such rows. Per-sample modulation
`[B, 1, D]` of `x` `[B, S, D]` gives G = B, R = S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements per step of the native provider on CPU: the temporaries of one step stay in the L2 cache.
CPU_BLOCK = 1 << 17
# Up to this many elements there is one step.
CPU_WHOLE = 1 << 18


def opmath_of(x: Tensor, *dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, *dtypes) else torch.float32


class Groups:
    """The rows of `x` as G groups of R rows, such that no operand differs within a group."""

    def __init__(self, x: Tensor, operands: Sequence[Tensor | None]) -> None:
        self.rank, self.num_features = x.dim(), x.shape[-1]
        self._split(x, max(num_varying_dims(t, x.dim()) for t in operands))

    def _split(self, x: Tensor, num_varying: int) -> None:
        varying, common = x.shape[:num_varying], x.shape[num_varying:-1]
        self.num_groups, self.num_rows = math.prod(varying), math.prod(common)
        self.operand_shape = [*varying, *[1] * len(common), self.num_features]

    def operand(self, t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Copy or view an operand as `[G, D]`."""
        if t is None:
            return None
        return t.to(dtype).expand(self.operand_shape).reshape(self.num_groups, self.num_features)

    def reduce(self, grad_GD: Tensor, operand: Tensor) -> Tensor:
        """Sum a gradient per group to the shape of its operand."""
        return grad_GD.reshape(self.operand_shape).sum_to_size(operand.shape)


class Blocks(Groups):
    """The rows of `x` in blocks, and beside each what every operand is there.

    Small tensors are one block `[G, R, D]` with operands `[G, 1, D]`: there the calls cost more
    than the arithmetic. Larger ones are blocks `[r, D]` with operands `[D]`, or `[r, D]` where the
    groups are much smaller than a block.
    """

    def __init__(self, x: Tensor, operands: Sequence[Tensor | None]) -> None:
        super().__init__(x, operands)
        num_rows = self.num_groups * self.num_rows
        self.whole = not x.is_cpu or x.numel() <= CPU_WHOLE
        limit = num_rows if self.whole else max(1, CPU_BLOCK // self.num_features)
        self.per_row = not self.whole and 8 * self.num_rows < min(limit, num_rows)
        if self.per_row:
            self._split(x, self.rank - 1)
        self.blocks_per_group = -(-self.num_rows // limit)
        self.num_blocks = self.num_groups * self.blocks_per_group
        if self.per_row or self.whole:
            self.num_blocks = -(-num_rows // limit)

    def rows(self, t: Tensor | None) -> Sequence[Tensor | None]:
        """Split `[..., D]` into blocks; None, or an output that is not wanted, into Nones."""
        if t is None or t.numel() == 0:
            return [None] * self.num_blocks
        if self.whole:
            return [t.reshape(self.num_groups, self.num_rows, t.shape[-1])]
        if self.per_row:
            return t.reshape(self.num_groups, t.shape[-1]).chunk(self.num_blocks)
        groups = t.reshape(self.num_groups, -1, t.shape[-1]).unbind()
        return [block for group in groups for block in group.chunk(self.blocks_per_group)]

    def operand_rows(self, t_GD: Tensor | None) -> Sequence[Tensor | None]:
        """Split a `[G, D]` operand into what goes beside each block."""
        if t_GD is None or self.per_row:
            return self.rows(t_GD)
        if self.whole:
            return [t_GD.unsqueeze(1)]
        return [row for row in t_GD.unbind() for _ in range(self.blocks_per_group)]

    def sum_rows(self, t: Tensor) -> Tensor:
        """Reduce a block to what its operand is beside it."""
        return t if self.per_row else t.sum(-2)

    def gather(self, sums: list[Tensor]) -> Tensor:
        """Join the blocks' sums to `[G, D]`."""
        if self.whole:
            return sums[0]
        if self.per_row:
            return torch.cat(sums)
        return torch.stack(sums).view(self.num_groups, -1, self.num_features).sum(1)


def num_varying_dims(operand: Tensor | None, rank: int) -> int:
    """Number of leading dims up to the last one, D aside, over which an operand varies."""
    if operand is None:
        return 0
    sizes = [1] * (rank - operand.dim()) + list(operand.shape)
    return max((i + 1 for i, size in enumerate(sizes[:-1]) if size != 1), default=0)


class Affine:
    """Affine and modulation as one map n -> n * a + c; `a` and `c` are `[G, D]` or None."""

    def __init__(
        self,
        groups: Groups,
        operands: Sequence[Tensor | None],
        offsets: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        weight, self.bias, scale, shift = (groups.operand(t, dtype) for t in operands)
        self.weight = None if weight is None else weight + offsets[0]
        self.scale = None if scale is None else scale + offsets[1]
        self.a = self.scale if self.weight is None else _times(self.weight, self.scale)
        bias = None if self.bias is None else _times(self.bias, self.scale)
        self.c = shift if bias is None else bias if shift is None else bias + shift

    def grads(self, da_GD: Tensor, dc_GD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of weight, bias, scale and shift per group, from those of `a` and `c`."""
        dscale_GD = _times(da_GD, self.weight)
        if self.bias is not None:
            dscale_GD = dscale_GD + dc_GD * self.bias
        return _times(da_GD, self.scale), _times(dc_GD, self.scale), dscale_GD, dc_GD


def _times(t: Tensor, factor: Tensor | None) -> Tensor:
    return t if factor is None else t * factor


def _map(n: Tensor, a: Tensor | None, c: Tensor | None) -> Tensor:
    if a is None or c is None:
        n = _times(n, a)
        return n if c is None else n + c
    return torch.addcmul(c, n, a)


def forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    weight_offset: float,
    scale_offset: float,
    h_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = y, h, mean, rstd = outputs(x, residual, norm, h_dtype, dtype)
    if x.numel() == 0:
        return results
    operands, opmath = (weight, bias, scale, shift), rstd.dtype
    blocks = Blocks(x, (gate, *operands))
    affine = Affine(blocks, operands, (weight_offset, scale_offset), opmath)
    beside = (blocks.operand(gate, opmath), affine.a, affine.c)
    # On CPU ATen's LayerNorm reads and writes bf16 or fp16 beside fp32 statistics and parameters.
    mixes = x.is_cpu and affine.a is not None and not blocks.per_row
    norm_dtype = dtype if mixes and dtype == (x if residual is None else h).dtype else opmath
    rows = (x, residual, h, y, mean.unsqueeze(-1), rstd.unsqueeze(-1))
    for x_, residual_, h_, y_, mean_, rstd_, gate_, a, c in zip(
        *map(blocks.rows, rows), *map(blocks.operand_rows, beside), strict=True
    ):
        value = x_
        if residual_ is not None:
            value = _times(x_.to(opmath), gate_) + residual_
            value = h_.copy_(value)
        if norm == "layer":
            n, mean_block, rstd_block = _layer_norm(value.to(norm_dtype), a, c, eps)
            mean_.copy_(mean_block)
        elif norm == "rms":
            value = value.to(opmath)
            rstd_block = value.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            n = _map(value * rstd_block, a, c)
        if norm != "none":
            y_.copy_(n)
            rstd_.copy_(rstd_block)
    return results


def _layer_norm(
    h: Tensor, a: Tensor | None, c: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if any(t is not None and t.dim() > 1 for t in (a, c)):
        n, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, eps)
        return _map(n, a, c), mean, rstd
    return torch.native_layer_norm(h, h.shape[-1:], a, c, eps)


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
    operands = (gate, *affine_operands)
    wants = wanted(grad_y, h, operands, needs)
    outputs = dh, dx, *grads, y = outputs_backward(h, x, operands, wants, dtype, needs, recompute)
    if h.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    blocks = Blocks(h, operands)
    affine = Affine(blocks, affine_operands, (weight_offset, scale_offset), opmath)
    beside = (blocks.operand(gate, opmath), affine.a, affine.c)
    rows = (grad_y, grad_h, h, x, mean.unsqueeze(-1), rstd.unsqueeze(-1), dh, dx, y)
    dgates, das, dcs = [], [], []
    for grad_y_, grad_h_, h_, x_, mean_, rstd_, dh_, dx_, y_, gate_, a, c in zip(
        *map(blocks.rows, rows), *map(blocks.operand_rows, beside), strict=True
    ):
        dvalue = None if grad_h_ is None else grad_h_.to(opmath)
        if grad_y_ is not None or recompute:
            value = h_.to(opmath)
            n = _normalize(value, mean_, rstd_)
        if recompute:
            y_.copy_(_map(n, a, c))
        if grad_y_ is not None:
            dy = grad_y_.to(opmath)
            dnorm = _norm_backward(_times(dy, a), n, value, mean_, rstd_)
            dvalue = dnorm if dvalue is None else dnorm.add_(dvalue)
            if any(wants[1:]):
                das.append(blocks.sum_rows(n.mul_(dy)))
                dcs.append(blocks.sum_rows(dy))
        dh_.copy_(dvalue)
        if wants[0]:
            dgates.append(blocks.sum_rows(dvalue * x_))
        if dx_ is not None and gate_ is not None:
            dx_.copy_(dvalue * gate_)
    dgate_GD = blocks.gather(dgates) if dgates else None
    daffine_GD = affine.grads(blocks.gather(das), blocks.gather(dcs)) if das else [None] * 4
    for grad, grad_GD, operand in zip(grads, (dgate_GD, *daffine_GD), operands, strict=True):
        if grad_GD is not None and operand is not None and grad.numel():
            grad.copy_(blocks.reduce(grad_GD, operand))
    return outputs


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


def passes_through(shift: Tensor | None, h: Tensor) -> bool:
    """Whether `shift` is added element by element, so that its gradient is that of `y`."""
    return shift is not None and shift.shape == h.shape


def outputs(
    x: Tensor, residual: Tensor | None, norm: str, h_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    opmath, rows = opmath_of(x, h_dtype, dtype), x.shape[:-1]
    y = x.new_empty(0 if norm == "none" else x.shape, dtype=dtype)
    h = x.new_empty(0 if residual is None else x.shape, dtype=h_dtype)
    mean = x.new_empty(rows if norm == "layer" else 0, dtype=opmath)
    rstd = x.new_empty(0 if norm == "none" else rows, dtype=opmath)
    return y, h, mean, rstd


def wanted(
    grad_y: Tensor | None, h: Tensor, operands: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[bool]:
    """Which of gate, weight, bias, scale and shift the backward computes a gradient of."""
    gate, *affine = (t is not None and need for t, need in zip(operands, needs[2:], strict=True))
    affine[3] = affine[3] and not passes_through(operands[4], h)
    return [gate, *(want and grad_y is not None for want in affine)]


def outputs_backward(
    h: Tensor,
    x: Tensor | None,
    operands: Sequence[Tensor | None],
    wants: Sequence[bool],
    dtype: torch.dtype,
    needs: Sequence[bool],
    recompute: bool,
) -> tuple[Tensor, ...]:
    """Allocate the outputs of the backward; those not wanted have 0 elements."""
    x_dtype = h.dtype if x is None else x.dtype
    has_dx = operands[0] is not None and needs[0]
    grads = (
        t.new_empty(t.shape) if want and t is not None else h.new_empty(0)
        for t, want in zip(operands, wants, strict=True)
    )
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape if has_dx else 0, dtype=x_dtype),
        *grads,
        h.new_empty(h.shape if recompute else 0, dtype=dtype),
    )
