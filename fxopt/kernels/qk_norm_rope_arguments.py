"""Arguments of `fxopt::qk_norm_rope`, by name and by section.

Shape suffixes: B batch, S tokens of a section, H heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels import rotary
from fxopt.kernels.registration import in_dtype, opmath_of

# Behind them stand codes and scales of all sections, or scales; not so in the plain ops.
NUM_ARGUMENTS, NUM_BACKWARD_ARGUMENTS = 15, 18
Optional = Sequence[Tensor | None]


class Section(NamedTuple):
    """One run of tokens (text, say, or image) of one output, with its own parameters, and tables of
    its own tokens."""

    x_BSHd: Tensor
    x_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float
    output: int
    rows: slice
    num_all: int

    @property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Both tables."""
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)


class Arguments(NamedTuple):
    """The op's arguments, in the order of its schema; lists have one entry per section.

    Args:
        x: [B, S, H, d] each, any strides.
        x_bias: [H*d], added to x before the norm: that of the linear that made x, or None.
        weight, bias: [d], or [H*d] with `across_heads`; None for no scale, no shift.
        cos, sin: broadcastable to [B, S, H, r], or to [B, S, H, r/2] with one entry per pair, where
            S is the section's own tokens or all of its output's, or what `rotated` says; None
            leaves the section unrotated.
            The first r channels of a head are rotated, the others go through. Constants: they get
            no gradient.
        joined: how many of the sections, in order, make up each output; they share B, H and d.
        norm: "rms", "layer" (biased variance) or "none".
        eps: added to the mean square or variance.
        weight_offset: 1.0 for norms that store the weight minus one, else 0.0.
        across_heads: norm over all H*d elements of a token instead of over each head's d.
        rotation: which of the r channels are a pair: "interleaved", "half" or "none".
        tables: what cos and sin hold. "channels": an entry for each channel. "pairs": one for each
            pair. "matrices": the columns of a 2x2 matrix for each pair, one pair after the other.
        rotated: "all" tokens of a section that has tables; or its "first" or "last" ones, as many
            as the tables have rows, and the others go through.
        dtype: of the outputs.
    """

    x: Sequence[Tensor]
    x_bias: Optional
    weight: Optional
    bias: Optional
    cos: Optional
    sin: Optional
    joined: Sequence[int]
    norm: str
    eps: Sequence[float]
    weight_offset: float
    across_heads: bool
    rotation: str
    tables: str
    rotated: str
    dtype: torch.dtype

    @property
    def math(self) -> torch.dtype:
        """Dtype of all arithmetic and of the statistics."""
        return opmath_of(self.x[0], self.dtype)

    @property
    def sections(self) -> list[Section]:
        """All sections, those of the first output first."""
        each: Any = zip(*self[:4], self.eps, strict=True)
        tables = zip(self.cos, self.sin, strict=True)
        found: list[Section] = []
        narrowed: dict[tuple[int, int], Tensor] = {}
        for output, lengths in enumerate(self.lengths):
            start, num_all = 0, sum(lengths)
            for length in lengths:
                rows = slice(start, start := start + length)
                cos, sin = (self._own(t, rows, num_all, narrowed) for t in next(tables))
                x, x_bias, weight, bias, eps = next(each)
                own = x, x_bias, weight, bias, cos, sin, eps
                found.append(Section(*own, output, rows, num_all))
        return found

    def _own(
        self,
        table: Tensor | None,
        rows: slice,
        num_all: int,
        narrowed: dict[tuple[int, int], Tensor],
    ) -> Tensor | None:
        """What there is of a table for these rows; the same tensor for queries and keys."""
        num_tokens = rows.stop - rows.start
        if table is None or num_tokens == num_all or self.rotated != "all":
            return table
        if table.dim() < 3 or table.shape[-3] != num_all:
            return table
        key = id(table), rows.start
        if key not in narrowed:
            narrowed[key] = table.narrow(-3, rows.start, num_tokens)
        return narrowed[key]

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens of the sections of each output."""
        lengths = iter([x.shape[1] for x in self.x])
        return [[next(lengths) for _ in range(count)] for count in self.joined]

    @property
    def differentiable(self) -> list[Tensor | None]:
        """All of x, then all of x_bias, weight and bias."""
        return [*self.x, *self.x_bias, *self.weight, *self.bias]


def split_backward_arguments(args: Any) -> tuple[Arguments, Tensor, Tensor, Sequence[bool]]:
    """(forward's arguments, mean, rstd, needs) of `qk_norm_rope_backward`, less its `grads`."""
    own = args[:NUM_BACKWARD_ARGUMENTS]
    return Arguments(*own[:6], *own[8:-1]), own[6], own[7], own[-1]


def grouped(x_BSHd: Tensor, across_heads: bool) -> Tensor:
    """[B, S, G, N]: the last dim is what one norm is taken over."""
    return x_BSHd.flatten(2).unsqueeze(2) if across_heads else x_BSHd


def rotary_dim(a: Arguments, s: Section) -> int:
    """How many channels of a head are rotated; 0 where there are no tables."""
    if a.rotation == "none" or s.cos is None:
        return 0
    return rotary.rotary_dim(s.x_BSHd.shape[-1], s.cos.shape[-1], a.tables)


def rotated_rows(a: Arguments, s: Section) -> slice:
    """Which tokens of a section that has tables are rotated.

    Raises:
        ValueError: the tables have more rows than there are tokens, or none by name.
    """
    num_tokens = s.x_BSHd.shape[1]
    if a.rotated == "all":
        return slice(0, num_tokens)
    assert s.cos is not None
    count = s.cos.shape[-3]
    if a.rotated not in ("first", "last") or count > num_tokens:
        raise ValueError(
            f'tables of {count} rows cannot rotate the tokens "{a.rotated}" of {num_tokens}: '
            'qk_norm_rope takes "all", or at most all as the "first" or "last"'
        )
    start = 0 if a.rotated == "first" else num_tokens - count
    return slice(start, start + count)


def math_tables(a: Arguments, s: Section) -> tuple[Tensor, Tensor]:
    """The section's (cos, sin) in the math dtype, as they came in."""
    tables, math = s.tables, a.math
    assert tables is not None and rotary_dim(a, s)
    cos, sin = tables
    return in_dtype(cos, math), in_dtype(sin, math)


def num_groups_of(a: Arguments, x_BSHd: Tensor) -> int:
    """How many norms are taken of a section."""
    batch, num_tokens, num_heads, _ = x_BSHd.shape
    return batch * num_tokens * (1 if a.across_heads else num_heads)
