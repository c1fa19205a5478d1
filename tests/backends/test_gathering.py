"""The all-gather of codes under FSDP2: bit for bit the same training, at half the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.backends.gathered_ranks import (
    assert_bit_equal,
    backward,
    counted,
    num_gathered,
    spawn,
    train,
    trained,
)

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
FP32 = MixedPrecisionPolicy()
NUM_LINEARS = 12  # of two blocks


def half_the_bytes(rank: int, world_size: int) -> None:
    for recipe in ("fp8_tensorwise", "fp8_rowwise"):
        model = assert_bit_equal(train, recipe=recipe)
        assert num_gathered(model) == NUM_LINEARS
        other, _ = trained("model", train, recipe=recipe)
        sizes = [(p.numel(), p.dim() == 2) for p in model.blocks.parameters()]
        weights = sum(size for size, is_weight in sizes if is_weight)
        rest = sum(size for size, is_weight in sizes if not is_weight)
        for which, bytes_per_weight, num_reductions in ((model, 1, 1), (other, 2, 0)):
            with counted() as found:
                backward(which)
            # Each rank gives its part, once for the forward and once for the backward.
            assert found.gathered * world_size == 2 * (bytes_per_weight * weights + 2 * rest)
            assert found.num_reductions == num_reductions


@needs_gloo
@pytest.mark.parametrize("world_size", [2, 4])
def test_half_the_bytes_and_one_reduction_a_step(tmp_path: Path, world_size: int) -> None:
    spawn(half_the_bytes, tmp_path, world_size)
