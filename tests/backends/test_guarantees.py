"""What holds for a model that a door has been opened on, whatever it is trained with."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.errors import NothingToRestore, StillRewritten
from tests.backends.toys import (
    Block,
    assert_like_eager,
    reasons,
    stack,
    tokens,
)
from tests.families import FAMILIES, Inputs, outputs, project
from tests.numerics import Judge, run

LTX = FAMILIES["ltx"]
NUM_BLOCKS = 2
Door = Callable[[nn.Module], nn.Module]


@pytest.fixture(params=["optimize", "swap"])
def door(request: pytest.FixtureRequest) -> Door:
    return getattr(fxopt, request.param)


@pytest.fixture
def model() -> nn.Module:
    return LTX.build()


@pytest.fixture
def eager() -> nn.Module:
    return LTX.build()


@pytest.fixture
def inputs() -> Inputs:
    return LTX.inputs(2, 0, torch.float32)


def block(model: nn.Module, index: int = 0) -> nn.Module:
    return model.transformer_blocks[index]


def assert_rewritten(model: nn.Module, door: Door) -> None:
    """Each block still runs what the door put there."""
    report = fxopt.report(model)
    assert report.count("norm_modulate") == 4 * NUM_BLOCKS
    assert not [d for d in report.declined if d.rule in ("capture", "swap")]


def test_state_dict_and_parameters_are_the_same(
    door: Door, model: nn.Module, inputs: Inputs
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    door(model)
    model(**inputs)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(m is modules[name] for name, m in model.named_modules())
    assert len(dict(model.named_modules())) == len(modules)


def test_frozen_weights(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    for m in (model, eager):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_("attn1" not in name and "norm" not in name)
    assert_like_eager(door(model), eager, inputs)
    assert_rewritten(model, door)


def test_all_but_one_weight_frozen(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs
) -> None:
    for m in (model, eager):
        m.requires_grad_(False)
        block(m).attn1.to_k.weight.requires_grad_()
    assert_like_eager(door(model), eager, inputs)


def lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(
        r=4, target_modules=["to_q", "to_v"], init_lora_weights=False, lora_dropout=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.inject_adapter_in_model(config, model)


def test_lora_before(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    assert_like_eager(door(lora(model)), lora(eager), inputs)


def test_lora_after(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    door(model)
    model(**inputs)
    assert_like_eager(lora(model), lora(eager), inputs)


def test_lora_settings_change_in_place(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs
) -> None:
    """peft keeps scales and merged adapters in a dict and a list of each layer."""
    door(lora(model))
    lora(eager)
    for m in (model, eager):
        m(**inputs)
        for layer in m.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scale_layer(3.0)
    assert_like_eager(model, eager, inputs)
    for m in (model, eager):
        for layer in m.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.merge()
    # 1e-4: fp32 rounding through two blocks. An adapter that counts twice differs by about 1.
    torch.testing.assert_close(model(**inputs)[0], eager(**inputs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_get_peft_model(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs, when: str
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)

    def wrap(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(model, config)

    if when == "before":
        wrapped = door(wrap(model))
    else:
        door(model)
        model(**inputs)
        wrapped = wrap(model)
    assert_like_eager(wrapped, wrap(eager), inputs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("first_call", ["plain", "checkpointed"])
def test_checkpointed_blocks(
    door: Door, eager: nn.Module, inputs: Inputs, use_reentrant: bool, first_call: str
) -> None:
    """diffusers' own switch; its checkpoint function is replaced to choose the kind."""
    model = door(copy.deepcopy(eager))
    if first_call == "plain":
        model(**inputs)

    def checkpointing(function: Callable, *args: object) -> object:
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    judge = Judge(eager, inputs)
    model.enable_gradient_checkpointing(checkpointing)
    # Reentrant: a gradient must come from an input.
    judge(model)
    assert_rewritten(model, door)


def test_selective_checkpoint(door: Door, eager: nn.Module, inputs: Inputs) -> None:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    model = door(copy.deepcopy(eager))
    policy = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def checkpointing(function: Callable, *args: object) -> object:
        def contexts() -> object:
            return create_selective_checkpoint_contexts(policy)

        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    judge = Judge(eager, inputs)
    model.enable_gradient_checkpointing(checkpointing)
    judge(model)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    assert_like_eager(door(model), eager, inputs, autocast)


def test_autocast_after_a_call_without(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs
) -> None:
    door(model)
    assert_like_eager(model, eager, inputs)
    assert_like_eager(model, eager, inputs, autocast)
    assert_like_eager(model, eager, inputs)


