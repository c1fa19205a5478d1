"""The all-gather of codes under FSDP2: bit for bit the same training, at half the bytes."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.recipe_errors import AllGatherInGraph, CannotGather, WeightGathered
from tests.backends.gathered_ranks import (
    BF16,
    assert_bit_equal,
    backward,
    batch,
    counted,
    gradients,
    num_gathered,
    recipe_of,
    shard,
    train,
    trained,
)
from tests.backends.toys import Block, Stack, stack, tokens
from tests.families import seeded
from tests.ranks import needs_gloo, spawn

FP32 = MixedPrecisionPolicy()
NUM_LINEARS = 12  # of two blocks


def half_the_bytes(rank: int) -> None:
    world_size = dist.get_world_size()
    make, num_linears = (stack, NUM_LINEARS) if world_size == 2 else (narrow, 4)
    for recipe in ("fp8_tensorwise", "fp8_rowwise"):
        model, other = assert_bit_equal(train, recipe=recipe, make=make)
        assert num_gathered(model) == num_linears
        sizes = [(p.numel(), p.dim() == 2) for p in model.blocks.parameters()]
        weights = sum(size for size, is_weight in sizes if is_weight)
        rest = sum(size for size, is_weight in sizes if not is_weight)
        for which, bytes_per_weight, num_reductions in ((model, 1, 1), (other, 2, 0)):
            with counted() as found:
                backward(which)
            # Each rank gives its part, once for the forward and once for the backward.
            assert found.gathered * world_size == 2 * (bytes_per_weight * weights + 2 * rest)
            assert found.num_reductions == num_reductions


def hybrid(model: nn.Module) -> None:
    """Two replicas, each of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def in_replicas(rank: int) -> None:
    if dist.get_world_size() == 4:
        assert_bit_equal(train, make=narrow, sharding=hybrid)


@needs_gloo
@pytest.mark.parametrize("world_size", [2, 4])
def test_half_the_bytes_and_one_reduction_a_step(tmp_path: Path, world_size: int) -> None:
    spawn(tmp_path, world_size, half_the_bytes, in_replicas)


def uneven(rank: int) -> None:
    # 32 rows over 3 ranks are 11, 11 and 10, and 16 are 6, 6 and 4: the last rank pads.
    assert_bit_equal(train, recipe="fp8_rowwise_gw_hp", make=narrow)
    assert_bit_equal(train, make=narrow, sharding=in_fp32)


