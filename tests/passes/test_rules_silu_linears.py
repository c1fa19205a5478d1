"""AdaLN: the SiLU of one row per sample and the linears on it, as one autograd node."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import RULES, Rewritten, Written, normal, rewrite

D = 16


def rewritten(forward, *inputs: Tensor) -> Rewritten:
    parameters = {
        "image": normal(3 * D, D),
        "text": normal(2 * D, D, seed=1),
        "bias": normal(3 * D),
    }
    return rewrite(Written(forward, **parameters), *inputs, rules=["silu_linears", "merge_linears"])


def one(m, temb: Tensor) -> tuple[Tensor, ...]:
    return F.linear(F.silu(temb), m.image, m.bias).chunk(3, dim=1)


def two(m, temb: Tensor) -> tuple[Tensor, ...]:
    return *one(m, temb), F.linear(F.silu(temb), m.text)


def nested(m, temb: Tensor) -> tuple[Tensor, ...]:
    first, second = F.linear(F.silu(temb), m.image, m.bias).split([2 * D, D], -1)
    return *first.chunk(2, -1), second[:, None]


def test_a_linear_and_its_parts():
    assert_expected_inline(
        rewritten(one, normal(2, D)).code(),
        """\
silu_linears = fxopt.silu_linears(inputs_0, [p_image], [p_bias], [0, 0, 16, 0, 16, 32, 0, 32,
    48])
getitem_3 = silu_linears[0]
getitem_4 = silu_linears[1]
getitem_5 = silu_linears[2]
return (getitem_3, getitem_4, getitem_5)""",
    )


def test_two_linears():
    found = rewritten(two, normal(2, D))
    assert (found.count("silu_linears"), found.count("merge_linears")) == (1, 0)
    assert found.code().count("[p_image, p_text], [p_bias, None]") == 1


def test_parts_of_parts():
    found = rewritten(nested, normal(2, D))
    assert "[0, 0, 16, 0, 16, 32, 0, 32, 48]" in " ".join(found.code().split())


def test_silu_stays_for_others():
    def forward(m, temb: Tensor) -> tuple[Tensor, ...]:
        return *one(m, temb), F.silu(temb) * 2

    found = rewritten(forward, normal(2, D))
    assert found.count("silu_linears") == 1 and "aten.silu" in found.code()


@pytest.mark.parametrize(
    "forward, shape",
    [
        (one, (2, 5, D)),  # tokens: an MLP
        (lambda m, temb: F.linear(F.gelu(temb), m.image, m.bias), (2, D)),
        (lambda m, temb: F.linear(temb, m.image, m.bias).chunk(3, 1), (2, D)),
    ],
)
def test_others_stay(forward, shape):
    assert rewritten(forward, normal(*shape)).count("silu_linears") == 0


@pytest.mark.parametrize("forward", [one, two, nested])
def test_is_as_accurate(forward):
    temb = normal(2, D)
    found = rewritten(forward, temb)
    # The same ATen ops on a CPU, but for the order of the input gradient's sum over linears.
    for e, f in zip(forward(found.module, temb), found(temb), strict=True):
        assert torch.equal(e, f)


def test_a_compiler_gets_the_ops_themselves():
    assert not RULES["silu_linears"].compiled
