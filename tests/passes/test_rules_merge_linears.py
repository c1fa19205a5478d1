"""Linears on one input, and what makes that input, as one autograd node."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import RULES, Rewritten, Written, normal, rewrite

D, F_ = 16, 24


def rewritten(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    return rewrite(Written(forward, **parameters), *inputs)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "q": normal(D, D, dtype=dtype),
        "k": normal(D, D, dtype=dtype, seed=1),
        "bias": normal(D, dtype=dtype),
    }


def shared(m, x: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, m.q, m.bias), F.linear(x, m.k)


def normed(m, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return shared(m, F.layer_norm(x, (D,)) * (1 + scale[:, None]))


def beside(m, x: Tensor, y: Tensor) -> Tensor:
    return F.linear(torch.cat([x, F.gelu(y)], dim=-1), m.down)


def test_linears_on_one_input():
    found = rewritten(shared, normal(2, 5, D), **weights())
    assert_expected_inline(
        found.code(),
        """\
linears = fxopt.linears(inputs_0, [p_q, p_k], [p_bias, None], [0, 0, 16, 1, 0, 16])
getitem = linears[0]
getitem_1 = linears[1]
return (getitem, getitem_1)""",
    )


def test_a_norm_and_its_linears():
    found = rewritten(normed, normal(2, 5, D), normal(2, D), **weights())
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_1, 1)
norm_modulate_linears = fxopt.norm_modulate_linears(inputs_0, None, None, None, None, unsqueeze,
    None, None, 'layer', 1e-05, 0.0, 1.0, float32, float32, [p_q, p_k], [p_bias, None], [0, 0,
    16, 1, 0, 16])
getitem_1 = norm_modulate_linears[0]
getitem_2 = getitem_1[0]
getitem_3 = getitem_1[1]
return (getitem_2, getitem_3)""",
    )


def test_an_activation_beside_attention_and_its_linear():
    found = rewritten(beside, normal(2, 5, D), normal(2, 5, F_), down=normal(D, D + F_))
    assert_expected_inline(
        found.code(),
        """\
gated_activation_linear = fxopt.gated_activation_linear(inputs_1, None, 'gelu_erf', 'none',
    inputs_0, None, p_down, None)
return (gated_activation_linear,)""",
    )
    found.assert_as_accurate(normal(1, 3, D), normal(1, 3, F_))


def test_the_residual_goes_on_from_the_norm():
    """The gradient of x then comes from one node, and needs no addition of its own."""

    def forward(m, x: Tensor, scale: Tensor) -> Tensor:
        q, k = normed(m, x, scale)
        return x + scale[:, None] * F.gelu(q + k)

    inputs = normal(2, 5, D), normal(2, D)
    found = rewritten(forward, *inputs, **weights())
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_1, 1)
norm_modulate_linears = fxopt.norm_modulate_linears(inputs_0, None, None, None, None, unsqueeze,
    None, None, 'layer', 1e-05, 0.0, 1.0, float32, float32, [p_q, p_k], [p_bias, None], [0, 0,
    16, 1, 0, 16])
getitem_5 = norm_modulate_linears[1]
getitem_2 = norm_modulate_linears[0]
getitem_3 = getitem_2[0]
getitem_4 = getitem_2[1]
add_1 = aten.add.Tensor(getitem_3, getitem_4)
gelu = aten.gelu(add_1)
norm_modulate_1 = fxopt.norm_modulate(gelu, getitem_5, unsqueeze, None, None, None, None, None,
    'none', 0.0, 0.0, 0.0, float32, float32)
