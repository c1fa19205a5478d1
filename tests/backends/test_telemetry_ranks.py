"""Telemetry on two processes: gathered parameters keep their names, ranks decide alike."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

import fxopt
from fxopt.gemms import gemm
from fxopt.recipes import Recipe
from tests.backends.test_fsdp import WORLD_SIZE, shard, step
from tests.backends.toys import stack, tokens
from tests.ranks import needs_gloo, spawn

TENSOR = "e4m3/tensor/fp32"
WGRAD = Recipe("wgrad", wgrad=gemm(TENSOR, TENSOR))


def worker(rank: int) -> None:
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16)):
        names_are_those_of_the_linears(rank, policy)
    ranks_decide_alike(rank)


def names_are_those_of_the_linears(rank: int, policy: MixedPrecisionPolicy) -> None:
    model, x = stack(num_blocks=3), tokens(batch=4).chunk(WORLD_SIZE)[rank]
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    fxopt.optimize(model, recipe="fp8")
    shard(model, policy)
    step(model, x)
    with fxopt.telemetry(model, every=2) as telemetry:
        for _ in range(3):
            telemetry.batch()
            step(model, x)
    report = telemetry.report()
    assert not report.unnamed
    for operand in ("x", "weight", "gradient"):
        found = [r for r in report.operands if r.operand == operand]
        assert {name for r in found for name in r.linears} == linears
        assert {r.samples for r in found} == {2}


def demoted(rank: int) -> list[tuple[str, str]]:
    """What is demoted after batches of which the second half underflows."""
    model, x = fxopt.optimize(stack(num_blocks=1), recipe=WGRAD), tokens(batch=4)
    weight = torch.ones(4, x.shape[1], 1)
    weight[2:, 1:] = 1e-9
    x, weight = (t.chunk(WORLD_SIZE)[rank] for t in (x, weight))
    with fxopt.telemetry(model, every=2, demote_above=0.3, patience=1) as telemetry:
        for _ in range(5):
            telemetry.batch()
            (model(x) * weight).sum().backward()
    return sorted(telemetry.report().demoted)


def ranks_decide_alike(rank: int) -> None:
    found: list[list[tuple[str, str]]] = [[]] * WORLD_SIZE
    dist.all_gather_object(found, demoted(rank))
    assert found[0] == found[1] and ("blocks.0.down", "wgrad") in found[0]


@needs_gloo
def test_on_two_processes(tmp_path: Path) -> None:
    # The rank whose values do not underflow would demote nothing, alone.
    assert not demoted(0) and demoted(1)
    spawn(tmp_path, WORLD_SIZE, worker)
