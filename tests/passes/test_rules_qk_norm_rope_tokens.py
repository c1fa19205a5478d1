"""Rotations of the first or the last tokens of a sequence, whose other tokens are not rotated.

Shapes: S tokens, D = H * d features, as in `test_rules_qk_norm_rope`.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.rewriting import normal
from tests.passes.test_rules_qk_norm_rope import (
    D,
    attention,
    d,
    halves,
    heads,
    neighbours,
    projections,
    rewritten,
    tables,
)

Rope = Callable[[Tensor, Tensor, Tensor], Tensor]


def first_tokens(rope: Rope) -> Rope:
    """HunyuanVideo: the text comes last, and has no row of the tables."""

    def partly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        num = cos.shape[0]
        return torch.cat([rope(x[:, :num], cos, sin), x[:, num:]], 1)

    return partly


def last_tokens(rope: Rope) -> Rope:
    def partly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        num = x.shape[1] - cos.shape[0]
        return torch.cat([x[:, :num], rope(x[:, num:], cos, sin)], 1)

    return partly


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rope", "rotated"), [(first_tokens(neighbours), "first"), (last_tokens(neighbours), "last")]
)
def test_a_part_of_the_tokens(rope: Rope, rotated: str, dtype: torch.dtype):
    inputs = normal(2, 7, D, dtype=dtype), *tables(5)
    found = rewritten(attention(rope), *inputs, **projections(dtype))
    assert found.count("qk_norm_rope") == 2, found.reasons("qk_norm_rope")
    code = found.code()
    assert code.count(f"'channels', '{rotated}'") == 2, code
    assert "slice" not in code and code.count("cat") == 0  # nor the two parts
    found.assert_as_accurate(normal(1, 9, D, dtype=dtype), *tables(4))


def test_one_rotated_token():
    """Tables of one row are for one token, not for all."""
    found = rewritten(attention(first_tokens(halves)), normal(2, 7, D), *tables(5), **projections())
    assert found.count("qk_norm_rope") == 2
    found.assert_as_accurate(normal(2, 7, D), *tables(1))


def of_two_projections(
    m, x: Tensor, text: Tensor, cos: Tensor, sin: Tensor, num_text_rows: int = 0
) -> Tensor:
    """The image, and some of the text, are rotated where they are joined already."""
    operands = []
    for w, norm in ((m.q, m.norm_q), (m.k, m.norm_k)):
        parts = [F.rms_norm(heads(F.linear(t, w)), (d,), norm, eps=1e-6) for t in (text, x)]
        whole = torch.cat(parts, dim=1)
        num = text.shape[1] - num_text_rows
        operands.append(torch.cat([whole[:, :num], neighbours(whole[:, num:], cos, sin)], 1))
    operands.append(torch.cat([heads(F.linear(t, m.v)) for t in (text, x)], dim=1))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in operands))


def test_tokens_that_are_one_section():
    found = rewritten(
        of_two_projections, normal(2, 5, D), normal(2, 3, D), *tables(5), **projections()
    )
    assert found.count("qk_norm_rope") == 2, found.reasons("qk_norm_rope")
    assert found.code().count("'channels', 'all'") == 2
    found.assert_as_accurate(normal(1, 6, D), normal(1, 4, D), *tables(6))


def test_tokens_of_more_than_one_section_decline():
    inputs = normal(2, 5, D), normal(2, 3, D), *tables(6)
    found = rewritten(partial(of_two_projections, num_text_rows=1), *inputs, **projections())
    assert not found.count("qk_norm_rope")
    why = "the rotated tokens are not those of one projection"
    assert found.reasons("qk_norm_rope") == [f"queries: {why}", f"keys: {why}"]
    found.assert_as_accurate(*inputs)


def middle(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([x[:, :1], halves(x[:, 1:6], cos, sin), x[:, 6:]], 1)


def both_ends(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    ends = halves(torch.cat([x[:, :2], x[:, -3:]], 1), cos, sin)
    return torch.cat([ends[:, :2], x[:, 2:-3], ends[:, 2:]], 1)


NEITHER = "the rotated tokens are neither the first nor the last ones"
NO_ROTATION = "what stands between the norm and attention is no known rotation"
NEAR_MISSES: dict[str, tuple[Rope, str]] = {
    "middle": (middle, NEITHER),
    "both ends": (both_ends, NEITHER),
    "fewer rows": (
        lambda x, cos, sin: torch.cat([halves(x[:, :5], cos[:1], sin[:1]), x[:, 5:]], 1),
        NO_ROTATION,
    ),
    "others doubled": (
        lambda x, cos, sin: torch.cat([halves(x[:, :5], cos, sin), 2 * x[:, 5:]], 1),
        NO_ROTATION,
    ),
    "others first": (
        lambda x, cos, sin: torch.cat([x[:, 5:], halves(x[:, :5], cos, sin)], 1),
        NO_ROTATION,
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str):
    rope, why = NEAR_MISSES[name]
    inputs = normal(2, 7, D), *tables(5)
    found = rewritten(attention(rope), *inputs, **projections())
    assert not found.count("qk_norm_rope"), found.code()
    assert found.reasons("qk_norm_rope") == [f"queries: {why}", f"keys: {why}"]
    found.assert_as_accurate(*inputs)
