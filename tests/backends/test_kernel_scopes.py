"""A scope of `sdpa_kernel` in a model's own code, or diffusers' word for one, is kept by graphs."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

import fxopt
from fxopt.passes.kernel_scopes import NotOneKernel, Scopes
from fxopt.recipe_errors import AttentionRefused
from fxopt.recipes import Recipe
from tests.backends.attention_doors import Door, asking, compiled, kernels, lines, optimized
from tests.backends.toys import Block, assert_like_eager, reasons, stack, tokens
from tests.families import FAMILIES, loss

MATH, FLASH = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
DOORS = (optimized, compiled)
pytestmark = pytest.mark.usefixtures("fresh")


class InScope(Block):
    """A block with its forward in a scope of one kernel or several."""

    allowed: ClassVar[Any] = MATH
    set_priority = False

    def forward(self, x_BSC: Tensor) -> Tensor:
        with sdpa_kernel(self.allowed, set_priority=self.set_priority):
            return super().forward(x_BSC)


class Several(InScope):
    allowed: ClassVar = [MATH, FLASH]


class InOrder(InScope):
    set_priority = True


class AfterAnother(InScope):
    """Inside of the scope one kernel, behind it another."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        return self.attn(super().forward(x_BSC))


class Nested(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        with sdpa_kernel(FLASH):
            with sdpa_kernel(MATH):
                x_BSC = self.attn(x_BSC)
            return super().forward(x_BSC)


class ByHand(Block):
    """Attention in matrix products, which no scope is about."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            heads = self.attn.to_q(self.norm1(x_BSC)).unflatten(-1, (2, 16)).transpose(1, 2)
            weights = (heads @ heads.mT / 4).softmax(-1)
            return x_BSC + self.attn.to_out((weights @ heads).transpose(1, 2).flatten(2))


class Masked(Block):
    """A mask that masks nothing, which a rule takes away."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        heads = self.attn.to_q(self.norm1(x_BSC)).unflatten(-1, (2, 16)).transpose(1, 2)
        mask = torch.ones(x_BSC.shape[1], x_BSC.shape[1], dtype=torch.bool, device=x_BSC.device)
        with sdpa_kernel(MATH):
            out = F.scaled_dot_product_attention(heads, heads, heads, mask)
        return x_BSC + self.attn.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("door", DOORS)
def test_one_kernel_is_what_the_model_asks_for(door: Door) -> None:
    model, before = stack(InScope), _cur_sdpa_kernel_backends()
    door(model, Recipe("bf16"))
    assert_like_eager(model, stack(InScope))
    assert kernels(partial(model, tokens())) == {"math": 2}
    assert set(lines(model)) == {"attention: math; as the model says"}
    assert fxopt.report(model).count("norm_modulate") and not reasons(model)
    assert _cur_sdpa_kernel_backends() == before


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "make, expected",
    [
        (AfterAnother, {"math": 2, "flash": 2}),
        (Nested, {"math": 2, "flash": 2}),
        (Masked, {"math": 2}),
        (ByHand, {"flash": 2}),
    ],
)
def test_each_attention_has_the_scope_that_it_stands_in(door: Door, make, expected) -> None:
    model = stack(make)
    door(model, Recipe("bf16"))
    assert_like_eager(model, stack(make))
    assert kernels(partial(model, tokens())) == expected and not reasons(model)


@pytest.mark.parametrize("outside", [MATH, FLASH])
@pytest.mark.parametrize("door", DOORS)
def test_what_is_allowed_around_it_is_another_matter(door: Door, outside: SDPBackend) -> None:
    """Also where it is the same when the block is captured."""
    model = stack(InScope)
    with sdpa_kernel(outside):
        door(model, Recipe("bf16"))
        model(tokens())
    assert kernels(partial(model, tokens())) == {"math": 2}
    assert set(lines(model)) == {"attention: math; as the model says"}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("make", [Several, InOrder])