getitem_1 = norm_modulate_1[1]
return (getitem_1,)""",
    )
    found.assert_as_accurate(normal(3, 7, D), normal(3, D))


def test_a_residual_that_is_written_does_not():
    def forward(m, x: Tensor, scale: Tensor) -> Tensor:
        x = x * 1
        q, k = normed(m, x, scale)
        return x.add_(1) + scale[:, None] * F.gelu(q + k)

    inputs = normal(2, 5, D), normal(2, D)
    found = rewritten(forward, *inputs, **weights())
    assert found.count("merge_linears") == 0 or "norm_modulate_linears[1]" not in found.code()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype):
    found = rewritten(shared, normal(2, 5, D, dtype=dtype), **weights(dtype))
    assert found.count("merge_linears") == 1
    found.assert_as_accurate(normal(3, 7, D, dtype=dtype))
    inputs = normal(2, 5, D, dtype=dtype), normal(2, D, dtype=dtype)
    found = rewritten(normed, *inputs, **weights(dtype))
    assert found.count("merge_linears") == 1
    found.assert_as_accurate(*inputs)


def test_frozen_weights():
    module = Written(normed, **weights())
    module.q.requires_grad_(False)
    inputs = normal(2, 5, D), normal(2, D)
    found = rewrite(module, *inputs)
    assert found.count("merge_linears") == 1
    found.assert_as_accurate(*inputs)


NEAR_MISSES = {
    "two inputs": lambda m, x: (F.linear(x, m.q), F.linear(x.sin(), m.k)),
    "one linear": lambda m, x: F.linear(x, m.q),
    "the second depends on the first": lambda m, x: F.linear(F.linear(x, m.q), m.k),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str):
    found = rewritten(NEAR_MISSES[name], normal(2, 5, D), **weights())
    assert not found.count("merge_linears"), found.code()
    found.assert_as_accurate(normal(2, 5, D))


def test_an_input_written_between_two_linears():
    def forward(m, x):
        h = x * 2
        first = F.linear(h, m.q)
        h.add_(1)
        return first, F.linear(h, m.k)

    x = normal(2, 5, D)
    module = Written(forward, **weights()).requires_grad_(False)
    found = rewrite(module, x)
    assert not found.count("merge_linears")
    torch.testing.assert_close(found(x), module(x), rtol=0, atol=0)  # the same ops


def test_a_normed_tensor_with_another_user_declines_with_the_reason():
    def forward(m, x, scale):
        n = F.layer_norm(x, (D,)) * (1 + scale[:, None])
        return F.linear(n, m.q), n.sin()

    inputs = normal(2, 5, D), normal(2, D)
    found = rewritten(forward, *inputs, **weights())
    assert not found.count("merge_linears")
    assert_expected_inline(
        "\n".join(found.reasons("merge_linears")),
        """the normed tensor is also used by sin and is kept for it""",
    )


def test_compilers_do_this_themselves():
    assert not RULES["merge_linears"].compiled


def by_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """transformers' Conv1D."""
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def gpt2(m, x: Tensor) -> Tensor:
    q, k, v = by_rows(F.layer_norm(x, (D,), m.norm, m.shift), m.qkv, m.qkv_bias).chunk(3, -1)
    return by_rows(F.gelu(q * k + v, approximate="tanh"), m.out, m.out_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_stored_the_other_way_round(dtype: torch.dtype):
    shapes = {"norm": (D,), "shift": (D,), "qkv": (D, 3 * D), "qkv_bias": (3 * D,)}
    shapes |= {"out": (D, F_), "out_bias": (F_,)}
    parameters = {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}
    found = rewritten(gpt2, normal(2, 5, D, dtype=dtype), **parameters)
    assert found.count("norm_modulate") + found.count("gated_activation") == 2
    assert found.count("merge_linears") == 2
    found.assert_as_accurate(normal(3, 4, D, dtype=dtype))
    # Autograd copies a gradient that does not lie in memory as its parameter does.
    weights = [found.module.qkv, found.module.out]
    out = found(normal(3, 4, D, dtype=dtype))
    for grad, weight in zip(torch.autograd.grad(out.sum(), weights), weights, strict=True):
        assert grad.stride() == weight.stride()
