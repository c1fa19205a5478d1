"""The cost model: what a block does, how long that takes on a target by roofline, where FP8 pays.

`Work` is free of any device. Every matrix product and every attention is bound on its own by the
compute peak or by the memory bandwidth, whichever is slower; glue (all the rest) by bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxopt.hardware import Target

if TYPE_CHECKING:
    import sympy

# Bytes of quantisation traffic per element of every operand, forward + backward together, when
# amax, cast and transpose are passes of their own; 4 where the producer keeps the amax.
QUANTIZATION_BYTES = 6

# (m, n, k) of `[m, k] @ [k, n]`.
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Product:
    """One matrix product (or a batch of them), or the products inside one attention.

    Args:
        flops: 2 per multiply-add.
        num_bytes: operands read once and result written once.
        shape: (m, n, k) of a matrix product `[m, k] @ [k, n]`; None for a batch or an attention.
        bits: of an operand's elements; 8 and 4 run on units of their own where a target has them.
    """

    flops: int
    num_bytes: int
    shape: Shape | None = None
    bits: int = 16


@dataclass(frozen=True)
class Work:
    """What one block does in one pass; `+` adds the passes.

    Args:
        gemms: matrix products.
        attentions: attention calls; an attention's backward is one more.
        glue_bytes: read and written by everything else.
        num_launches: kernels launched, products included.
        saved_bytes: kept for backward, parameters and inputs excluded.
    """

    gemms: tuple[Product, ...] = ()
    attentions: tuple[Product, ...] = ()
    glue_bytes: int = 0
    num_launches: int = 0
    saved_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.gemms + other.gemms,
            self.attentions + other.attentions,
            self.glue_bytes + other.glue_bytes,
            self.num_launches + other.num_launches,
            self.saved_bytes + other.saved_bytes,
        )


@dataclass(frozen=True)
class Cost:
    """A block's forward + backward on one target; times in seconds."""

    gemm_s: float
    attention_s: float
    glue_s: float
    gemm_flops: int
    attention_flops: int
    glue_bytes: int
    num_launches: int
    saved_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds with nothing overlapping."""
        return self.gemm_s + self.attention_s + self.glue_s


@dataclass(frozen=True)
class Fp8BreakEven:
    """From how many tokens a linear pays in FP8.

    Args:
        out_features, in_features: of the weight.
        num_tokens: that the linear has now.
        from_tokens: at which FP8 starts to pay; None if it never does.
    """

    out_features: int
    in_features: int
    num_tokens: int
    from_tokens: int | None


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block class, per block.

    Args:
        block_class: class name.
        count: blocks of this class in the model.
        before: as the model's author wrote it, eager.
        after: rewritten.
        fp8: one entry per distinct linear; empty where the target has no FP8 units.
    """

    block_class: str
    count: int
    before: Cost
    after: Cost
    fp8: tuple[Fp8BreakEven, ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> BlockCost:
        """The value that `dataclasses.asdict` came from."""
        return BlockCost(
            data["block_class"],
            data["count"],
            Cost(**data["before"]),
            Cost(**data["after"]),
            tuple(Fp8BreakEven(**entry) for entry in data["fp8"]),
        )


def roofline(work: Work, target: Target) -> Cost:
    """Lower bound of the time that `work` takes on `target`.

    t = sum_gemm max(flops / (eta P), bytes / (beta BW)) + the same for attention
      + glue_bytes / (beta BW)

    with the peak P of the operands' width (BF16's where there are no units for fewer bits),
    bandwidth BW and the shares eta, beta of `target.achievable`. Nothing overlaps, host time is not
    counted.
    """
    share = target.achievable
    bandwidth = share.bandwidth * target.bandwidth

    peaks = {16: target.bf16, 8: target.fp8 or target.bf16, 4: target.fp4 or target.bf16}

    def seconds(products: tuple[Product, ...], efficiency: float) -> float:
        return sum(
            max(p.flops / (efficiency * peaks[p.bits]), p.num_bytes / bandwidth) for p in products
        )

    return Cost(
        gemm_s=seconds(work.gemms, share.gemm),
        attention_s=seconds(work.attentions, share.attention),
        glue_s=work.glue_bytes / bandwidth,
        gemm_flops=sum(p.flops for p in work.gemms),
        attention_flops=sum(p.flops for p in work.attentions),
        glue_bytes=work.glue_bytes,
        num_launches=work.num_launches,
        saved_bytes=work.saved_bytes,
    )


def fp8_threshold(target: Target, quantization_bytes: float = QUANTIZATION_BYTES) -> float:
    """The bound theta of the FP8 break-even on `target`; 0 without FP8 units.

    A linear of M tokens, N outputs and K inputs runs three products of 2 M N K FLOPs. FP8 saves
    6 M N K (1/P16 - 1/P8) / eta seconds and quantises M K + K N + M N elements at b bytes each, so
    it pays iff

        1/M + 1/N + 1/K < theta,   theta = 6 (1 - P16/P8) beta BW / (b eta P16)

    which is 3 beta BW / (b eta P16) where FP8 is twice as fast.

    Args:
        target: with peaks P16, P8, bandwidth BW and achievable shares eta, beta.
        quantization_bytes: b, bytes moved per element to quantise, forward + backward.
    """
    if not target.fp8:
        return 0.0
    share = target.achievable
    gain = 6 * (1 - target.bf16 / target.fp8)
    bandwidth = share.bandwidth * target.bandwidth
    return gain * bandwidth / (quantization_bytes * share.gemm * target.bf16)


def fp8_pays(m: Any, n: Any, k: Any, theta: float) -> sympy.Basic:
    """`1/m + 1/n + 1/k < theta`: a sympy truth value, or a relation where a size is a symbol."""
    import sympy

    return sympy.Lt(sum(1 / sympy.sympify(size) for size in (m, n, k)), theta)


def fp8_from_tokens(out_features: int, in_features: int, theta: float) -> int | None:
    """Fewest tokens M at which `fp8_pays(M, out_features, in_features, theta)`; None if never."""
    import sympy

    tokens = sympy.Symbol("M", positive=True)
    rest = sympy.Rational(1, out_features) + sympy.Rational(1, in_features)
    bound = sympy.solve(sympy.Eq(1 / tokens + rest, sympy.Rational(theta)), tokens)
    return int(bound[0]) + 1 if bound else None


def block_cost(
    block_class: str, count: int, before: Work, after: Work, linears: set[Shape], target: Target
) -> BlockCost:
    """Both sides of a rewrite on `target`, and the FP8 break-even of its `linears` (m, n, k)."""
    theta = fp8_threshold(target)
    fp8 = tuple(
        Fp8BreakEven(n, k, m, fp8_from_tokens(n, k, theta)) for m, n, k in sorted(linears) if theta
    )
    return BlockCost(block_class, count, roofline(before, target), roofline(after, target), fp8)