def test_autocast_in_front_of_an_attention_that_widens() -> None:
    """With dropout a CPU attends in fp32, which is not a cast of autocast's."""

    class Drops(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            q, k, v = (f(x_BSC).unflatten(-1, (2, 16)).transpose(1, 2) for f in self.projections())
            k = self.attn.norm_k(k.float())
            return (
                F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9).transpose(1, 2).flatten(2)
            )

        def projections(self) -> list[nn.Module]:
            return [self.attn.to_q, self.attn.to_k, self.attn.to_v]

    model, eager = fxopt.optimize(stack(Drops)), stack(Drops)
    with autocast():
        # 2 roundings of bf16, relative to the largest values.
        torch.testing.assert_close(model(tokens()), eager(tokens()), rtol=2**-7, atol=2**-7)
    assert not reasons(model)


def test_autocast_keeps_gradients_of_a_block_that_falls_back() -> None:
    """The first call runs the module beside the graph; autocast's cache must not see it."""

    class Declining(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            # Whole on the trial's inputs and elsewhere: the graph is refused after it has run.
            return super().forward(x_BSC) * (2 if x_BSC.shape[0] == 1 else 1)

    model, eager = fxopt.optimize(stack(Declining)), stack(Declining)
    with autocast():
        model(tokens(2))
        assert_like_eager(model, eager, {"x": tokens(1)})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs, mode: Callable
) -> None:
    door(model)
    with mode():
        (found,), (expected,) = outputs(model, inputs), outputs(eager, inputs)
    # 1e-4: fp32 rounding through two blocks.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    assert_like_eager(model, eager, inputs)
    assert_rewritten(model, door)


def test_train_and_eval(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    door(model)
    for mode in (True, False, True):
        assert_like_eager(model.train(mode), eager.train(mode), inputs)


def with_dropout(model: nn.Module, p: float = 0.3) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


def test_dropout_draws_the_masks_of_eager(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs
) -> None:
    door(with_dropout(model))
    with_dropout(eager)
    for _ in range(2):  # the first call tries the graph, which must draw nothing from the stream
        torch.manual_seed(3)
        (expected,), after = outputs(eager, inputs), torch.rand(())
        torch.manual_seed(3)
        (found,) = outputs(model, inputs)
        # 1e-4: fp32 rounding; another mask would differ by about 1.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.rand(()) == after
    (plain,) = outputs(eager.eval(), inputs)
    assert not torch.allclose(plain, expected, atol=0.01)
    torch.testing.assert_close(outputs(model.eval(), inputs)[0], plain, rtol=1e-4, atol=1e-4)


def test_hooks_on_a_block(door: Door, model: nn.Module, inputs: Inputs) -> None:
    calls = []
    door(model)
    first = block(model)
    first.register_forward_pre_hook(lambda *_: calls.append("forward pre"))
    first.register_forward_hook(lambda *_: calls.append("forward"))
    first.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    run(model, inputs)
    assert calls == ["forward pre", "forward", "backward pre", "backward"]
    assert_rewritten(model, door)


@pytest.mark.parametrize("when", ["before the first call", "after the first call"])
@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__.removeprefix("register_"),
)
def test_hooks_inside_a_block_are_called(
    door: Door, eager: nn.Module, inputs: Inputs, when: str, register: Callable
) -> None:
    """The block with the hook falls back while it is there, others share its class and do not."""
    model, calls = door(copy.deepcopy(eager)), []
    if when == "after the first call":
        run(model, inputs)
    handle = register(block(model, 1).ff.net[0], lambda *_: calls.append(1))
    run(model, inputs)
    assert calls == [1]
    assert_like_eager(model, eager, inputs)
    handle.remove()
    calls.clear()
    assert_like_eager(model, eager, inputs)
    assert not calls


def test_a_hook_that_changes_values(door: Door, eager: nn.Module, inputs: Inputs) -> None:
    model = door(copy.deepcopy(eager))
    run(model, inputs)
    for m in (model, eager):
        block(m).attn1.to_q.register_forward_hook(lambda module, args, output: 2 * output)
    assert_like_eager(model, eager, inputs)


def test_global_hooks_are_called(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs
) -> None:
    door(model)
    model(**inputs)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        eager(**inputs)
        expected = seen.copy()
        seen.clear()
        model(**inputs)
    finally:
        handle.remove()
    assert seen == expected


