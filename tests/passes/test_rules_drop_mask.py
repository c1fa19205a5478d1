"""Masks that the graph itself makes, of "attend to all" or causal, are dropped, and no others."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from fxopt.passes import windows
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


def compared(q: Tensor, allowed: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    positions = torch.arange(q.shape[2], device=q.device)
    return allowed(positions[:, None], positions[None, :])


def of_positions(q: Tensor) -> Tensor:
    """As transformers writes it for a model that is compiled."""
    batch = torch.arange(q.shape[0])[:, None, None, None]
    positions = torch.arange(q.shape[2]).expand(q.shape[0], -1)
    packed = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    i, j = torch.arange(q.shape[2])[None, None, :, None], torch.arange(q.shape[2])[None, None, None]
    return (packed[batch, i] == packed[batch, j]) & (positions[batch, j] <= positions[batch, i])


def added(q: Tensor) -> Tensor:
    """As ACE-Step writes it: filled in place."""
    mask = torch.full((q.shape[2], q.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype)
    return mask.masked_fill_(compared(q, lambda i, j: i - j >= 0), 0.0)


def lower(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()


@pytest.mark.parametrize("mask", [lower, of_positions, added])
def test_causal(mask):
    forward = Written(lambda self, q, k, v: sdpa(q, k, v, attn_mask=mask(q), scale=0.5))
    found = rewrite(forward, *qkv())
    assert found.count("drop_mask") == 1
    assert "is_causal = True" in found.code()
    found.assert_as_accurate(*qkv(3, 7))


def test_a_causal_mask_for_other_numbers_of_keys_than_queries_stays():
    def forward(self, q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return sdpa(q, k, v, attn_mask=mask)

    q, _, _ = qkv(num_tokens=5)
    found = rewrite(Written(forward), q, *qkv(num_tokens=7)[1:])
    assert not found.count("drop_mask")


def written(q: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2])
    mask[:, -1] = -1.0
    return mask


def hidden_diagonal(q: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    mask.diagonal(1).fill_(False)
    return mask


def written_as_another(q: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    mask.detach()[:, 2:].fill_(False)
    return mask


def fewer_by_sample(q: Tensor) -> Tensor:
    """Of two or three samples, of five tokens each, it is causal."""
    i, j = torch.arange(5)[:, None], torch.arange(5)
    return (j <= i) & (i - j <= 7 - q.shape[0])


def in_low_precision(q: Tensor) -> Tensor:
    """Of positions behind 256, several are one number in bfloat16."""
    positions = torch.arange(q.shape[2]).bfloat16()
    return positions[None, :] <= positions[:, None]


def filled(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], q.shape[2]).masked_fill_(q[0, 0, :, :1] > 0, -1.0)


NEAR_MISSES = {
    "ones are added": lambda q: torch.ones(q.shape[2], q.shape[2]),
    "part is written": written,
    "filled by condition": filled,
    "a window": lambda q: compared(q, lambda i, j: (i - j).abs() <= 2),
    "the query's own key is hidden": lambda q: compared(q, lambda i, j: (j < i) | (j == 0)),
    "causal, and each query sees the last key": lambda q: compared(
        q, lambda i, j: (j <= i) | (j == q.shape[2] - 1)
    ),
    "half of the tokens before": lambda q: compared(
        q, lambda i, j: (j <= i) & (i - j <= q.shape[2] // 2)
    ),
    "a window wider than the probes of other rules": lambda q: compared(
        q, lambda i, j: (j <= i) & (i - j <= 300)
    ),
    "a quotient of positions is seen": lambda q: compared(
        q, lambda i, j: (j <= i) & (i // 64 - j // 64 <= 64)
    ),
    "a small part of the distance": lambda q: compared(
        q, lambda i, j: (j <= i) & ((i - j) * 0.001 <= 1)
    ),
    "a root of the distance": lambda q: compared(
        q, lambda i, j: (j <= i) & ((i - j).float().sqrt() <= 64)
    ),
    "a number is a product": lambda q: compared(
        q, lambda i, j: (j <= i) & (i - j <= torch.full((), 64) * 64)
    ),
    "two periods meet late": lambda q: compared(
        q, lambda i, j: (j <= i) & ((j % 30 < 29) | (j % 31 < 30))
    ),
    "the last thousand tokens": lambda q: compared(
        q, lambda i, j: (j <= i) & (j >= q.shape[2] - 1000)
    ),
    "few tokens see less": lambda q: compared(q, lambda i, j: (j <= i) & (j >= 9 - q.shape[2])),
    "a thousandth of the tokens": lambda q: compared(
        q, lambda i, j: (j <= i) & (i - j <= 100 + q.shape[2] // 1000)
    ),
    "as many as samples": lambda q: compared(q, lambda i, j: (j <= i) & (i - j <= q.shape[0])),
    "a thousand for each sample": lambda q: compared(
        q, lambda i, j: (j <= i) & (i - j <= q.shape[0] * 1000)
    ),
    "fewer the more samples there are": fewer_by_sample,
    "positions in low precision": in_low_precision,
    "a view is written": hidden_diagonal,
    "written under another name": written_as_another,
    "causal, added as no large number": lambda q: torch.full((q.shape[2],) * 2, -3.0).triu(1),
    "written after": lambda q: compared(q, lambda i, j: j <= i).index_fill_(
        0, q[0, 0, :1, 0].long(), True
    ),
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


def test_a_mask_that_is_too_large_to_run_stays(monkeypatch):
    forward = Written(lambda self, q, k, v: sdpa(q, k, v, attn_mask=lower(q)))
    # The largest one that would be run has more than 64 queries.
    monkeypatch.setattr(windows, "LARGEST", 64**2)
    assert not rewrite(forward, *qkv()).count("drop_mask")


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
