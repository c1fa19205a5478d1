"""Gated residual, norm and modulation to one op."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

D = 16


def rewritten(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    return rewrite(Written(forward, **parameters), *inputs, rules=["norm_modulate"])


def adaln(m, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def adaln_inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((batch, tokens, D), (batch, D), (batch, D))
    return [normal(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def sandwich(m, x: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    h = x + gate[:, None] * branch
    return h, F.rms_norm(h, (D,), m.weight, eps=1e-6)


def sandwich_inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((batch, tokens, D), (batch, tokens, D), (batch, D))
    return [normal(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def test_norm_and_modulation():
    found = rewritten(adaln, *adaln_inputs(2, 5))
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_1, 1)
unsqueeze_1 = aten.unsqueeze(inputs_2, 1)
norm_modulate = fxopt.norm_modulate(inputs_0, None, None, None, None, unsqueeze, unsqueeze_1,
    None, 'layer', 1e-06, 0.0, 1.0, float32, float32)
getitem = norm_modulate[0]
return (getitem,)""",
    )


def test_gated_residual_and_norm():
    found = rewritten(sandwich, *sandwich_inputs(2, 5), weight=normal(D))
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_2, 1)
norm_modulate = fxopt.norm_modulate(inputs_1, inputs_0, unsqueeze, p_weight, None, None, None,
    None, 'rms', 1e-06, 0.0, 0.0, float32, float32)
getitem = norm_modulate[0]
getitem_1 = norm_modulate[1]
return (getitem_1, getitem)""",
    )


def test_gated_residual_alone():
    found = rewritten(lambda m, x, y, g: x + g.tanh()[:, None] * y, *sandwich_inputs(2, 5))
    assert_expected_inline(
        found.code(),
        """\
tanh = aten.tanh(inputs_2)
unsqueeze = aten.unsqueeze(tanh, 1)
norm_modulate = fxopt.norm_modulate(inputs_1, inputs_0, unsqueeze, None, None, None, None, None,
    'none', 0.0, 0.0, 0.0, float32, float32)
getitem = norm_modulate[1]
return (getitem,)""",
    )


def test_a_gate_per_token():
    def forward(m, x, attended, embedding):
        gate, _ = F.linear(embedding, m.modulation).chunk(2, dim=-1)
        return x + F.linear(attended, m.out, m.bias) * gate

    inputs = [normal(2, 5, D, seed=i) for i in range(3)]
    parameters = {"modulation": normal(2 * D, D), "out": normal(D, D), "bias": normal(D)}
    found = rewritten(forward, *inputs, **parameters)
    assert_expected_inline(
        found.code(),
        """\
linear = aten.linear(inputs_2, p_modulation)
chunk = aten.chunk(linear, 2, -1)
getitem = chunk[0]
linear_1 = aten.linear(inputs_1, p_out, p_bias)
norm_modulate = fxopt.norm_modulate(linear_1, inputs_0, getitem, None, None, None, None, None,
    'none', 0.0, 0.0, 0.0, float32, float32)
getitem_2 = norm_modulate[1]
return (getitem_2,)""",
    )
    found.assert_as_accurate(*inputs)
    both = rewrite(Written(forward, **parameters), *inputs, rules=["norm_modulate", "fuse_bias"])
    assert both.count("fuse_bias") == 1


@pytest.mark.parametrize(
    "forward", [lambda m, x, a, b: x + a * b, lambda m, x, a, b: x + x * a[:, :1]]
)
def test_products_that_are_no_gated_branch(forward):
    found = rewritten(forward, *[normal(2, 5, D, seed=i) for i in range(3)])
    assert not found.count("norm_modulate")


def test_two_modulations_of_one_norm():
    def forward(m, x, a, b):
        n = F.layer_norm(x, (D,), eps=1e-6)
        return n * (1 + a[:, None]), n * (1 + b[:, None])

    found = rewritten(forward, *adaln_inputs(2, 5))
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_1, 1)
norm_modulate = fxopt.norm_modulate(inputs_0, None, None, None, None, unsqueeze, None, None,
    'layer', 1e-06, 0.0, 1.0, float32, float32)
getitem = norm_modulate[0]
unsqueeze_1 = aten.unsqueeze(inputs_2, 1)
norm_modulate_1 = fxopt.norm_modulate(inputs_0, None, None, None, None, unsqueeze_1, None, None,
    'layer', 1e-06, 0.0, 1.0, float32, float32)
getitem_1 = norm_modulate_1[0]
return (getitem, getitem_1)""",
    )
    found.assert_as_accurate(*adaln_inputs(1, 3))


def test_a_norm_behind_its_branch():
    """The next branch is added to the norm it is made of; that is no shift."""

    def forward(m, x: Tensor, branch: Tensor) -> Tensor:
        n = F.layer_norm(x + branch, (D,))
        return F.layer_norm(n + F.gelu(n @ m.w), (D,))

    inputs = sandwich_inputs(2, 5)[:2]
    found = rewritten(forward, *inputs, w=normal(D, D))
    assert found.count("norm_modulate") == 2, found.code()
    found.assert_as_accurate(*inputs)


