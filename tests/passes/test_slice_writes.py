"""Slices of a sequence that are computed anew in place: so CogView rotates a joint one's image."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.rewriting import normal
from tests.passes.test_canonicalize import D, canonical
from tests.passes.test_rules_qk_norm_rope import (
    d,
    heads,
    neighbours,
    projections,
    rewritten,
    tables,
)

N = 2  # tokens that are not rotated, or that alone are


def last(m, x: Tensor) -> Tensor:
    y = x * 2
    y[:, N:] = y[:, N:].neg()
    return y.cos()


def first(m, x: Tensor) -> Tensor:
    y = x * 2
    y[:, :N] = y[:, :N].neg() + y[:, :1]
    return y.cos()


def both(m, x: Tensor) -> Tensor:
    y = x * 2
    y[:, N:] = y[:, N:].neg()
    y[:, :N] = 3 * y[:, :N]
    return y


def of_another_dtype(m, x: Tensor) -> Tensor:
    y = x * 2
    y[:, N:] = y[:, N:].double().neg()
    return y


@pytest.mark.parametrize("forward", [last, first, both, of_another_dtype])
def test_is_a_concatenation(forward):
    found = canonical(forward, normal(2, 5, D))
    assert "copy_" not in found.code() and "aten.cat" in found.code()
    found.assert_as_accurate(normal(3, 4, D))


def read_before_and_after(m, x: Tensor) -> Tensor:
    y = x * 2
    seen = y[:, 1:]
    y[:, N:] = y[:, N:].neg()
    return seen * 2


def of_a_view(m, x: Tensor) -> Tensor:
    base = x * 2
    y = base.transpose(0, 1)
    y[:, 1:] = y[:, 1:].neg()
    return base * 2


def of_an_einsum_that_is_a_view(m, x: Tensor) -> Tensor:
    base = x * 2
    y = torch.einsum("bsd->sbd", base)
    y[:, 1:] = y[:, 1:].neg()
    return base * 2


def of_what_is_no_function_of_it(m, x: Tensor) -> Tensor:
    y = x * 2
    y[:, N:] = x[:, N:]
    return y


def of_every_other(m, x: Tensor) -> Tensor:
    y = x * 2
    y[:, ::2] = y[:, ::2].neg()
    return y


NEAR_MISSES = (
    *(read_before_and_after, of_a_view, of_what_is_no_function_of_it),
    *(of_every_other, of_an_einsum_that_is_a_view),
)


@pytest.mark.parametrize("forward", NEAR_MISSES)
def test_near_misses_stay(forward):
    found = canonical(forward, normal(2, 5, D).detach())
    assert "copy_" in found.code()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotation_in_place_is_found(dtype: torch.dtype):
    def forward(m, x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = torch.cat([text, x], 1)
        operands = []
        for w, norm in ((m.q, m.norm_q), (m.k, m.norm_k)):
            n = F.rms_norm(heads(F.linear(x, w)), (d,), norm, eps=1e-6)
            n[:, text.shape[1] :] = neighbours(n[:, text.shape[1] :], cos, sin)
            operands.append(n)
        operands.append(heads(F.linear(x, m.v)))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in operands))

    inputs = normal(2, 5, 2 * d, dtype=dtype), normal(2, 3, 2 * d, dtype=dtype), *tables(5)
    found = rewritten(forward, *inputs, **projections(dtype))
    assert found.count("qk_norm_rope") == 2, found.reasons("qk_norm_rope")
    assert found.code().count("'last'") == 2
    found.assert_as_accurate(*inputs)
