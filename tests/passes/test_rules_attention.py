"""Decomposed attention to scaled_dot_product_attention."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

H, d = 4, 8


def rewritten(forward, *inputs: Tensor) -> Rewritten:
    return rewrite(Written(forward), *inputs, rules=["attention"])


def qkv(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(batch, H, tokens, d, dtype=dtype, seed=i) for i in range(3)]


def plain(m, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(-2, -1) * d**-0.5, dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def masked(m, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q / d**0.5) @ k.mT
    return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v


def grouped(m, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    batch, heads, tokens, width = k.shape
    k, v = (
        t[:, :, None]
        .expand(batch, heads, 2, tokens, width)
        .reshape(batch, 2 * heads, tokens, width)
        for t in (k, v)
    )
    return (q @ k.transpose(2, 3) * d**-0.5 + mask).softmax(-1) @ v


def test_scale_and_fp32_softmax():
    assert_expected_inline(
        rewritten(plain, *qkv(2, 5)).code(),
        """\
scaled_dot_product_attention = aten.scaled_dot_product_attention(inputs_0, inputs_1, inputs_2,
    None, 0.0, False, scale = 0.3535533905932738, enable_gqa = False)
return (scaled_dot_product_attention,)""",
    )


@pytest.mark.parametrize("scores", [lambda q, k: q @ k.T, F.linear], ids=["product", "linear"])
def test_keys_without_a_batch(scores):
    def forward(m, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) * 0.25).softmax(-1) @ v

    found = rewritten(forward, *(normal(5, d, seed=i) for i in range(3)))
    assert_expected_inline(
        found.code(),
        """\
scaled_dot_product_attention = aten.scaled_dot_product_attention(inputs_0, inputs_1, inputs_2,
    None, 0.0, False, scale = 0.25, enable_gqa = False)
return (scaled_dot_product_attention,)""",
    )
    found.assert_as_accurate(*(normal(7, d, seed=i) for i in range(3)))


def test_bool_mask():
    keep = torch.rand(2, 1, 5, 5) > 0.3
    keep[..., 0] = True
    found = rewritten(masked, *qkv(2, 5), keep)
    assert_expected_inline(
        found.code(),
        """\
bitwise_not = aten.bitwise_not(inputs_3)
logical_not = aten.logical_not(bitwise_not)
scaled_dot_product_attention = aten.scaled_dot_product_attention(inputs_0, inputs_1, inputs_2,
    logical_not, 0.0, False, scale = 0.35355339059327373, enable_gqa = False)
return (scaled_dot_product_attention,)""",
    )
    found.assert_as_accurate(*qkv(2, 5), keep)


def test_grouped_queries():
    q, k, v = qkv(2, 5)
    k, v = normal(2, 2, 5, d), normal(2, 2, 5, d, seed=1)
    mask = torch.randn(2, 1, 5, 5)
    found = rewritten(grouped, q, k, v, mask)
    assert_expected_inline(
        found.code(),
        """\
to_dtype = aten.to.dtype(inputs_3, float32)
scaled_dot_product_attention = aten.scaled_dot_product_attention(inputs_0, inputs_1, inputs_2,
    to_dtype, 0.0, False, scale = 0.3535533905932738, enable_gqa = True)
return (scaled_dot_product_attention,)""",
    )
    found.assert_as_accurate(q, k, v, mask)


def test_folded_heads():
    """The first diffusers: baddbmm over heads folded into the batch."""

    def forward(m, q, k, v):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=d**-0.5)
        return torch.bmm(scores.softmax(-1), v)

    found = rewritten(forward, *qkv(2, 5))
    assert_expected_inline(
        found.code(),
        """\
flatten = aten.flatten.using_ints(inputs_0, 0, 1)
flatten_1 = aten.flatten.using_ints(inputs_1, 0, 1)
flatten_2 = aten.flatten.using_ints(inputs_2, 0, 1)
scaled_dot_product_attention = aten.scaled_dot_product_attention(flatten, flatten_1, flatten_2,
    None, 0.0, False, scale = 0.3535533905932738, enable_gqa = False)
