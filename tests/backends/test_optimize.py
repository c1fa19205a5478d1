"""The options of `optimize`, what they do to a model, and the mistakes they answer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import errors
from tests.backends.toys import Block, Stack, assert_like_eager, captures, reasons, stack, tokens
from tests.families import FAMILIES


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(m)) for name, m in model.named_modules()}


def rewritten(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if "forward" in vars(m)]


def test_the_same_object_comes_back() -> None:
    model = stack()
    assert fxopt.optimize(model) is model
    assert rewritten(model) == ["blocks.0", "blocks.1"]
    assert type(model) is Stack
    assert not captures(model)
    assert fxopt.report(model).counts() == {}


def test_a_block_that_was_not_called_says_so() -> None:
    model = fxopt.optimize(stack())
    assert "not called yet" in reasons(model)[0]
    torch.compile(model, backend="eager")(tokens())
    assert 'backend="fxopt"' in reasons(model)[0]
    model(tokens())
    assert not reasons(model)


def test_example_inputs_capture_at_once() -> None:
    for example in ((tokens(),), {"x": tokens()}):
        torch.manual_seed(0)
        model = fxopt.optimize(stack(), example_inputs=example)
        drawn = torch.rand(())
        assert captures(model) == 1
        torch.manual_seed(0)
        assert torch.rand(()) == drawn
        assert all(p.grad is None for p in model.parameters())
        assert_like_eager(model, stack(), {"x": tokens(3)})
        assert captures(model) == 1


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, ["blocks.0", "blocks.1"]),
        ("blocks.1", ["blocks.1"]),
        (["blocks.*"], ["blocks.0", "blocks.1"]),
        (["blocks.0", "*.attn"], ["blocks.0", "blocks.1.attn"]),
        (Block, ["blocks.0", "blocks.1"]),
        ([nn.LayerNorm, "blocks.1"], ["blocks.0.norm1", "blocks.0.norm2", "blocks.1"]),
    ],
    ids=str,
)
def test_targets(targets: object, expected: list[str]) -> None:
    model = fxopt.optimize(stack(), targets=targets)
    assert rewritten(model) == expected
    assert_like_eager(model, stack())
    fxopt.restore(model)
    assert rewritten(model) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "bf61"}, errors.UnknownRecipe, "did you mean 'bf16'"),
        ({"execution": "compiled"}, errors.UnknownOption, "did you mean 'compile'"),
        ({"strict": ["qk_norm_rop"]}, errors.UnknownRule, "did you mean 'qk_norm_rope'"),
        ({"strict": "qk_norm_rop"}, errors.UnknownRule, "did you mean 'qk_norm_rope'"),
        ({"targets": [3]}, errors.TargetMatchesNothing, "targets='3' matches none"),
        ({"targets": ["block.*"]}, errors.TargetMatchesNothing, "blocks.0"),
        ({"targets": [nn.Conv2d]}, errors.TargetMatchesNothing, "Conv2d"),
        ({"targets": ["blocks.*", "none"]}, errors.TargetMatchesNothing, "none"),
        ({"example_inputs": {"y": tokens()}}, errors.InputMismatch, "'x'"),
        ({"example_inputs": ()}, errors.InputMismatch, "'x'"),
        ({"example_inputs": (tokens(), tokens())}, errors.InputMismatch, "too many"),
        ({"example_inputs": (tokens(2, 6, torch.float64),)}, RuntimeError, "dtype"),
        ({"example_inputs": (None,)}, Exception, ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_leaves_the_model_as_it_was(
    options: dict, error: type[Exception], message: str
) -> None:
    model = stack()
    before = attributes(model)
    with pytest.raises(error) as caught:
        fxopt.optimize(model, **options)
    assert message in str(caught.value)
    assert attributes(model) == before
    with pytest.raises(errors.NotReported):
        fxopt.report(model)
    with pytest.raises(errors.NothingToRestore):
        fxopt.restore(model)
    assert torch.equal(model(tokens()), stack()(tokens()))


@pytest.mark.parametrize("value", [None, "flux", 3, nn.Module, [nn.Linear(2, 2)]])
def test_not_a_module(value: object) -> None:
    for door in (fxopt.optimize, fxopt.restore):
        with pytest.raises(errors.NotAModule, match="expected a torch"):
            door(value)


def test_meta_model_that_should_run() -> None:
    with torch.device("meta"):
        model = Stack()
    before = attributes(model)
    with pytest.raises(errors.MetaModel, match=r"blocks\.0\.norm1\.weight"):
        fxopt.optimize(model, example_inputs=(tokens(),))
    assert attributes(model) == before
    fxopt.optimize(model)
    assert model(torch.empty(2, 6, 32, device="meta")).shape == (2, 6, 32)
    model = model.to_empty(device="cpu")
    model.load_state_dict(stack().state_dict())
    assert_like_eager(model, stack())


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(errors.UnsupportedTorch, match=r"2\.4\.1"):
        fxopt.optimize(model)
    assert rewritten(model) == []


def test_a_model_without_blocks_and_matches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    fxopt.optimize(model)
    torch.testing.assert_close(model(x), expected)
    report = fxopt.report(model)
    assert report.counts() == {}
    assert "nothing" in report.text().lower() or "no " in report.text().lower()
    fxopt.restore(model)
    assert rewritten(model) == []


def test_a_model_without_blocks_is_one_block() -> None:
    model = Block()
    eager = copy.deepcopy(model)
    fxopt.optimize(model)
    assert_like_eager(model, eager, {"x_BSC": tokens()})
    assert fxopt.report(model).count("gated_activation") == 1


def test_strict_rule_that_fires() -> None:
    model = fxopt.optimize(stack(), strict=["gated_activation", "qk_norm_rope"])
    model(tokens())
    model(tokens())
    assert not model._forward_hooks


@pytest.mark.parametrize("when", ["at the first call", "at once"])
def test_strict_rule_that_does_not_fire(when: str) -> None:
    class Relu(Block):
        def mlp(self, x_BSC: Tensor) -> Tensor:
            return self.down(self.up(x_BSC).relu())

    model, eager = stack(Relu), stack(Relu)
    before = attributes(model)
    with pytest.raises(errors.StrictRule, match="gated_activation"):
        if when == "at once":
            fxopt.optimize(model, strict=["gated_activation"], example_inputs=(tokens(),))
        else:
            fxopt.optimize(model, strict=["gated_activation"])(tokens())
    assert attributes(model) == before
    assert not model._forward_hooks
    assert torch.equal(model(tokens()), eager(tokens()))


def test_strict_names_the_nearest_miss() -> None:
    """A norm whose eps is trained: the reason and the line are the user's."""
    family = FAMILIES["ltx"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    with pytest.raises(errors.StrictRule, match="'attention' did not fire"):
        fxopt.optimize(model, strict=["attention"])(**inputs)


def test_strict_says_why_a_block_was_not_captured() -> None:
    class Asking(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            return super().forward(x_BSC) * float(x_BSC.detach().mean() > -9)

    with pytest.raises(errors.StrictRule, match=r"run blocks.0, blocks.1: torch.export: Guard"):
        fxopt.optimize(stack(Asking), strict=["gated_activation"])(tokens())


@pytest.mark.parametrize("when", ["at the first call", "at once"])
def test_a_second_call_that_fails_leaves_the_door_open(when: str) -> None:
    model = fxopt.optimize(stack(), example_inputs=(tokens(),))
    before = attributes(model)
    with pytest.raises(errors.StrictRule):
        if when == "at once":
            fxopt.optimize(model, strict=["attention"], example_inputs=(tokens(),))
        else:
            fxopt.optimize(model, strict=["attention"])(tokens())
    assert attributes(model) == before
    assert not model._forward_hooks
    assert fxopt.report(model).count("gated_activation") == 2


def test_restore_before_the_first_call_takes_strict_along() -> None:
    model = fxopt.optimize(stack(), strict=["attention"])
    fxopt.restore(model)
    assert not model._forward_hooks
    assert torch.equal(model(tokens()), stack()(tokens()))


def test_deepcopy_before_the_first_call_takes_strict_along() -> None:
    model = fxopt.optimize(stack(), strict=["gated_activation"])
    twin = copy.deepcopy(model)
    twin(tokens())
    assert not twin._forward_hooks
    assert_like_eager(model, stack())


@pytest.mark.parametrize("first", ["eager", "compile"])
def test_other_settings_on_the_same_model_are_refused(first: str) -> None:
    """Another value of `execution` or `targets` never falls back to what is there."""
    model = fxopt.optimize(stack(), execution=first, targets=["blocks.1"])
    before = attributes(model)
    other = {"eager": "compile", "compile": "eager"}[first]
    for asked, message in (
        ({"execution": other, "targets": ["blocks.1"]}, rf"={other!r} .*={first!r} already"),
        ({"targets": ["blocks.0"]}, r"targets=\['blocks.0'\] .*=\['blocks.1'\] already"),
        ({}, r"targets=None .*=\['blocks.1'\] already; call fxopt.restore"),
    ):
        with pytest.raises(errors.OtherSetting, match=message):
            fxopt.optimize(model, **{"execution": first} | asked)
        assert attributes(model) == before
    assert fxopt.optimize(model, execution=first, targets="blocks.1") is model
    fxopt.optimize(fxopt.restore(model), execution=other)


def test_example_inputs_capture_when_they_come() -> None:
    model = fxopt.optimize(fxopt.optimize(stack()), example_inputs=(tokens(),))
    assert fxopt.report(model).count("gated_activation") == 2


def test_a_door_that_fails_leaves_another_open() -> None:
    model, eager = fxopt.swap(FAMILIES["ltx"].build()), FAMILIES["ltx"].build()
    inputs = FAMILIES["ltx"].inputs(2, 0, torch.float32)
    counts = fxopt.report(model).counts()
    with pytest.raises(errors.StrictRule):
        fxopt.optimize(model, strict=["attention"])(**inputs)
    assert fxopt.report(model).counts() == counts
    assert_like_eager(model, eager, inputs)
    with pytest.raises(errors.InputMismatch):
        fxopt.optimize(model, example_inputs={})
    assert fxopt.report(model).counts() == counts


def test_compiled_in_place() -> None:
    model = stack()
    keys = list(model.state_dict())
    fxopt.optimize(model, execution="compile")
    assert list(model.state_dict()) == keys
    assert all(m._compiled_call_impl is not None for m in model.blocks)
    fxopt.restore(model)
    assert all(m._compiled_call_impl is None for m in model.blocks)
    assert torch.equal(model(tokens()), stack()(tokens()))


def test_restore_leaves_what_the_user_has_compiled() -> None:
    model = stack()
    model.blocks[0].attn.compile(backend="eager")
    compiled = model.blocks[0].attn._compiled_call_impl
    fxopt.optimize(model)(tokens())
    fxopt.restore(model)
    assert model.blocks[0].attn._compiled_call_impl is compiled


def test_a_forward_that_the_user_has_replaced() -> None:
    """Packages that move weights replace `forward` on the instance."""

    def replace(model: nn.Module) -> None:
        block = model.blocks[0]
        own = block.forward
        block.forward = lambda x_BSC: 2 * own(x_BSC)

    model, eager = stack(), stack()
    replace(model)
    replace(eager)
    replaced = model.blocks[0].forward
    fxopt.optimize(model)
    # 1e-4: fp32 rounding.
    torch.testing.assert_close(model(tokens()), eager(tokens()), rtol=1e-4, atol=1e-4)
    fxopt.restore(model)
    assert model.blocks[0].forward is replaced
    assert rewritten(model) == ["blocks.0"]
