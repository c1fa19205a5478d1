"""FSDP2 on two processes: the loss and the gathered gradients are those of one process."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fxopt
from tests.backends.toys import Block, Stack, counting_graph_runs, reasons, stack, tokens
from tests.ranks import needs_gloo, spawn

WORLD_SIZE = 2
Gradients = dict[str, torch.Tensor]


def shard(model: nn.Module, policy: MixedPrecisionPolicy) -> None:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """Mean loss over the batch and its gradients, gathered."""
    model.zero_grad()
    loss = model(x).float().square().mean()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return loss.detach(), gradients


def worker(rank: int) -> None:
    for order in ("optimize, then shard", "shard, then optimize", "between steps"):
        check(order, rank, MixedPrecisionPolicy(), tolerance=1e-5)  # fp32, sums reordered
        assert not dist.barrier()
    # bf16 keeps 8 bits, and gradients are reduced in bf16 by this policy.
    check("optimize, then shard", rank, MixedPrecisionPolicy(torch.bfloat16), tolerance=3e-2)


def check(order: str, rank: int, policy: MixedPrecisionPolicy, tolerance: float) -> None:
    model, x = stack(num_blocks=3), tokens(batch=4)
    expected_loss, expected = step(copy.deepcopy(model), x)
    if order == "optimize, then shard":
        fxopt.optimize(model)
    shard(model, policy)
    if order == "between steps":
        step(model, x.chunk(WORLD_SIZE)[rank])
    if order != "optimize, then shard":
        fxopt.optimize(model)
    assert list(model.state_dict()) == list(expected)
    for _ in range(2):
        with counting_graph_runs() as runs:
            loss, gradients = step(model, x.chunk(WORLD_SIZE)[rank])
    assert len(runs) == 3, reasons(model)
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    for name, gradient in expected.items():
        found = gradients[name].to(gradient.dtype)
        error = (found - gradient).norm() / gradient.norm().clamp(min=1e-4)
        assert error < tolerance, f"{order}: {name} {error}"
    assert all(isinstance(p, DTensor) for p in model.parameters())


@needs_gloo
def test_fully_shard_per_block(tmp_path: Path) -> None:
    spawn(tmp_path, WORLD_SIZE, worker)


def test_the_model_here_is_rewritten() -> None:
    model = fxopt.optimize(Stack(Block))
    model(tokens())
    assert fxopt.report(model).counts() == {
        "qk_norm_rope": 4,
        "merge_qk": 2,
        "gated_activation": 2,
        "norm_modulate": 2,
        "fuse_bias": 4,
        "merge_linears": 6,
    }
