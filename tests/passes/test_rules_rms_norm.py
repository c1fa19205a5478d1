"""Decomposed norms to one op."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

D = 16


def rewritten(forward, x: Tensor, **parameters: Tensor) -> Rewritten:
    return rewrite(Written(forward, **parameters), x, rules=["rms_norm"])


def llama(m: nn.Module, x: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.weight * h.to(x.dtype)


def test_a_chain_becomes_one_op():
    found = rewritten(llama, normal(2, 5, D), weight=normal(D))
    assert_expected_inline(
        found.code(),
        """\
norm_modulate = fxopt.norm_modulate(inputs_0, None, None, p_weight, None, None, None, None,
    'rms', 1e-06, 0.0, 0.0, float32, float32)
getitem = norm_modulate[0]
return (getitem,)""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype):
    found = rewritten(llama, normal(2, 5, D, dtype=dtype), weight=normal(D, dtype=dtype))
    assert found.count("rms_norm") == 1
    found.assert_as_accurate(normal(3, 7, D, dtype=dtype))


def test_layer_norm_by_hand():
    def forward(m, x):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return normed * m.weight + m.bias

    found = rewritten(forward, normal(2, 5, D), weight=normal(D), bias=normal(D, seed=1))
    assert_expected_inline(
        found.code(),
        """\
norm_modulate = fxopt.norm_modulate(inputs_0, None, None, p_weight, p_bias, None, None, None,
    'layer', 1e-05, 0.0, 0.0, float32, float32)
getitem = norm_modulate[0]
return (getitem,)""",
    )
    found.assert_as_accurate(normal(1, 3, D))


def test_weight_offset_is_read_off():
    """Gemma's (1 + w)."""

    def forward(m, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + m.weight)

    found = rewritten(forward, normal(2, 5, D), weight=normal(D))
    assert_expected_inline(
        found.code(),
        """\
norm_modulate = fxopt.norm_modulate(inputs_0, None, None, p_weight, None, None, None, None,
    'rms', 1e-06, 1.0, 0.0, float32, float32)
getitem = norm_modulate[0]
return (getitem,)""",
    )
    found.assert_as_accurate(normal(1, 3, D))


def test_machine_epsilon_is_bound():
    module = Written(lambda m, x: m.norm(x), norm=nn.RMSNorm(D))
    found = rewrite(module, normal(2, 5, D), rules=["rms_norm"])
    assert_expected_inline(
        found.code(),
        """\
norm_modulate = fxopt.norm_modulate(inputs_0, None, None, p_norm_weight, None, None, None, None,
    'rms', 1.1920928955078125e-07, 0.0, 0.0, float32, float32)
getitem = norm_modulate[0]
return (getitem,)""",
    )


NEAR_MISSES = {
    "eps outside of the root": lambda m, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2),
    "tokens instead of channels": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True)),
    "sum instead of mean": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
    "cube instead of square": lambda m, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True)),
    "no root": lambda m, x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "1 - w": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 - m.weight),
    "another tensor is scaled": lambda m, x: x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "centred only in the statistics": lambda m, x: x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str):
    found = rewritten(NEAR_MISSES[name], normal(2, 5, D), weight=normal(D))
    found.assert_as_accurate(normal(2, 5, D))
    if name != "1 - w":  # the norm before it is one
        assert not found.count("rms_norm"), found.code()


def test_declines_with_the_reason():
    found = rewritten(NEAR_MISSES["eps outside of the root"], normal(2, 5, D))
    assert_expected_inline(
        "\n".join(found.reasons("rms_norm")),
        """output 0 differs by 0.005 in float64 on inputs of scale 1""",
    )


def test_statistics_that_are_used_elsewhere_stay():
    def forward(m, x):
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * inverse, inverse

    found = rewritten(forward, normal(2, 5, D))
    assert not found.count("rms_norm")
    assert_expected_inline("\n".join(found.reasons("rms_norm")), """""")
