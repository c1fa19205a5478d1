"""`fxopt::qk_norm_rope`: norm the query or key heads, rotate them, write one joint buffer.

Shape suffixes: B batch, S tokens, H heads, d head dim, G groups that are normed (H, or 1 across
heads), N elements of such a group (d, or H*d).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxopt.kernels.registration import below_autograd, register

aten = torch.ops.aten


class Section(NamedTuple):
    """One run of tokens (text, say, or image) with its own norm parameters and tables."""

    x_BSHd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float
    rows: slice


class Arguments(NamedTuple):
    """The op's arguments, in the order of its schema.

    Args:
        x: [B, S, H, d], any strides; the first section.
        weight, bias: [d], or [H*d] with `across_heads`; None for no scale, no shift.
        cos, sin: broadcastable to [B, S, H, d], or to [B, S, H, d/2] with one entry per pair; None
            leaves the section unrotated. Constants: they get no gradient.
        x2: [B, S2, H, d], the second section, with its own `weight2` to `sin2`; or None.
        norm: "rms", "layer" (biased variance) or "none".
        eps, eps2: added to the mean square or variance of the first, the second section.
        weight_offset: 1.0 for norms that store the weight minus one, else 0.0.
        across_heads: norm over all H*d elements of a token instead of over each head's d.
        rotation: "interleaved", "half" or "none".
        dtype: of the output.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    x2: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None
    cos2: Tensor | None
    sin2: Tensor | None
    norm: str
    eps: float
    eps2: float
    weight_offset: float
    across_heads: bool
    rotation: str
    dtype: torch.dtype

    @property
    def math(self) -> torch.dtype:
        """Dtype of all arithmetic and of the statistics."""
        return torch.float64 if torch.float64 in (self.x.dtype, self.dtype) else torch.float32

    @property
    def sections(self) -> list[Section]:
        """The first section and, if there is one, the second."""
        sections = [Section(self.x, *self[1:5], self.eps, slice(0, S := self.x.shape[1]))]
        if self.x2 is not None:
            rows = slice(S, S + self.x2.shape[1])
            sections.append(Section(self.x2, *self[6:10], self.eps2, rows))
        return sections

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """(x, weight, bias, x2, weight2, bias2)."""
        return (*self[:3], *self[5:8])


def reference(*args: Any) -> Tensor:
    """Norm each section of a query or key, rotate it, and join the sections along the tokens.

        n = norm(x) * (weight_offset + weight) + bias
        interleaved: out[2i] = n[2i] cos[2i] - n[2i+1] sin[2i]
                     out[2i+1] = n[2i+1] cos[2i+1] + n[2i] sin[2i+1]
        half:        the same with the pairs (i, i + d/2) in place of (2i, 2i+1)

    Args: those of `Arguments`.

    Returns:
        [B, S + S2, H, d].

    Numerics: fp32 throughout (fp64 if x or the output is fp64) and one cast to `dtype`.
    """
    a = Arguments(*args)
    parts = []
    for s in a.sections:
        n = _grouped(s.x_BSHd.to(a.math), a.across_heads)
        if a.norm == "layer":
            n = n - n.mean(-1, keepdim=True)
        if a.norm != "none":
            n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + s.eps)
        if s.weight is not None:
            n = n * (a.weight_offset + s.weight.to(a.math))
        if s.bias is not None:
            n = n + s.bias.to(a.math)
        n = n.view(s.x_BSHd.shape)
        tables = _tables(a, s)
        parts.append(n if tables is None else _rotate(n, *tables, a.rotation))
    return torch.cat(parts, 1).to(a.dtype)