class Narrow(nn.Module):
    """A frozen linear of 16 outputs and a trained one."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 16), nn.Linear(16, 32)
        self.up.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def narrow() -> nn.Module:
    return stack(Narrow)


def in_fp32(model: nn.Module) -> None:
    shard(model, FP32)


@needs_gloo
def test_uneven_shards(tmp_path: Path) -> None:
    spawn(tmp_path, 3, uneven)


class Steered(Stack):
    """Blocks that a step skips, or computes again in its backward."""

    def __init__(self) -> None:
        super().__init__(Block)
        self.skipped, self.checkpoints = -1, False

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i != self.skipped:
                again = self.checkpoints and self.training
                x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x


def steered() -> nn.Module:
    return seeded(Steered)()


def in_one_group(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=BF16)


def kept_after_forward(model: nn.Module) -> None:
    shard(model, reshard_after_forward=False)


def a_long_day(model: nn.Module) -> list[Tensor]:
    """Whatever a training loop may do between two steps."""
    found = train(model)
    model.eval()
    with torch.no_grad():  # another kind of call, and other sizes: captured while codes are there
        found += [model(batch()), model(batch(num_tokens=9))]
    with torch.inference_mode():
        found.append(model(batch()).clone())
    model.train()
    model.checkpoints = True
    found += train(model, num_steps=1)
    # A block that is skipped keeps what was found for it before the weights were written.
    for model.skipped in (1, 0, -1):
        found += train(model, num_steps=1)
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.5)  # no record of this is left
    found += train(model, num_steps=1)
    state = {k: v * 0.9 for k, v in get_model_state_dict(model).items()}
    set_model_state_dict(model, state)
    found += train(model, num_steps=1)
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)
    found.append(backward(model))
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)
    return [*found, backward(model), *gradients(model)]


def overlapping(model: nn.Module) -> list[Tensor]:
    """Backwards that come when the codes are gathered, of forwards that read the weights."""
    losses = [model(batch()).float().square().mean() for _ in range(2)]
    losses[0].backward()
    losses.append(model(batch()).float().square().mean())
    for loss in losses[1:]:
        loss.backward()
    return [*losses, *gradients(model), *train(model, num_steps=1)]


def in_training(rank: int) -> None:
    model, _ = assert_bit_equal(a_long_day, make=steered)
    state = model.state_dict()
    assert list(state) == list(steered().state_dict())
    assert all(type(t) is DTensor and t.dtype == torch.float32 for t in state.values())
    assert_bit_equal(overlapping)
    assert_bit_equal(train, sharding=in_one_group)
    assert_bit_equal(train, sharding=kept_after_forward)
    assert_bit_equal(train, recipe="fp8_rowwise", door=fxopt.swap)


def micro_batches(model: nn.Module) -> list[Tensor]:
    """Two for a step, the second step in the same scope."""
    found, optimizer = train(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with fxopt.cast_weights_once():
        for _ in range(2):
            found += [backward(model), backward(model), *gradients(model)]
            optimizer.step()
            optimizer.zero_grad()
    return found


def scopes(rank: int) -> None:
    model, _ = assert_bit_equal(micro_batches)
    with counted() as found:
        micro_batches(model)
    assert found.num_reductions == 3 + 2  # of the steps of `train`, and of those in the scope
    with counted() as found:
        backward(model)
        backward(model)
    assert found.num_reductions == 2  # what may be written between them is seen
    with fxopt.cast_weights_once():
        backward(model)
        for p in model.parameters():
            p.data.mul_(1.5)
        with pytest.raises(RuntimeError, match="written without PyTorch's knowledge"):
            backward(model)


def not_finite(rank: int) -> None:
    """One rank's NaN, of either sign, is every rank's; an Inf does not become the largest code."""
    for value in (torch.nan, -torch.nan, torch.inf):
        model, _ = trained("fp8", partial(train, num_steps=2), make=narrow)
        if dist.get_rank() == 1:
            model.blocks[0].up.weight.to_local().data[0, 0] = value
        assert model(batch()).isnan().all()


@needs_gloo
def test_nothing_that_a_training_loop_does_makes_a_difference(tmp_path: Path) -> None:
    spawn(tmp_path, 2, in_training, scopes, not_finite)


def doors(rank: int) -> None:
    model = fxopt.optimize(stack(), recipe=recipe_of("fp8", "fp8"))
    shard(model)
    own, (declined,) = dict(model.named_parameters()), reasons_of(model)
    assert "until a forward and backward" in declined
    train(model)
    assert dict(model.named_parameters()) == own and num_gathered(model) == NUM_LINEARS
    copies = gathered_whole(model)
    check_refusals(model)
    # A restored model gathers the weights, and is as accurate as one that was never changed.
    fxopt.restore(model)
    plain = stack()
    shard(plain)
    set_model_state_dict(plain, copies)
    for name, parameter in model.named_parameters():
        assert parameter is own[name]
    assert all(map(torch.equal, train(model), train(plain)))
    assert len(model._forward_pre_hooks) == len(plain._forward_pre_hooks)


def gathered_whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in get_model_state_dict(model).items()}


def reasons_of(model: nn.Module) -> list[str]:
    declined = fxopt.report(model).declined
    return list(dict.fromkeys(w for d in declined if d.rule == "fp8_all_gather" for w in d.reasons))


def check_refusals(model: nn.Module) -> None:
    """What would read a weight of which codes alone are there."""
    handle = model.blocks[0].up.register_forward_hook(lambda *_: None)
    with pytest.raises(WeightGathered, match=r"'blocks.0.* runs its own forward"):
        backward(model)
    handle.remove()
    with pytest.raises(WeightGathered, match=r"norm_modulate_linears\.default reads it as well"):
        model.eval()(batch(num_tokens=1))  # captured anew; one row per sample is not quantized
    model.train()
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda block, _: seen.append(block.up.weight.isnan().all())
    )
    backward(model)
    handle.remove()
    assert all(seen)  # whoever looks sees no number
    model.zero_grad()


def declining(rank: int) -> None:
    """Models of which no weight, or not every weight, can be gathered as codes."""
    for recipe, sharding, why in (
        ("fp8", offloaded, "offloaded to the CPU"),
        ("fp8_rowwise", kept_after_forward, "reshard_after_forward=True"),
        ("fp8", by_columns, "another way than by rows"),
    ):
        with pytest.raises(CannotGather, match=why):
            trained("fp8", train, recipe=recipe, sharding=sharding)
    with pytest.raises(CannotGather, match="autocast casts it"):
        trained("fp8", under_autocast, sharding=in_fp32)
    # What a linear that stays in the model's dtype reads is gathered whole.
    recipe = dataclasses.replace(recipe_of("fp8", "fp8"), keep=("*.attn.to_out",))
    model = stack()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    fxopt.optimize(model, recipe=recipe)
    in_one_group(model)
    train(model)
    assert num_gathered(model) == NUM_LINEARS - 2 - 2
    assert reasons_of(model) == ["several modules share it"]
    # Scales per row: a forward in the backward reads what was gathered for the forward.
    model, _ = trained("fp8", train, recipe="fp8_rowwise", make=steered)
    model.checkpoints = True
    with pytest.raises(WeightGathered, match="no checkpoint"):
        backward(model)


def under_autocast(model: nn.Module) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return train(model)


def offloaded(model: nn.Module) -> None:
    shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def by_columns(model: nn.Module) -> None:
    shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else Shard(0))


@needs_gloo
def test_restore_and_refusals(tmp_path: Path) -> None:
    spawn(tmp_path, 2, doors, declining)


def test_compilers_refuse() -> None:
    recipe = recipe_of("fp8", "fp8")
    with pytest.raises(AllGatherInGraph):
        fxopt.optimize(stack(), recipe=recipe, execution="compile")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="all_gather='fp8'"):
        torch.compile(stack(), backend="fxopt", options={"recipe": recipe})(tokens())


def test_without_fsdp_it_changes_nothing() -> None:
    found = []
    for all_gather in ("model", "fp8"):
        model = fxopt.optimize(stack(), recipe=recipe_of("fp8", all_gather))
        found.append([model(tokens()), *copy.deepcopy(model).state_dict().values()])
        fxopt.restore(model)
        assert not model._forward_pre_hooks
    assert all(map(torch.equal, *found))