@pytest.mark.parametrize("when", ["before the first call", "after the first call"])
def test_deepcopy_is_rewritten_and_independent(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs, when: str
) -> None:
    door(model)
    if when == "after the first call":
        model(**inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_like_eager(twin, eager, inputs)
    assert_rewritten(twin, door)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    for forward in (block(twin).__dict__["forward"], block(twin, 1).__dict__["forward"]):
        assert forward.module in (block(twin), block(twin, 1))
    fxopt.restore(twin)
    assert "forward" not in block(twin).__dict__
    assert "forward" in block(model).__dict__


def test_saving(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    door(model)
    model(**inputs)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    eager.load_state_dict(torch.load(file))
    with pytest.raises(StillRewritten, match="call fxopt"):
        torch.save(model, io.BytesIO())
    fxopt.restore(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(**inputs)[0], eager(**inputs)[0])


def test_restore_is_exact(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    door(model)
    run(model, inputs)
    assert fxopt.restore(model) is model
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert not [m for m in model.modules() if m._forward_hooks]
    found, expected = run(model, inputs), run(eager, inputs)
    for name, t in expected.items():
        assert t is None if found[name] is None else torch.equal(found[name], t), name


def test_restore_under_a_wrapper_of_the_user(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs
) -> None:
    door(model)
    model(**inputs)
    own, calls = block(model).forward, []

    def wrapper(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return own(*args, **kwargs)

    block(model).forward = wrapper
    fxopt.restore(model)
    assert block(model).forward is wrapper
    found, expected = run(model, inputs), run(eager, inputs)
    for name, t in expected.items():
        assert t is None if found[name] is None else torch.equal(found[name], t), name
    assert len(calls) == 1


def test_a_block_that_was_copied_out_is_restored(
    door: Door, model: nn.Module, inputs: Inputs
) -> None:
    door(model)
    model(**inputs)
    stage = nn.Sequential(copy.deepcopy(block(model)), copy.deepcopy(block(model, 1)))
    with pytest.raises(StillRewritten):
        torch.save(stage, io.BytesIO())
    fxopt.restore(stage)
    torch.save(stage, io.BytesIO())
    assert not [m for m in stage.modules() if "forward" in vars(m)]
    assert "forward" in vars(block(model))
    with pytest.raises(NothingToRestore):
        fxopt.restore(stage)


def test_twice_is_once(door: Door, model: nn.Module, inputs: Inputs) -> None:
    door(model)
    model(**inputs)
    forward, counts = block(model).forward, fxopt.report(model).counts()
    door(model)
    model(**inputs)
    assert block(model).forward is forward
    assert fxopt.report(model).counts() == counts
    fxopt.restore(model)
    assert "forward" not in vars(block(model))


@pytest.mark.parametrize("first", ["optimize", "swap"])
def test_one_door_after_the_other(
    model: nn.Module, eager: nn.Module, inputs: Inputs, first: str
) -> None:
    second = "swap" if first == "optimize" else "optimize"
    getattr(fxopt, first)(model)
    model(**inputs)
    getattr(fxopt, second)(model)
    assert_like_eager(model, eager, inputs)
    assert fxopt.report(model).count("norm_modulate") >= 4 * NUM_BLOCKS
    (optimized,) = (d for d in model._fxopt_doors if hasattr(d, "blocks"))
    assert len({id(b.captures) for b in optimized.blocks}) == 1
    fxopt.restore(model)
    assert torch.equal(model(**inputs)[0], eager(**inputs)[0])


def test_float64(door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs) -> None:
    door(model)
    found, expected = run(model, inputs, torch.float64), run(eager, inputs, torch.float64)
    for name, t in expected.items():
        if t is not None:
            # 1e-6: blocks keep islands in fp32.
            torch.testing.assert_close(found[name], t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("when", ["first", "after a call"])
def test_functional_call(
    door: Door, model: nn.Module, eager: nn.Module, inputs: Inputs, when: str
) -> None:
    """Parameters that are no `nn.Parameter`, and autograd through what made them."""
    door(model)
    if when == "after a call":
        model(**inputs)
    scale = [torch.ones((), requires_grad=True) for _ in range(2)]
    for m, s in zip((model, eager), scale, strict=True):
        parameters = {n: p.detach() * s for n, p in m.named_parameters()}
        project([torch.func.functional_call(m, parameters, (), inputs)[0]]).backward()
    # 1e-3: one number summed from all parameters' gradients in fp32.
    torch.testing.assert_close(scale[0].grad, scale[1].grad, rtol=1e-3, atol=1e-3)
