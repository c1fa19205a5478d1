"""Adaptive LayerNorms of diffusers, for blocks of no known family that are built with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fxopt.backends.swaps.fused import Normed, modulation
from fxopt.backends.swaps.swap import Arguments, Draw, Family, Swap

MODULE = "diffusers.models.normalization"


def zero(adaln: Any, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    shift, scale, *others = _parts(adaln, emb)
    y, _ = Normed(adaln.norm, x, scale, shift).value()
    return y, *(other.squeeze(1) for other in others)


def dual(adaln: Any, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    shift, scale, *others, shift2, scale2, gate2 = _parts(adaln, emb)
    y, _ = Normed(adaln.norm, hidden_states, scale, shift).value()
    y2, _ = Normed(adaln.norm, hidden_states, scale2, shift2).value()
    return y, *(other.squeeze(1) for other in others), y2, gate2.squeeze(1)


def continuous(adaln: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = _parts(adaln, conditioning_embedding.to(x.dtype))
    return Normed(adaln.norm, x, scale, shift).value()[0]


def _parts(adaln: Any, emb: Tensor) -> tuple[Tensor, ...]:
    """[B, 1, D] each: as many as the linear makes."""
    num = adaln.linear.out_features // adaln.norm.normalized_shape[0]
    return modulation(emb, (adaln.linear, num))[0]


def _examples(x: str, emb: str) -> Callable[[Any, Draw], Iterator[Arguments]]:
    def examples(adaln: Any, draw: Draw) -> Iterator[Arguments]:
        (width,) = adaln.norm.normalized_shape
        yield {
            x: draw.normal(draw.B, draw.S, width),
            emb: draw.normal(draw.B, adaln.linear.in_features),
        }

    return examples


def small(adaln: Any) -> nn.Module:
    return type(adaln)(64)


FAMILIES = (
    Family(
        (f"{MODULE}.AdaLayerNormZero", f"{MODULE}.AdaLayerNormZeroSingle"),
        Swap("adaln", zero, _examples("x", "emb"), small),
    ),
    Family(
        (f"{MODULE}.SD35AdaLayerNormZeroX",),
        Swap("adaln", dual, _examples("hidden_states", "emb"), small),
    ),
    Family(
        (f"{MODULE}.AdaLayerNormContinuous",),
        Swap(
            "adaln",
            continuous,
            _examples("x", "conditioning_embedding"),
            lambda adaln: type(adaln)(64, 64, elementwise_affine=False),
        ),
    ),
)