return (scaled_dot_product_attention,)""",
    )
    found.assert_as_accurate(*qkv(3, 7))


def test_einsum():
    def forward(m, q, k, v):
        scores = torch.einsum("b h i d, b h j d -> b h i j", q * d**-0.5, k)
        return torch.einsum("b h i j, b h j d -> b i h d", scores.softmax(-1), v)

    found = rewritten(forward, *qkv(2, 5))
    assert_expected_inline(
        found.code(),
        """\
scaled_dot_product_attention = aten.scaled_dot_product_attention(inputs_0, inputs_1, inputs_2,
    None, 0.0, False, scale = 0.3535533905932738, enable_gqa = False)
permute = aten.permute(scaled_dot_product_attention, [0, 2, 1, 3])
return (permute,)""",
    )
    found.assert_as_accurate(*qkv(3, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype):
    found = rewritten(plain, *qkv(2, 5, dtype))
    assert found.count("attention") == 1
    found.assert_as_accurate(*qkv(3, 7, dtype))


NEAR_MISSES = {
    "softmax over queries": lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v,
    "softmax over heads": lambda m, q, k, v: (q @ k.mT).softmax(1) @ v,
    "mask scaled as well": lambda m, q, k, v: ((q @ k.mT + q @ q.mT) * 0.3).softmax(-1) @ v,
    "weights from the right": lambda m, q, k, v: v.mT @ (q @ k.mT).softmax(-1),
    "transposed weights": lambda m, q, k, v: (q @ k.mT).softmax(-1).mT @ v,
    "scale by a tensor": lambda m, q, k, v: (q @ k.mT * q.mean()).softmax(-1) @ v,
    "masked to zero": lambda m, q, k, v: (
        (q @ k.mT).masked_fill((q @ k.mT) < 0, 0.0).softmax(-1) @ v
    ),
    "weights are returned": lambda m, q, k, v: ((q @ k.mT).softmax(-1), (q @ k.mT).softmax(-1) @ v),
    "weights are masked after": lambda m, q, k, v: (q @ k.mT).softmax(-1).tril() @ v,
    "biased in place": lambda m, q, k, v: (q @ k.mT).add_(q @ q.mT).softmax(-1) @ v,
    "subtracted mask": lambda m, q, k, v: (q @ k.mT - (q @ k.mT).tril()).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str):
    # As many tokens as channels and as many samples as heads: shapes give nothing away.
    inputs = qkv(H, d)
    found = rewritten(NEAR_MISSES[name], *inputs)
    assert not found.count("attention"), found.code()
    found.assert_as_accurate(*inputs)


def test_a_finite_mask_declines_with_the_reason():
    """-10000 leaves a row that is masked whole to its scores; -inf does not."""

    def forward(m, q, k, v, keep):
        return (q @ k.mT).masked_fill(~keep, -10000.0).softmax(-1) @ v

    found = rewritten(forward, *qkv(2, 5), torch.rand(2, 1, 5, 5) > 0.3)
    assert not found.count("attention")
    assert_expected_inline(
        "\n".join(found.reasons("attention")),
        """scores are masked with -10000.0, not -inf: rows that are masked whole would differ""",
    )


def test_declines_with_the_reason():
    found = rewritten(NEAR_MISSES["softmax over queries"], *qkv(2, 5))
    assert_expected_inline(
        "\n".join(found.reasons("attention")),
        """softmax is over dim -2, attention is over the last""",
    )
    found = rewritten(NEAR_MISSES["weights are returned"], *qkv(2, 5))
    assert_expected_inline(
        "\n".join(found.reasons("attention")),
        """the softmax does not go into one product with the values alone""",
    )
    found = rewritten(NEAR_MISSES["biased in place"], *qkv(2, 5))
    assert_expected_inline(
        "\n".join(found.reasons("attention")),
        """aten.add_.Tensor writes in place""",
    )
    found = rewritten(NEAR_MISSES["scale by a tensor"], *qkv(2, 5))
    assert_expected_inline(
        "\n".join(found.reasons("attention")),
        """aten.mul.Tensor, between scores and softmax, is no scale and no mask""",
    )


def test_a_softmax_of_no_attention_is_no_near_miss():
    def routed(m, q, k, v):
        return (q @ k.mT).relu().softmax(-1) * v

    assert rewritten(routed, *qkv(d, d)).reasons("attention") == []
