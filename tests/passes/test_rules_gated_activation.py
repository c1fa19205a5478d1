"""GELU, SiLU and their gated forms to one op."""

import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

D = 16


def rewritten(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    return rewrite(Written(forward, **parameters), *inputs, rules=["gated_activation"])


def swiglu(m, g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def pair(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(batch, tokens, D, dtype=dtype, seed=i) for i in range(2)]


def test_two_tensors():
    found = rewritten(swiglu, *pair(2, 5))
    assert_expected_inline(
        found.code(),
        """\
gated_activation = fxopt.gated_activation(inputs_0, inputs_1, 'silu', 'none')
return (gated_activation,)""",
    )


def test_halves_of_one():
    def forward(m, x):
        u, g = x.chunk(2, dim=-1)
        return u * F.gelu(g)

    found = rewritten(forward, normal(2, 5, D))
    assert_expected_inline(
        found.code(),
        """\
gated_activation = fxopt.gated_activation(inputs_0, None, 'gelu_erf', 'up_gate')
return (gated_activation,)""",
    )
    found.assert_as_accurate(normal(1, 3, D))


def test_an_activation_before_a_linear():
    def forward(m, x):
        return F.linear(F.gelu(x, approximate="tanh"), m.weight)

    found = rewritten(forward, normal(2, 5, D), weight=normal(3, D))
    assert_expected_inline(
        found.code(),
        """\
gated_activation = fxopt.gated_activation(inputs_0, None, 'gelu_tanh', 'none')
linear = aten.linear(gated_activation, p_weight)
return (linear,)""",
    )
    found.assert_as_accurate(normal(1, 3, D))


def test_gelu_by_hand():
    def forward(m, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    found = rewritten(forward, normal(2, 5, D))
    assert_expected_inline(
        found.code(),
        """\
gated_activation = fxopt.gated_activation(inputs_0, None, 'gelu_tanh', 'none')
return (gated_activation,)""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype):
    found = rewritten(swiglu, *pair(2, 5, dtype))
    assert found.count("gated_activation") == 1
    found.assert_as_accurate(*pair(3, 7, dtype))


NEAR_MISSES = {
    "quick GELU": lambda m, g, u: g * torch.sigmoid(1.702 * g),
    "sigmoid of another": lambda m, g, u: g * torch.sigmoid(u),
    "wrong cubic term": lambda m, g, u: (
        0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.04 * g**3)))
    ),
    "erf without the root": lambda m, g, u: 0.5 * g * (1 + torch.erf(g)),
    "1 - tanh": lambda m, g, u: (
        0.5 * g * (1 - torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    ),
    "silu plus": lambda m, g, u: F.silu(g) + u,
    "silu squared": lambda m, g, u: F.silu(g) * F.silu(g),
    "broadcast": lambda m, g, u: F.silu(g[:, :1]) * u,
    "interleaved halves": lambda m, g, u: F.silu(g[..., ::2]) * g[..., 1::2],
    "overlapping halves": lambda m, g, u: F.silu(g[..., :8]) * g[..., 7:15],
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_keep_their_meaning(name: str):
    found = rewritten(NEAR_MISSES[name], *pair(2, 5))
    found.assert_as_accurate(*pair(2, 5))
    if name not in {"interleaved halves", "overlapping halves"}:  # two tensors all the same
        assert not found.count("gated_activation"), found.code()


def test_mixed_dtypes_decline_with_the_reason():
    gate, up = normal(2, 5, D, dtype=torch.bfloat16), normal(2, 5, D)
    found = rewritten(swiglu, gate, up)
    assert not found.count("gated_activation")
    assert_expected_inline(
        "\n".join(found.reasons("gated_activation")),
        """gate is torch.bfloat16, the other half torch.float32""",
    )


def test_an_activation_that_is_used_twice_stays():
    def forward(m, g, u):
        a = F.silu(g)
        return a * u, a.sin()

    found = rewritten(forward, *pair(2, 5))
    assert not found.count("gated_activation")
    assert_expected_inline(
        "\n".join(found.reasons("gated_activation")),
        """the activation is also used by sin and is kept for it""",
    )


@pytest.mark.parametrize("cap", [30.0, 1.0])
def test_capped_logits_are_no_near_miss(cap: float) -> None:
    """As Gemma's: tanh bounds the logits, and nothing of them is multiplied with it."""

    def forward(m, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.tanh(q @ k.mT / cap) * cap
        return logits.softmax(-1) @ v

    operands = [normal(2, 4, 5, 16, seed=i) for i in range(3)]
    found = rewrite(Written(forward), *operands, rules=["gated_activation"])
    assert found.reasons("gated_activation") == []
