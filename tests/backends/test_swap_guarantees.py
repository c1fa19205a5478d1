"""What swap leaves as it was, and what works on a swapped model as on any other."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.backends.eager import swap
from fxopt.backends.swaps.fused import counting
from fxopt.errors import (
    StillRewritten,
)
from tests.backends.swapping import COUNTS, draw_arguments, same
from tests.families import FAMILIES, Family, loss
from tests.numerics import Judge, relative_l2, run
from tests.ranks import needs_gloo, spawn


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def flux() -> Family:
    return FAMILIES["flux"]


def test_state_and_restore(family: Family) -> None:
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    before = run(model, inputs)
    classes = [type(m) for m in model.modules()]
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    swap(model)
    run(model, inputs)
    assert [type(m) for m in model.modules()] == classes
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    pickle.dumps(model.state_dict())

    assert fxopt.restore(model) is model
    assert not any("forward" in vars(m) or "_fxopt_doors" in vars(m) for m in model.modules())
    after = run(model, inputs)
    assert all(t is None or torch.equal(t, after[name]) for name, t in before.items())


def test_twice_is_once(flux: Family) -> None:
    model = swap(flux.build())
    forwards = [vars(m).get("forward") for m in model.modules()]
    swap(model)
    assert all(vars(m).get("forward") is f for m, f in zip(model.modules(), forwards, strict=True))
    assert fxopt.report(model).counts() == COUNTS["flux"]


def test_a_deep_copy_has_its_own_parameters(flux: Family) -> None:
    model, inputs = swap(flux.build()), flux.inputs(2, 0, torch.float32)
    before = run(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with counting() as fired:
        after = run(twin, inputs)
    assert all(t is None or torch.equal(t, after[name]) for name, t in before.items())
    assert Counter(rule for rule, _ in fired) == COUNTS["flux"]
    fxopt.restore(twin)
    assert not any("forward" in vars(m) for m in twin.modules())
    assert any("forward" in vars(m) for m in model.modules())


def test_a_swapped_model_is_pickled_after_restore_only(flux: Family) -> None:
    model = swap(flux.build())
    with pytest.raises(StillRewritten, match="restore"):
        pickle.dumps(model)
    assert pickle.dumps(fxopt.restore(model))


def test_proofs_leave_the_random_state_alone(flux: Family) -> None:
    model = flux.build()
    state = torch.get_rng_state()
    swap(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_values_is_proved_all_the_same(flux: Family) -> None:
    model = flux.build().to("meta")
    assert fxopt.report(swap(model)).counts() == COUNTS["flux"]


@pytest.mark.parametrize("name", ["flux", "z-image", "qwen3-sdpa"])
def test_frozen_weights(name: str) -> None:
    def freeze(model: nn.Module) -> None:
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i % 3 == 0)

    assert same(FAMILIES[name].build(), FAMILIES[name], freeze) == COUNTS[name]


def test_parameters_of_two_dtypes() -> None:
    """bf16 with tables and norms in fp32, as diffusers loads Wan."""
    family = FAMILIES["wan"]
    model, inputs = family.build().to(torch.bfloat16), family.inputs(2, 0, torch.bfloat16)
    for path, p in model.named_parameters():
        if "scale_shift_table" in path or path.endswith("norm2.weight"):
            p.data = p.data.float()
    model.scale_shift_table.data = model.scale_shift_table.data.bfloat16()  # not of a block
    judge = Judge(model, inputs)
    swap(model)
    with counting() as fired:
        found = run(model, inputs)
    judge(model, "mixed", found)
    assert Counter(rule for rule, _ in fired) == COUNTS["wan"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(flux: Family, use_reentrant: bool) -> None:
    def enable(model: nn.Module) -> None:
        model.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant)
        )

    # Reentrant checkpointing has no gradient to give where no input has one: FLUX's embedders are
    # outside the blocks, so its inputs do. Each block runs once more in the backward.
    twice = {rule: 2 * count for rule, count in COUNTS["flux"].items()}
    assert same(flux.build(), flux, enable) == twice


def test_autocast_runs_the_own_forward(flux: Family) -> None:
    model, inputs = flux.build(), flux.inputs(2, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model, inputs)
        swap(model)
        swapped = run(model, inputs)
    assert all(t is None or torch.equal(t, swapped[name]) for name, t in eager.items())
    assert any("autocast" in r for d in fxopt.report(model).declined for r in d.reasons)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_evaluation(flux: Family, mode: type) -> None:
    model, inputs = flux.build().eval(), flux.inputs(2, 0, torch.float32)
    eager = loss(model, inputs)
    swap(model)
    with mode(), counting() as fired:
        # 1e-5: one projection of fp32 outputs, whose roundings differ.
        torch.testing.assert_close(loss(model, inputs), eager.detach(), rtol=1e-5, atol=1e-5)
    assert Counter(rule for rule, _ in fired) == COUNTS["flux"]
    model.train()
    Judge(flux.build(), inputs)(model, "train")


def test_hooks_of_the_block_run_and_those_inside_bring_the_own_forward_back(flux: Family) -> None:
    model, inputs = swap(flux.build()), flux.inputs(2, 0, torch.float32)
    calls = []
    block = model.transformer_blocks[0]
    block.register_forward_hook(lambda *_: calls.append("block"))
    with counting() as all_fused:
        eager = run(model, inputs)
    handle = block.ff.register_forward_hook(lambda *_: calls.append("ff"))
    with counting() as three_fused:
        hooked = run(model, inputs)
    handle.remove()
    assert calls == ["block", "ff", "block"]
    assert len(three_fused) == len(all_fused) - 28  # one double block less
    for name, t in eager.items():
        # 1e-4: fp32 through four blocks, one of which rounds differently.
        assert t is None or relative_l2(hooked[name], t.double()) < 1e-4, name
    assert any("hooks" in r for d in fxopt.report(model).declined for r in d.reasons)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(flux: Family, when: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def wrap(model: nn.Module) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False)
        inject_adapter_in_model(config, model)

    model = flux.build()
    if when == "after":
        swap(model)
        wrap(model)
        fired = same(model, flux, lambda _: None)
    else:
        fired = same(model, flux, wrap)
    assert fired["qk_norm_rope"] == 8
    assert fired["norm_modulate"] == 16
    assert fired["merge_linears"] < 18  # wrapped linears are called as modules


def test_replaced_parameters_are_the_ones_used(flux: Family) -> None:
    model, inputs = swap(flux.build()), flux.inputs(2, 0, torch.float32)
    run(model, inputs)
    linear = model.transformer_blocks[0].attn.to_q
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    reference = flux.build()
    reference.load_state_dict(model.state_dict())
    Judge(reference, inputs)(model, "replaced")


def test_dropout_is_honoured(flux: Family) -> None:
    model, inputs = flux.build(), flux.inputs(2, 0, torch.float32)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.5
    eager = []
    for _ in range(2):
        torch.manual_seed(0)
        eager.append(loss(model, inputs).item())
        swap(model)
    torch.manual_seed(1)
    other = loss(model, inputs).item()
    counts = fxopt.report(model).counts()
    # 1e-4: fp32 outputs of order one, summed; another mask changes the sum by far more.
    assert eager[0] == pytest.approx(eager[1], rel=1e-4)
    assert other != pytest.approx(eager[0], rel=1e-2)
    assert counts["merge_linears"] == COUNTS["flux"]["merge_linears"] - 4  # `out` of four MLPs


def test_optimize_after_swap_and_the_reverse(flux: Family) -> None:
    inputs = flux.inputs(2, 0, torch.float32)
    judge = Judge(flux.build(), inputs)
    for doors in ((swap, fxopt.optimize), (fxopt.optimize, swap)):
        model = flux.build()
        for door in doors:
            door(model)
        judge(model, str(doors))
        report = fxopt.report(model)
        assert report.count("norm_modulate") >= COUNTS["flux"]["norm_modulate"]
        fxopt.restore(model)
        assert not any("forward" in vars(m) for m in model.modules())


def test_gradients_by_sample_are_those_of_the_own_forward() -> None:
    family = FAMILIES["llama-eager"]
    model, eager = fxopt.swap(family.build()), family.build()
    x = torch.randn(2, 1, 5, 64, generator=torch.Generator().manual_seed(0))

    def gradients(of: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            inputs = {"inputs_embeds": x, "use_cache": False}
            return torch.func.functional_call(of, parameters, kwargs=inputs).logits.square().mean()

        parameters = {name: p.detach() for name, p in of.named_parameters()}
        return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    found, expected = gradients(model), gradients(eager)
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_what_a_trainer_passes_through_the_layers() -> None:
    family = FAMILIES["llama-sdpa"]
    model, inputs = fxopt.swap(family.build()), family.inputs(2, 0, torch.float32)
    model(**inputs, labels=inputs["input_ids"], num_items_in_batch=torch.tensor(40))
    report = fxopt.report(model)
    assert report.count("norm_modulate") == 2
    assert not [d for d in report.declined if d.rule == "swap"]


def test_dynamo_sees_the_own_forward(flux: Family) -> None:
    model = swap(flux.build())
    block = model.transformer_blocks[0]
    graphs = []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(gm)
        return gm

    _, example = draw_arguments(block)
    with torch.no_grad():
        torch.compile(block, backend=backend, fullgraph=True)(**example)
    assert not any("fxopt" in str(n.target) for gm in graphs for n in gm.graph.nodes)
    assert "layer_norm" in str([n.target for gm in graphs for n in gm.graph.nodes])


def _train_sharded(folder: Path, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    found = {}
    for order in ("swap then shard", "shard then swap"):
        model = FAMILIES["flux"].build()
        for door in order.split(" then "):
            if door == "swap":
                swap(model)
                continue
            for block in (*model.transformer_blocks, *model.single_transformer_blocks, model):
                fully_shard(block)
        with counting() as fired:
            value = loss(model, FAMILIES["flux"].inputs(2, rank, torch.float32))
        value.backward()
        gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        found[order] = value.item(), gradients, Counter(rule for rule, _ in fired)
    torch.save(found, folder / f"{rank}")


@needs_gloo
def test_fully_shard_before_and_after(flux: Family, tmp_path: Path) -> None:
    spawn(tmp_path, 2, partial(_train_sharded, tmp_path))
    model = flux.build()
    losses = [loss(model, flux.inputs(2, rank, torch.float32)) for rank in range(2)]
    (sum(losses) / 2).backward()
    for rank in range(2):
        for order, result in torch.load(tmp_path / f"{rank}", weights_only=False).items():
            value, gradients, fired = result
            assert fired == COUNTS["flux"], order
            # 1e-4: fp32 through four blocks.
            assert value == pytest.approx(losses[rank].item(), rel=1e-4), order
            for name, p in model.named_parameters():
                assert relative_l2(gradients[name], p.grad.double()) < 1e-4, (order, name)