def native(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`reference` in the fewest ATen passes; returns (out, mean, rstd)."""
    a = Arguments(*args)
    out, mean, rstd = outputs(a)
    for s in a.sections:
        v_BSGN = _grouped(s.x_BSHd.to(a.math), a.across_heads)
        w_N, b_N = _affine(a, s)
        if a.norm == "layer":
            n, m, r = aten.native_layer_norm(v_BSGN, v_BSGN.shape[-1:], w_N, b_N, s.eps)
            mean[:, s.rows] = m.view(mean[:, s.rows].shape)
            rstd[:, s.rows] = r.view(rstd[:, s.rows].shape)
        else:
            n = v_BSGN
            if a.norm == "rms":
                r = torch.linalg.vector_norm(v_BSGN, dim=-1, keepdim=True)
                r = r.square_().div_(v_BSGN.shape[-1]).add_(s.eps).rsqrt_()
                rstd[:, s.rows] = r.view(rstd[:, s.rows].shape)
                n = n * r
            if w_N is not None:
                n = torch.mul(n, w_N, out=None if n is v_BSGN else n)
            if b_N is not None:
                n = n + b_N
        n = n.view(s.x_BSHd.shape)
        tables = _tables(a, s)
        out[:, s.rows] = n if tables is None else _rotate(n, *tables, a.rotation)
    return out, mean, rstd


def native_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of `Arguments.differentiable`; 0 elements where `needs` is false."""
    a, mean, rstd, needs = split_backward_arguments(args)
    grads: list[Tensor | None] = []
    for s in a.sections:
        g = grad[:, s.rows].to(a.math).contiguous()
        tables = _tables(a, s)
        if tables is not None:
            g = _rotate(g, *_transposed(*tables, a.rotation), a.rotation)
        elif a.norm == "none":
            g = g.clone()  # dx may not alias grad
        v_BSGN = _grouped(s.x_BSHd.to(a.math), a.across_heads)
        # native_layer_norm_backward reads the statistics as if they were contiguous.
        mean_s, rstd_s = (
            t[:, s.rows].reshape(*v_BSGN.shape[:-1], 1).contiguous() if t.dim() > 1 else t
            for t in (mean, rstd)
        )
        needs_s = needs[len(grads) : len(grads) + 3]
        g_BSGN = _grouped(g, a.across_heads)
        dx, dw, db = _norm_backward(g_BSGN, v_BSGN, *_affine(a, s), mean_s, rstd_s, a.norm, needs_s)
        grads += [None if dx is None else dx.reshape(s.x_BSHd.shape).contiguous(), dw, db]
    grads += [None] * (6 - len(grads))
    return tuple(
        a.x.new_empty(0) if g is None or t is None else g.to(t.dtype)
        for g, t in zip(grads, a.differentiable, strict=True)
    )


def _norm_backward(
    g: Tensor,
    v: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (v, w, b), each [B, S, G, N] or [N], given g = d(norm(v) * w + b)."""
    if norm == "layer":
        return aten.native_layer_norm_backward(g, v, v.shape[-1:], mean, rstd, w, b, needs)
    needs_x, needs_w, needs_b = needs
    db = g.sum((0, 1, 2)) if needs_b else None
    if norm == "none":
        dw = (g * v).sum((0, 1, 2)) if needs_w else None
        return (g if w is None else g * w) if needs_x else None, dw, db
    xhat = v * rstd
    product = g * xhat
    dw = product.sum((0, 1, 2)) if needs_w else None
    if not needs_x:
        return None, dw, db
    dot = product.sum(-1, keepdim=True) if w is None else (product @ w).unsqueeze(-1)
    dx = xhat.mul_(dot.div_(-v.shape[-1]))
    dx = dx.add_(g) if w is None else dx.addcmul_(g, w)
    return dx.mul_(rstd), dw, db


def _grouped(x_BSHd: Tensor, across_heads: bool) -> Tensor:
    """[B, S, G, N]: the last dim is what one norm is taken over."""
    return x_BSHd.flatten(2).unsqueeze(2) if across_heads else x_BSHd


def _affine(a: Arguments, s: Section) -> tuple[Tensor | None, Tensor | None]:
    """What the normed values are multiplied by and shifted by, in the math dtype."""
    weight = None if s.weight is None else s.weight.to(a.math)
    if weight is not None and a.weight_offset:
        weight = weight + a.weight_offset
    return weight, None if s.bias is None else s.bias.to(a.math)


def _tables(a: Arguments, s: Section) -> tuple[Tensor, Tensor] | None:
    """The section's (cos, sin) in the math dtype, one entry per element of a head."""
    if a.rotation == "none" or s.cos is None or s.sin is None:
        return None
    cos, sin = s.cos.to(a.math), s.sin.to(a.math)
    if cos.shape[-1] < s.x_BSHd.shape[-1]:
        cos, sin = _joined(cos, cos, a.rotation), _joined(sin, sin, a.rotation)
    return cos, sin


def _pairs(x: Tensor, rotation: str) -> tuple[Tensor, ...]:
    """Views of the first and the second members of all pairs."""
    return x.chunk(2, -1) if rotation == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)


def _joined(first: Tensor, second: Tensor, rotation: str) -> Tensor:
    """Inverse of `_pairs`."""
    if rotation == "half":
        return torch.cat((first, second), -1)
    return torch.stack((first, second), -1).flatten(-2)


def _rotate(n: Tensor, cos: Tensor, sin: Tensor, rotation: str) -> Tensor:
    """(p, q) -> (p cos_p - q sin_p, q cos_q + p sin_q) for every pair."""
    p, q = _pairs(n, rotation)
    sin_p, sin_q = _pairs(sin, rotation)
    # The sign goes on the table, which all heads share.
    return (n * cos).addcmul_(_joined(q, p, rotation), _joined(-sin_p, sin_q, rotation))


def _transposed(cos: Tensor, sin: Tensor, rotation: str) -> tuple[Tensor, Tensor]:
    """Tables with which `_rotate` applies the transposed rotation, its own backward."""
    sin_p, sin_q = _pairs(sin, rotation)
    return cos, _joined(-sin_q, -sin_p, rotation)


def outputs(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (out, mean, rstd)."""
    B, _, H, d = a.x.shape
    S = a.sections[-1].rows.stop
    stats = (B, S) if a.across_heads else (B, S, H)
    out = a.x.new_empty((B, S, H, d), dtype=a.dtype)
    mean = a.x.new_empty(stats if a.norm == "layer" else (0,), dtype=a.math)
    rstd = a.x.new_empty(stats if a.norm != "none" else (0,), dtype=a.math)
    return out, mean, rstd


def split_backward_arguments(args: Any) -> tuple[Arguments, Tensor, Tensor, list[bool]]:
    """(forward's arguments, mean, rstd, needs) of `qk_norm_rope_backward`, less its `grad`."""
    return Arguments(*args[:10], *args[12:-1]), args[10], args[11], list(args[-1])


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(Arguments(*args))


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    a, _, _, needs = split_backward_arguments(args)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else a.x.new_empty(0)
        for t, need in zip(a.differentiable, needs, strict=True)
    )


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fxopt.kernels import triton_qk_norm_rope

    return triton_qk_norm_rope.forward(*args)


def _triton_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from fxopt.kernels import triton_qk_norm_rope

    return triton_qk_norm_rope.backward(grad, *args)


class QKNormRope(torch.autograd.Function):
    """Autograd of `fxopt::qk_norm_rope`; saves the inputs and the statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the op. Raises ValueError if a table requires grad."""
        a = Arguments(*args)
        if any(t is not None and t.requires_grad for t in (a.cos, a.sin, a.cos2, a.sin2)):
            raise ValueError(
                "qk_norm_rope gives its cos and sin tables no gradient, but one requires grad: "
                "detach the tables, or keep the unfused ops if they are learned"
            )
        out, mean, rstd = below_autograd(qk_norm_rope, *args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(*args[:10], mean, rstd)
        ctx.scalars = args[10:]
        return out, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of the 17 arguments, None where there is none."""
        grads: list[Tensor | None] = [None] * 17
        if grad is not None:
            places = (0, 1, 2, 5, 6, 7)
            needs = [ctx.needs_input_grad[i] for i in places]
            computed = qk_norm_rope_backward(grad, *ctx.saved_tensors, *ctx.scalars, needs)
            for place, need, g in zip(places, needs, computed, strict=True):
                grads[place] = g if need else None
        return tuple(grads)


_TENSORS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, "
    "Tensor? x2, Tensor? weight2, Tensor? bias2, Tensor? cos2, Tensor? sin2"
)
_SCALARS = (
    "str norm, float eps, float eps2, float weight_offset, bool across_heads, str rotation, "
    "ScalarType dtype"
)

qk_norm_rope_backward = register(
    f"qk_norm_rope_backward(Tensor grad, {_TENSORS}, Tensor mean, Tensor rstd, {_SCALARS}, "
    "bool[6] needs) -> (Tensor dx, Tensor dweight, Tensor dbias, "
    "Tensor dx2, Tensor dweight2, Tensor dbias2)",
    native=native_backward,
    fake=_fake_backward,
    triton=_triton_backward,
    launches=lambda *_: 2,
)
qk_norm_rope = register(
    f"qk_norm_rope({_TENSORS}, {_SCALARS}) -> (Tensor out, Tensor mean, Tensor rstd)",
    native=native,
    fake=_fake,
    triton=_triton,
    function=QKNormRope,
)