def test_a_scale_without_the_one_is_read_as_such():
    found = rewritten(
        lambda m, x, a, b: F.layer_norm(x, (D,)) * a[:, None] + b[:, None], *adaln_inputs(2, 5)
    )
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_1, 1)
unsqueeze_1 = aten.unsqueeze(inputs_2, 1)
norm_modulate = fxopt.norm_modulate(inputs_0, None, None, None, None, unsqueeze, unsqueeze_1,
    None, 'layer', 1e-05, 0.0, 0.0, float32, float32)
getitem = norm_modulate[0]
return (getitem,)""",
    )
    found.assert_as_accurate(*adaln_inputs(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype):
    found = rewritten(adaln, *adaln_inputs(2, 5, dtype))
    assert found.count("norm_modulate") == 1
    found.assert_as_accurate(*adaln_inputs(3, 7, dtype))
    found = rewritten(sandwich, *sandwich_inputs(2, 5, dtype), weight=normal(D, dtype=dtype))
    assert found.count("norm_modulate") == 1
    found.assert_as_accurate(*sandwich_inputs(3, 7, dtype))


NEAR_MISSES = {
    "norm over tokens as well": lambda m, x, a, b: (
        F.layer_norm(x, (5, D)) * (1 + a[:, None]) + b[:, None]
    ),
    "1 - scale": lambda m, x, a, b: F.layer_norm(x, (D,)) * (1 - a[:, None]),
    "2 + scale": lambda m, x, a, b: F.layer_norm(x, (D,)) * (2 + a[:, None]),
    "1 + 2 scale": lambda m, x, a, b: F.layer_norm(x, (D,)) * torch.add(1, a[:, None], alpha=2),
    "shift, then scale": lambda m, x, a, b: (F.layer_norm(x, (D,)) + b[:, None]) * (1 + a[:, None]),
    "two shifts": lambda m, x, a, b: F.layer_norm(x, (D,)) + b[:, None] + a[:, None],
    "shift - n": lambda m, x, a, b: b[:, None] - F.layer_norm(x, (D,)),
    "n squared": lambda m, x, a, b: F.layer_norm(x, (D,)) * F.layer_norm(x, (D,)) + b[:, None],
    "shift by n": lambda m, x, a, b: torch.add(b[:, None], F.layer_norm(x, (D,)), alpha=2),
    "subtracted branch": lambda m, x, a, b: F.layer_norm(x - a[:, None] * x.sin(), (D,)),
    "addcmul by two": lambda m, x, a, b: torch.addcmul(x, a[:, None], x.sin(), value=2),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_keep_their_meaning(name: str):
    inputs = adaln_inputs(2, 5)
    rewritten(NEAR_MISSES[name], *inputs).assert_as_accurate(*inputs)


def test_a_written_input_declines_with_the_reason():
    def forward(m, x, a, b):
        n = F.layer_norm(x, (D,))
        y = n * (1 + a[:, None])
        n.add_(1)
        return y + n

    inputs = adaln_inputs(2, 5)
    found = rewritten(forward, *inputs)
    assert not found.count("norm_modulate")
    assert_expected_inline(
        "\n".join(found.reasons("norm_modulate")),
        """\
the normed tensor has a user that does not modulate it
layer_norm is written in place by add_
a write, a random number or a change of grad mode stands inside the region""",
    )


def test_a_normed_tensor_with_another_user_declines_with_the_reason():
    def forward(m, x, a, b):
        n = F.layer_norm(x, (D,))
        return n * (1 + a[:, None]), n.sin()

    inputs = adaln_inputs(2, 5)
    found = rewritten(forward, *inputs)
    assert not found.count("norm_modulate")
    assert_expected_inline(
        "\n".join(found.reasons("norm_modulate")),
        """the normed tensor has a user that does not modulate it""",
    )
    found.assert_as_accurate(*inputs)


def test_views_of_what_is_written_later_decline_with_the_reason():
    def forward(m, x, mod):
        h = mod * 2
        scale, shift = h[..., :D], h[..., D:]
        n = F.layer_norm(x, (D,))
        h.add_(1)
        return n * (1 + scale) + shift

    inputs = normal(2, 5, D), normal(2, 1, 2 * D)
    found = rewritten(forward, *inputs)
    assert not found.count("norm_modulate")
    assert_expected_inline(
        "\n".join(found.reasons("norm_modulate")),
        """\
slice_1 is written in place by add_
slice_2 is written in place by add_
a write, a random number or a change of grad mode stands inside the region""",
    )
    found.assert_as_accurate(*inputs)


def test_nothing_is_moved_ahead_of_a_write():
    def forward(m, x, mod):
        h = mod * 2
        view = h[..., :D]
        n = F.layer_norm(x, (D,))
        h.add_(1)
        return n * (1 + view.sin())

    inputs = normal(2, 5, D), normal(2, 1, 2 * D)
    found = rewritten(forward, *inputs)
    assert not found.count("norm_modulate")
    found.assert_as_accurate(*inputs)
