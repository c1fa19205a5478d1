"""Queries and keys of an attention: normed, rotated and joined by one `fxopt::qk_norm_rope`.

The op can add the biases of the linears that it reads, as in the rule `merge_qk`.

Shapes: B batch, S tokens of a section, H heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxopt.backends.swaps import quantized
from fxopt.backends.swaps.fused import fire, read_norm
from fxopt.backends.swaps.quantized import Unbiased, is_plain
from fxopt.kernels.registration import ops


class Rotation(NamedTuple):
    """`kind`, `tables`, cos, sin and `rotated` of `fxopt::qk_norm_rope`.

    cos, sin: [B, S, H, width].
    """

    kind: str
    tables: str
    cos: Tensor
    sin: Tensor
    rotated: str = "all"

    @property
    def settings(self) -> tuple[str, str, str]:
        return self.kind, self.tables, self.rotated

    def split(self, length: int) -> tuple[Rotation, Rotation]:
        """The tables of the first `length` tokens, and those of the others."""
        first, second = (
            self._replace(cos=self.cos[:, part], sin=self.sin[:, part])
            for part in (slice(0, length), slice(length, None))
        )
        return first, second


def of_complex(freqs: Tensor) -> Rotation:
    """Tables [..., S, d/2] that hold cos + i sin, as a rotation of interleaved pairs."""
    tables = torch.view_as_real(freqs).unsqueeze(-3)
    return Rotation("interleaved", "pairs", tables[..., 0], tables[..., 1])


class Part(NamedTuple):
    """What attention needs to know of a section, one run of tokens, beside its projections.

    qk_norms, biases: of its queries and of its keys; the biases are those still to be added.
    rotation: of both, or of the queries if `key_rotation` says what the keys have.
    """

    qk_norms: tuple[nn.Module | None, nn.Module | None]
    rotation: Rotation | None = None
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    key_rotation: Rotation | EllipsisType | None = ...

    @property
    def rotations(self) -> tuple[Rotation | None, Rotation | None]:
        """Of the queries and of the keys."""
        own = self.key_rotation
        return self.rotation, self.rotation if isinstance(own, EllipsisType) else own

    def holding(
        self, x: Tensor, q: Any, k: Any, *others: nn.Module, keys_of: Tensor | None = None
    ) -> tuple[list[Any], Part]:
        """The projections of `x`, less the biases that the op can add, and the part with those.

        keys_of: what `k` projects, where it is not `x`.
        """
        of_q = self._waiting_bias(x, q, self.qk_norms[0])
        of_k = self._waiting_bias(x if keys_of is None else keys_of, k, self.qk_norms[1])
        linears = [m if b is None else Unbiased(m.weight) for m, b in ((q, of_q), (k, of_k))]
        return [*linears, *others], self._replace(biases=(of_q, of_k))

    def _waiting_bias(self, x: Tensor, linear: Any, norm: nn.Module | None) -> Tensor | None:
        has_op = self.rotation is not None or read_norm(norm, x).kind != "none"
        if not has_op or not is_plain(linear) or quantized.quantizes(x, linear) is not None:
            return None
        bias: Tensor | None = linear.bias
        return bias


class Section(NamedTuple):
    """One run of tokens [B, S, H * d] of a query or key."""

    x: Tensor
    norm: nn.Module | None
    rotation: Rotation | None
    bias: Tensor | None


def queries_keys(
    projections: Sequence[Sequence[Tensor]],
    parts: Sequence[Part],
    head_dim: int,
    *,
    across_heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, S, H, d]: each section normed and rotated, all of each in one buffer.

    projections: queries and keys of each section.
    """
    queries, keys = (
        [
            Section(p[i], part.qk_norms[i], part.rotations[i], part.biases[i])
            for p, part in zip(projections, parts, strict=True)
        ]
        for i in (0, 1)
    )
    q_kind, k_kind = (read_norm(s[0].norm, s[0].x).kind for s in (queries, keys))
    if q_kind == k_kind:
        q, k = _operands((queries, keys), head_dim, across_heads)
    else:
        q, k = (_operands((s,), head_dim, across_heads)[0] for s in (queries, keys))
    return q, k


def operand(section: Section, head_dim: int, *, across_heads: bool) -> Tensor:
    """Queries alone, or keys, of one section, as `queries_keys` makes them."""
    return _operands(((section,),), head_dim, across_heads)[0]


def _operands(
    operands: Sequence[Sequence[Section]], head_dim: int, across_heads: bool
) -> list[Tensor]:
    sections = [s for operand in operands for s in operand]
    if all(s.norm is None and s.rotation is None for s in sections):
        return [heads(torch.cat([s.x for s in o], 1), head_dim) for o in operands]
    for _ in operands:
        fire("qk_norm_rope", "qk_norm_rope")
    x_bias = [s.bias for s in sections]
    if len(operands) > 1 or any(b is not None for b in x_bias):
        fire("merge_qk", "qk_norm_rope")
    norms = [read_norm(s.norm, s.x) for s in sections]
    affine = [n.weight for n in norms], [n.bias for n in norms]
    tables = ([s.rotation and s.rotation[i] for s in sections] for i in (2, 3))
    rotation = next((s.rotation for s in sections if s.rotation is not None), None)
    kind = rotation.settings if rotation is not None else ("none", "channels", "all")
    eps, dtype = [n.eps for n in norms], sections[0].x.dtype
    settings = (norms[0].kind, eps, 0.0, across_heads, *kind, dtype)
    x, joined = [heads(s.x, head_dim) for s in sections], [len(o) for o in operands]
    outs: list[Tensor] = ops.qk_norm_rope(x, x_bias, *affine, *tables, joined, *settings)
    return outs[: len(operands)]


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H * d] to [B, S, H, d]."""
    return x.unflatten(-1, (-1, head_dim))
