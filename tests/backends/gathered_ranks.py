"""Ranks that train one model twice, weights gathered in the model's dtype and as codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.recipes import RECIPES, Recipe
from tests.backends.toys import stack, tokens

BF16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)


def recipe_of(name: str, all_gather: str) -> Recipe:
    return dataclasses.replace(RECIPES[name], all_gather=all_gather)


def shard(model: nn.Module, policy: MixedPrecisionPolicy = BF16, **options: Any) -> None:
    """FSDP2 around each block and around the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, **options)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def batch(num_tokens: int = 6) -> Tensor:
    """This rank's part of a batch of 12, which 2, 3 and 4 ranks can share."""
    whole = tokens(batch=12, num_tokens=num_tokens)
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def backward(model: nn.Module, x: Tensor | None = None) -> Tensor:
    loss = model(batch() if x is None else x).float().square().mean()
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def train(model: nn.Module, num_steps: int = 3) -> list[Tensor]:
    """Losses and gradients of some steps."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(num_steps):
        found += [backward(model), *gradients(model)]
        optimizer.step()
        optimizer.zero_grad()
    return found


Script = Callable[[nn.Module], list[Tensor]]


def trained(
    all_gather: str,
    script: Script,
    recipe: str = "fp8",
    door: Callable[..., nn.Module] = fxopt.optimize,
    make: Callable[[], nn.Module] = stack,
    sharding: Callable[[nn.Module], None] = shard,
) -> tuple[nn.Module, list[Tensor]]:
    """A model under a recipe and FSDP2, and what `script` returns for it."""
    model = make()
    door(model, recipe=recipe_of(recipe, all_gather))
    sharding(model)
    return model, script(model)


def num_gathered(model: nn.Module) -> int:
    """Number of weights that are gathered as codes."""
    return fxopt.report(model).count("fp8_all_gather")


def assert_bit_equal(script: Script, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Run `script` on models that gather codes and weights, and return them."""
    other, expected = trained("model", script, **settings)
    model, found = trained("fp8", script, **settings)
    assert num_gathered(model), fxopt.report(model)
    assert len(found) == len(expected)
    different = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not a.equal(b)]
    assert not different, f"of {len(found)} results {different} differ"
    assert all(t.isfinite().all() for t in found)
    return model, other


class Collectives(TorchDispatchMode):
    """Counts the bytes that this rank gives to all-gathers, and the all-reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.num_reductions = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.gathered += args[1].numel() * args[1].element_size()
        self.num_reductions += name == "c10d::allreduce_"
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Collectives]:
    with Collectives() as collectives:
        yield collectives
