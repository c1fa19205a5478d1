"""A recipe under FSDP2 on two processes: parameters stay plain, results are those of one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import fxopt
from fxopt.recipes import RECIPES
from tests.backends.test_fsdp import WORLD_SIZE, shard, step
from tests.backends.toys import stack, tokens
from tests.ranks import needs_gloo, spawn

# Scales of rows do not depend on how the batch is split, and the weights' gradients, whose rows run
# over the tokens, are in the model's dtype.
RECIPE = "fp8_rowwise_gw_hp"


def worker(rank: int) -> None:
    check(rank)


def check(rank: int) -> None:
    model, x = stack(num_blocks=3), tokens(batch=4)
    plain, _ = step(copy.deepcopy(model), x)
    whole = fxopt.optimize(copy.deepcopy(model), recipe=RECIPE)
    step(whole, x)
    expected_loss, expected = step(whole, x)
    assert fxopt.report(whole).count("quantized_linear") and expected_loss != plain
    fxopt.optimize(model, recipe=RECIPE)
    shard(model, MixedPrecisionPolicy())
    for _ in range(2):
        loss, gradients = step(model, x.chunk(WORLD_SIZE)[rank])
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    # A value that another order of fp32 sums takes across a tie of e4m3 moves by a step of 1/16.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-4)
        assert error < 2e-2, f"{name} {error}"
    with fxopt.cast_weights_once():
        once, in_scope = step(model, x.chunk(WORLD_SIZE)[rank])
        assert torch.equal(in_scope[name], gradients[name])
        # The next gather brings other values to the same tensor, of which PyTorch has no record.
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        inside, _ = step(model, x.chunk(WORLD_SIZE)[rank])
    outside, _ = step(model, x.chunk(WORLD_SIZE)[rank])
    assert torch.equal(inside, outside) and not torch.equal(inside, once)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


def saved_worker(rank: int) -> None:
    """Shards keep codes of activations as a whole model does."""
    recipe = replace(RECIPES[RECIPE], name="saved", saved="fp8")
    model, x = stack(num_blocks=3), tokens(batch=4)
    plain = step(fxopt.optimize(copy.deepcopy(model), recipe=RECIPE), x)
    expected = step(fxopt.optimize(copy.deepcopy(model), recipe=recipe), x)
    assert expected[0] == plain[0]
    shard(fxopt.optimize(model, recipe=recipe), MixedPrecisionPolicy())
    _, gradients = step(model, x.chunk(WORLD_SIZE)[rank])
    moved = []
    for name, gradient in expected[1].items():
        size = gradient.norm().clamp(min=1e-4)
        assert (gradients[name] - gradient).norm() / size < 2e-2, name  # as above
        moved.append((plain[1][name] - gradient).norm() / size)
    assert max(moved) > 1e-2


@needs_gloo
def test_sharded_blocks_train_in_fp8(tmp_path: Path) -> None:
    spawn(tmp_path, WORLD_SIZE, worker, saved_worker)
