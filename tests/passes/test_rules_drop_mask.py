"""Masks that the graph itself fills with "attend to all" are dropped, and no others."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import Written, normal, rewrite

sdpa = F.scaled_dot_product_attention


def qkv(batch: int = 2, num_tokens: int = 5) -> list[Tensor]:
    return [normal(batch, 3, num_tokens, 8, seed=seed) for seed in range(3)]


def test_fires():
    def forward(self, q, k, v):
        mask = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool)
        return sdpa(q, k, v, attn_mask=mask[:, None, None, :], scale=0.5)

    found = rewrite(Written(forward), *qkv())
    assert_expected_inline(
        found.code(),
        """\
scaled_dot_product_attention = aten.scaled_dot_product_attention(inputs_0, inputs_1, inputs_2,
    scale = 0.5, enable_gqa = False)
return (scaled_dot_product_attention,)""",
    )
    assert found.count("drop_mask") == 1
    found.assert_as_accurate(*qkv(3, 7))


def zeros(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], q.shape[2])


def inverted(q: Tensor) -> Tensor:
    """As transformers writes it: 1 keeps a token, and what is not kept gets a large negative."""
    keep = torch.ones(q.shape[0], q.shape[2])[:, None, None, :].to(q.dtype)
    return (1.0 - keep) * torch.finfo(q.dtype).min


def expanded(q: Tensor) -> Tensor:
    return torch.full((1, 1), 0.0).expand(q.shape[2], q.shape[2])


def nothing_padded(q: Tensor) -> Tensor:
    return ~torch.zeros_like(q[:, :1, :, :1], dtype=torch.bool)


@pytest.mark.parametrize("mask", [zeros, inverted, expanded, nothing_padded])
def test_spellings(mask):
    found = rewrite(Written(lambda self, q, k, v: sdpa(q, k, v, attn_mask=mask(q))), *qkv())
    assert found.count("drop_mask") == 1
    assert "None" in found.code() or "mask" not in found.code()
    found.assert_as_accurate(*qkv(3, 7))


def test_after_decomposed_attention():
    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * 8**-0.5 + zeros(q)
        return scores.softmax(-1) @ v

    found = rewrite(Written(forward), *qkv())
    assert (found.count("attention"), found.count("drop_mask")) == (1, 1)
    found.assert_as_accurate(*qkv(3, 7))


def written(q: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2])
    mask[:, -1] = -1.0
    return mask


def filled(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], q.shape[2]).masked_fill_(q[0, 0, :, :1] > 0, -1.0)


NEAR_MISSES = {
    "ones are added": lambda q: torch.ones(q.shape[2], q.shape[2]),
    "part is written": written,
    "filled by condition": filled,
    "causal": lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(),
    "depends on the input": lambda q: q[:, :, :, :1].transpose(-1, -2) > -10,
    "random": lambda q: (
        torch.ones(q.shape[2], q.shape[2]).bernoulli().bool() | (q[0, 0, :, :1] < 9)
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    mask = NEAR_MISSES[name]
    found = rewrite(Written(lambda self, q, k, v: sdpa(q, k, v, attn_mask=mask(q))), *qkv())
    assert not found.count("drop_mask")
    found.assert_as_accurate(*qkv())


def test_a_mask_that_comes_in_stays():
    mask = torch.ones(5, 5, dtype=torch.bool)
    found = rewrite(Written(lambda self, q, k, v, m: sdpa(q, k, v, attn_mask=m)), *qkv(), mask)
    assert not found.count("drop_mask")


def test_dropout_declines_with_the_reason():
    def forward(self, q, k, v):
        return sdpa(q, k, v, attn_mask=zeros(q), dropout_p=0.5)

    found = rewrite(Written(forward), *qkv())
    assert not found.count("drop_mask")
    assert found.reasons("drop_mask") == [
        "with dropout, attention without a mask draws other numbers"
    ]
