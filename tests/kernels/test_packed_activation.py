"""The backward of an activation that is kept as codes: that of what they stand for, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import packed_activation as op
from fxopt.kernels import quantized_producers, saving
from fxopt.kernels.counters import FIELDS
from fxopt.kernels.quantized_producers import gated_activation_quantize_backward
from fxopt.kernels.together import Ask, answer
from tests.kernels.interpreted import Interpreted
from tests.kernels.test_quantized_producers import draw
from tests.kernels.test_together import assert_same

# Activation, packing, whether up is a tensor of its own, features, width of what stands beside.
CASES = [
    ("gelu_tanh", "none", False, 128, 0),
    ("silu", "none", True, 200, 40),
    ("silu", "gate_up", False, 256, 128),
    ("gelu_erf", "up_gate", False, 72, 24),  # a block of codes holds both halves
]


def call(case: Any, dtype: torch.dtype, seed: int = 0) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of the op, and of the plain one on what the codes stand for."""
    name, packing, has_up, width, beside_width = case
    gate = draw(2, 9, width * (1 if packing == "none" else 2), seed=seed).to(dtype)
    up = draw(2, 9, width, seed=seed + 1).to(dtype) if has_up else None
    beside = draw(2, 9, beside_width, seed=seed + 2).to(dtype) if beside_width else None
    grad = draw(2, 9, beside_width + width, seed=seed + 3).to(dtype)[..., beside_width:]
    amax_t = torch.tensor([3.0])
    kept = [t for t in (gate, up) if t is not None]
    found = saving.native_pack(kept, 1)
    codes, scales = found[: len(kept)], found[len(kept) :]
    whole = saving.native_unpack(codes, scales, [saving.name_of(dtype)] * len(kept))
    codes, scales, whole = ([*each, None][:2] for each in (codes, scales, whole))
    rest = beside, name, packing, "e4m3/tensor/fp32", amax_t
    return (grad, *codes, *scales, *rest), (grad, *whole, *rest)


@pytest.mark.parametrize("provider", ["native", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
# The interpreter cuts bfloat16 off instead of rounding it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_are_those_of_unpacked(dtype: torch.dtype, case: Any, provider: str) -> None:
    packed, plain = call(case, dtype)
    expected = getattr(quantized_producers, f"{provider}_activation_backward")(*plain)
    assert_same(getattr(op, provider)(*packed), expected)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case[1])
def test_streams_and_counters(case: Any) -> None:
    each = [call(case, torch.float32, seed) for seed in (0, 10)]
    lines = [torch.zeros(len(FIELDS), dtype=torch.int64) for _ in range(4)]
    ops = op.packed_backward, gated_activation_quantize_backward
    with Interpreted():
        for i, (found, kind) in enumerate(zip(zip(*each, strict=True), ops, strict=True)):
            asks = [Ask(kind, c, (own,)) for c, own in zip(found, lines[i::2], strict=True)]
            results = answer(asks)
            each[i] = [t for result in results for t in result]
    assert_same(*each)
    assert torch.equal(lines[0], lines[1]) and torch.equal(lines[2], lines[3]) and lines[0].any()


def test_opcheck() -> None:
    # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
    checks = ("test_faketensor", "test_autograd_registration")
    for case in CASES:
        torch.library.opcheck(op.packed_backward, call(case, torch.bfloat16)[0], test_utils=checks)


def test_nothing_of_no_tokens() -> None:
    packed, plain = call(CASES[1], torch.float32)

    def empty(args: tuple[Any, ...]) -> list[Any]:
        return [a[:0] if isinstance(a, Tensor) and a.dim() > 1 else a for a in args]

    expected = quantized_producers.triton_activation_backward(*empty(plain))
    assert_same(op.triton(*empty(packed)), expected)
