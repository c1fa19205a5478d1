"""The bias of a linear moves into the op that reads it, with its gradient."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

D = 16


def rewritten(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    return rewrite(Written(forward, **parameters), *inputs)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": normal(D, D, dtype=dtype), "b": normal(D, dtype=dtype)}


def inputs(batch: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        normal(batch, num_tokens, D, dtype=dtype),
        normal(batch, num_tokens, D, dtype=dtype, seed=1),
        normal(batch, D, dtype=dtype),
    ]


def gated(m, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return residual + gate[:, None] * F.linear(x, m.w, m.b)


def normed(m, residual: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    h = gated(m, residual, x, gate)
    return h, F.layer_norm(h, (D,)) * (1 + gate[:, None])


def test_fires():
    found = rewritten(gated, *inputs(2, 5), **parameters())
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_2, 1)
linear = aten.linear(inputs_1, p_w)
norm_modulate_1 = fxopt.norm_modulate(linear, inputs_0, unsqueeze, None, None, None, None, p_b,
    'none', 0.0, 0.0, 0.0, float32, float32)
getitem_1 = norm_modulate_1[1]
return (getitem_1,)""",
    )
    assert found.count("fuse_bias") == found.count("norm_modulate") == 1
    found.assert_as_accurate(*inputs(3, 7))


@pytest.mark.parametrize("forward", [gated, normed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(forward, dtype: torch.dtype):
    found = rewritten(forward, *inputs(2, 5, dtype), **parameters(dtype))
    assert found.count("fuse_bias") == 1
    found.assert_as_accurate(*inputs(3, 7, dtype))


def test_a_frozen_bias():
    module = Written(normed, **parameters())
    module.b.requires_grad_(False)
    found = rewrite(module, *inputs(2, 5))
    assert found.count("fuse_bias") == 1
    found.assert_as_accurate(*inputs(2, 5))


def used_twice(m, residual: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, m.w, m.b)
    return residual + gate[:, None] * y, y.sin()


NEAR_MISSES = {
    "the linear has another user": used_twice,
    "no bias": lambda m, r, x, g: r + g[:, None] * F.linear(x, m.w) + 0 * m.b,
    "an activation between": lambda m, r, x, g: r + g[:, None] * F.relu(F.linear(x, m.w, m.b)),
    "the residual is the linear": lambda m, r, x, g: F.linear(x, m.w, m.b) + g[:, None] * r,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str):
    found = rewritten(NEAR_MISSES[name], *inputs(2, 5), **parameters())
    assert not found.count("fuse_bias"), found.code()
    found.assert_as_accurate(*inputs(2, 5))


def test_wide_rows_keep_their_bias():
    """Four sums per feature would leave the registers."""

    def rows(num_tokens: int) -> list[Tensor]:
        return [normal(1, num_tokens, 6148), normal(1, num_tokens, 4), normal(1, 6148)]

    wide = {"w": normal(6148, 4), "b": normal(6148)}
    found = rewritten(gated, *rows(3), **wide)
    assert found.count("fuse_bias") == 1

    def normed_wide(m, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return F.layer_norm(gated(m, residual, x, gate), (6148,)) * (1 + gate[:, None])

    found = rewritten(normed_wide, *rows(3), **wide)
    assert not found.count("fuse_bias")


def mlp(m, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, m.w, m.b)), m.out)


def geglu(m, x: Tensor) -> Tensor:
    up, gate = F.linear(x, m.w, m.b).chunk(2, -1)
    return F.linear(up * F.gelu(gate), m.out)


def beside(m, x: Tensor) -> Tensor:
    activation = F.gelu(F.linear(x, m.w, m.b), approximate="tanh")
    return F.linear(torch.cat([x, activation], -1), m.out)


# The width of the projection, and of what the last linear reads.
MLPS = {mlp: (32, 32), geglu: (32, 16), beside: (32, 48)}


def mlp_parameters(forward, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    width, read = MLPS[forward]
    drawn = {"w": (width, D), "b": (width,), "out": (D, read)}
    return {name: normal(*shape, dtype=dtype) for name, shape in drawn.items()}


def test_fires_on_an_activation():
    found = rewritten(mlp, normal(2, 5, D), **mlp_parameters(mlp))
    assert_expected_inline(
        found.code(),
        """\
linear = aten.linear(inputs_0, p_w)
gated_activation_linear = fxopt.gated_activation_linear(linear, None, 'gelu_erf', 'none', None,
    p_b, p_out, None)
return (gated_activation_linear,)""",
    )
    assert found.count("fuse_bias") == found.count("gated_activation") == 1
    found.assert_as_accurate(normal(3, 7, D))


@pytest.mark.parametrize("forward", MLPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_of_mlps(forward, dtype: torch.dtype):
    found = rewritten(forward, normal(2, 5, D, dtype=dtype), **mlp_parameters(forward, dtype))
    assert found.count("fuse_bias") == 1, found.code()
    found.assert_as_accurate(normal(3, 7, D, dtype=dtype))


def two_inputs(m, x: Tensor) -> Tensor:
    """Gate and up by linears of their own."""
    return F.linear(F.silu(F.linear(x, m.w, m.b)) * F.linear(x, m.w.flip(0), m.b), m.out)


def kept_for_another(m, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, m.w, m.b)
    return F.linear(F.gelu(y), m.out), y.sin()


def no_linear_behind(m, x: Tensor) -> Tensor:
    """Decomposed, so that the activation is an op all the same."""
    y = F.linear(x, m.w, m.b)
    return (0.5 * y * (1 + torch.erf(y / 2**0.5))).sin() * m.out.sum()


@pytest.mark.parametrize("forward", [two_inputs, kept_for_another, no_linear_behind])
def test_near_misses_of_mlps_stay(forward):
    found = rewritten(forward, normal(2, 5, D), **mlp_parameters(mlp))
    assert found.count("gated_activation") == 1, found.code()
    assert not found.count("fuse_bias"), found.code()
    found.assert_as_accurate(normal(2, 5, D))
