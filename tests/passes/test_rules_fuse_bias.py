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