def test_several_kernels_leave_the_block_as_it_is(door: Door, make) -> None:
    model, before = stack(make), torch._C._get_sdp_priority_order()
    door(model, Recipe("bf16"))
    assert torch.equal(model(tokens()), stack(make)(tokens()))
    assert any("chooses between several kernels" in why for why in reasons(model))
    assert not fxopt.report(model).applied
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize("door", DOORS)
def test_a_recipe_that_names_the_same_is_in_the_report(door: Door) -> None:
    model = stack(InScope)
    door(model, asking("math"))
    model(tokens())
    assert kernels(partial(model, tokens())) == {"math": 2}
    assert set(lines(model)) == {"attention: math; as the recipe and the model say"}


@pytest.mark.parametrize("asked", ["flash", "fp8"])
@pytest.mark.parametrize("door", DOORS)
def test_a_recipe_that_names_another_is_an_error(door: Door, asked: str) -> None:
    model = stack(InScope)
    door(model, asking(asked))
    with pytest.raises((AttentionRefused, BackendCompilerFailed)) as caught:
        model(tokens())
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, AttentionRefused) and error.backend == asked
    assert "the model's own code asks for 'math'" in str(error) and "attention='auto'" in str(error)


def test_what_pytorch_chooses_is_what_the_model_asks_for() -> None:
    model = fxopt.optimize(stack(InScope), recipe=asking("pytorch"))
    model(tokens())
    assert kernels(partial(model, tokens())) == {"math": 2}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.usefixtures("attention_backends")
def test_diffusers(door: Door) -> None:
    """Set before the first call, and changed behind it."""
    family = FAMILIES["flux"]
    inputs = family.inputs(2, 0, torch.float32)
    model = family.build()
    model.set_attention_backend("_native_math")
    expected = loss(model, inputs)
    door(model, Recipe("bf16"))
    # fp32 in another order, through four blocks.
    torch.testing.assert_close(loss(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert kernels(partial(loss, model, inputs)) == {"math": 4}
    assert set(lines(model)) == {"attention: math; as the model says"}
    assert fxopt.report(model).count("qk_norm_rope")
    model.set_attention_backend("_native_flash")
    loss(model, inputs)
    assert kernels(partial(loss, model, inputs)) == {"flash": 4}


def test_a_checkpoint_in_a_scope_is_left_alone() -> None:
    """The body of a higher-order op does not know of it."""

    class Checkpointed(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            with sdpa_kernel(MATH):
                run = super().forward
                return torch.utils.checkpoint.checkpoint(run, x_BSC, use_reentrant=False)

    model = stack(Checkpointed)
    compiled(model, Recipe("bf16"))
    model(tokens())
    assert any("chooses between several kernels" in why for why in reasons(model))


def test_explain_says_it_too() -> None:
    report = fxopt.explain(stack(InScope), example_inputs={"x": tokens()}, target="h100")
    assert {(a.backend, a.why) for a in report.attentions} == {("math", "as the model says")}


def test_scopes_are_followed_by_their_switches() -> None:
    outside = _cur_sdpa_kernel_backends()
    scopes = Scopes()
    assert scopes.switch([MATH], False) == "math"
    assert scopes.switch([SDPBackend.EFFICIENT_ATTENTION], False) == "efficient"
    assert scopes.switch([MATH], False) == "math"  # left again
    assert scopes.switch(outside, False) is None
    for kernels_, set_priority in (([], False), ([MATH, FLASH], False), ([MATH], True)):
        with pytest.raises(NotOneKernel):
            scopes.switch(kernels_, set_priority)
    with pytest.raises(NotOneKernel):
        scopes.switch([SDPBackend.OVERRIDEABLE])


def test_the_flash_attention_in_place_is_the_one_meant(monkeypatch) -> None:
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")
    assert Scopes().switch([FLASH]) == "flash3"
    monkeypatch.undo()
    assert Scopes().switch([FLASH]) == "flash"
