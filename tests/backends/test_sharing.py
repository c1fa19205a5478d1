"""One capture for all blocks and sizes that it is right for, and for no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backends import capture, rewritten
from fxopt.backends.rewritten import EMPTY
from tests.backends.toys import (
    CHANNELS,
    Block,
    assert_like_eager,
    captures,
    counting_graph_runs,
    reasons,
    stack,
    tokens,
)


def test_shapes_that_never_end_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_SHAPES", 4)
    monkeypatch.setattr(rewritten, "MAX_SHAPES", 4)
    model = fxopt.optimize(stack())
    for num_tokens in range(2, 12):
        model(tokens(2, num_tokens))
        model(tokens(2, 2))
    first = model.blocks[0].forward.bounds[0]
    assert first.plan.sizes_fit.cache_info().currsize == 4
    assert len(first.admitted) == 4
    assert captures(model) == 1
    assert (tokens(2, 3).shape,) not in first.admitted
    assert_like_eager(model, stack(), {"x": tokens(2, 3)})  # forgotten, not refused
    assert list(first.admitted)[-1] == (tokens(2, 3).shape,)
    assert captures(model) == 1


def test_blocks_that_differ_in_what_is_not_read_share() -> None:
    model = fxopt.optimize(stack(num_blocks=5))
    assert [b.layer_idx for b in model.blocks] == list(range(5))
    # 1e-4: fp32 rounding through five blocks.
    torch.testing.assert_close(model(tokens()), stack(num_blocks=5)(tokens()), rtol=1e-4, atol=1e-4)
    assert captures(model) == 1


def set_flag(block: nn.Module) -> None:
    block.flag = True


def set_scale(block: nn.Module) -> None:
    block.attn.scale = 1.0


def set_eps(block: nn.Module) -> None:
    block.norm2.eps = 0.1


def drop_bias(block: nn.Module) -> None:
    block.up.bias = None


def add_method(block: nn.Module) -> None:
    block.mlp = lambda x: -x


@pytest.mark.parametrize("change", [set_flag, set_scale, set_eps, drop_bias, add_method])
def test_blocks_that_differ_in_what_is_read_do_not_share(change: Callable) -> None:
    models = stack(num_blocks=3), stack(num_blocks=3)
    for model in models:
        change(model.blocks[1])
    model, eager = fxopt.optimize(models[0]), models[1]
    assert_like_eager(model, eager)
    assert captures(model) == 2
    assert not reasons(model)


def test_batch_of_one_first() -> None:
    model, eager = fxopt.optimize(stack()), stack()
    for batch in (1, 2, 3, 1):
        assert_like_eager(model, eager, {"x": tokens(batch)})
    assert captures(model) == 1


def test_single_token() -> None:
    model, eager = fxopt.optimize(stack()), stack()
    for num_tokens in (6, 1, 7):
        assert_like_eager(model, eager, {"x": tokens(2, num_tokens)})
    assert not reasons(model)


def test_a_call_without_elements_is_not_captured() -> None:
    model, eager = fxopt.optimize(stack()), stack()
    for batch, num_tokens in [(0, 6), (2, 6), (2, 0)]:
        x, y = (tokens(batch, num_tokens).requires_grad_() for _ in range(2))
        model(x).sum().backward()
        eager(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)  # fp32 rounding
    assert reasons(model) == [EMPTY]
    assert captures(model) == 1
    assert fxopt.report(model).count("qk_norm_rope")


class OneIsSpecial(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = super().forward(x_BSC)
        return 3 * x_BSC if x_BSC.shape[0] == 1 else x_BSC


class SmallIsSpecial(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = super().forward(x_BSC)
        return 3 * x_BSC if x_BSC.shape[1] < 5 else x_BSC


class TwentyIsSpecial(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = super().forward(x_BSC)
        return 3 * x_BSC if x_BSC.shape[1] == 20 else x_BSC


@pytest.mark.parametrize("make", [OneIsSpecial, SmallIsSpecial, TwentyIsSpecial])
@pytest.mark.parametrize("order", [1, -1])
def test_branches_on_sizes(make: type[Block], order: int) -> None:
    model, eager = fxopt.optimize(stack(make)), stack(make)
    for batch, num_tokens in [(1, 6), (2, 6), (3, 4), (1, 3), (2, 20), (2, 7)][::order]:
        assert_like_eager(model, eager, {"x": tokens(batch, num_tokens)})
    assert 2 <= captures(model) <= 4
    assert not reasons(model)


def test_other_channels() -> None:
    """A block that works for any number of channels is captured for any at the second."""

    class Agnostic(nn.Module):
        def __init__(self, _: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 4), nn.Linear(4, 1)
            self.act = nn.GELU(approximate="tanh")

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.act(self.first(x.flatten().unsqueeze(-1)))).squeeze(-1)
            return y.view_as(x)

    model, eager = fxopt.optimize(stack(Agnostic)), stack(Agnostic)
    for channels in (8, 12, 16, 20):
        x = torch.randn(2, 3, channels)
        torch.testing.assert_close(model(x), eager(x))
    assert captures(model) <= 2


def test_inputs_that_change_in_kind_at_every_call_end_in_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rewritten, "MAX_CAPTURES", 2)

    class Scaled(Block):
        def forward(self, x_BSC: Tensor, factor: float = 1.0) -> Tensor:
            return factor * super().forward(x_BSC)

    model, eager = stack(Scaled, 1), stack(Scaled, 1)
    fxopt.optimize(model)
    for factor in (1.0, 2.0, 3.0, 4.0, 2.0):
        with counting_graph_runs() as runs:
            found = model.blocks[0](tokens(), factor)
        torch.testing.assert_close(
            found, eager.blocks[0](tokens(), factor), rtol=1e-4, atol=1e-4
        )  # fp32 rounding
        assert bool(runs) == (factor < 3)
    assert captures(model) == 2
    assert "2 times" in reasons(model)[0] and "pass it as a tensor" in reasons(model)[0]


def test_arguments_by_name_and_position() -> None:
    block, eager = fxopt.optimize(Block()), Block()
    eager.load_state_dict(block.state_dict())
    for found in (block(tokens()), block(x_BSC=tokens())):
        torch.testing.assert_close(found, eager(tokens()), rtol=1e-4, atol=1e-4)


def test_strided_and_expanded_inputs() -> None:
    model, eager = fxopt.optimize(stack()), stack()
    whole = torch.randn(6, 4, 2 * CHANNELS, generator=torch.Generator().manual_seed(0))
    # Not along tokens: with all of them alike the gradients of queries and keys are only rounding.
    for x in (whole[..., ::2].transpose(0, 1), whole[:1, :, :CHANNELS].expand(3, 4, CHANNELS)):
        assert_like_eager(model, eager, {"x": x})
    assert_like_eager(model, eager, {"x": tokens()})
    assert not reasons(model)
    assert captures(model) == 1
