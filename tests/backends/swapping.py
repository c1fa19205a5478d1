"""What swap does to the tiny families: exact counts, and accuracy after a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from fxopt.backends.eager import SwappedForward, swap
from fxopt.backends.swaps.fused import counting
from fxopt.backends.swaps.swap import Arguments, Draw
from tests.families import Family
from tests.numerics import Judge, run


def expected(
    norm_modulate: int, qk_norm_rope: int, gated_activation: int, merge_linears: int, **more: int
) -> dict[str, int]:
    """Substitutions by rule."""
    return {
        "norm_modulate": norm_modulate,
        "qk_norm_rope": qk_norm_rope,
        "merge_qk": qk_norm_rope // 2,  # queries and keys
        "gated_activation": gated_activation,
        "merge_linears": merge_linears,
        **more,
    }


COUNTS = {
    "flux": expected(16, 8, 6, 16, silu_linears=4, fuse_bias=16, merge_streams=8),
    "flux2": expected(16, 8, 6, 16, merge_streams=8),
    "sd3.5": expected(32, 14, 9, 30, silu_linears=5, fuse_bias=29, merge_streams=17),
    "qwen-image": expected(12, 4, 4, 12, silu_linears=2, fuse_bias=12, merge_streams=8),
    "wan": expected(8, 8, 2, 10, fuse_bias=8),
    "ltx": expected(8, 8, 2, 8, fuse_bias=8),
    "z-image": expected(20, 12, 6, 18, rms_norm=4),
    "qwen3-eager": expected(2, 4, 2, 6, rms_norm=2, attention=2),
    "qwen3-sdpa": expected(2, 4, 2, 6, rms_norm=2),
    "llama-eager": expected(2, 4, 2, 6, rms_norm=2, attention=2),
    "llama-sdpa": expected(2, 4, 2, 6, rms_norm=2),
}


def same(model: nn.Module, family: Family, change: Callable[[nn.Module], None]) -> Counter[str]:
    """Assert accuracy of the swapped model after `change`; return what fired."""
    change(model)
    inputs = family.inputs(2, 0, torch.float32)
    judge = Judge(model, inputs)
    swap(model)
    with counting() as fired:
        found = run(model, inputs)
    judge(model, family.name, found)
    return Counter(rule for rule, _ in fired)


def draw_arguments(block: nn.Module) -> tuple[SwappedForward, Arguments]:
    """The installed forward of a swapped block, and small arguments for it."""
    forward = vars(block)["forward"]
    assert isinstance(forward, SwappedForward)
    return forward, next(forward.swap.examples(block, Draw(block)))
