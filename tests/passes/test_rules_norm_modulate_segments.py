"""Modulation by rows of a small table, looked up per token, to one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

D, N = 16, 3
RULES = ["norm_modulate", "norm_modulate_segments"]


def rewritten(forward: Callable[..., Any], *inputs: Tensor, **parameters: Any) -> Rewritten:
    return rewrite(Written(forward, **parameters), *inputs, rules=RULES)


def drawn(*shape: int, high: int = N) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_condition(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, two rows of scale and shift, and which row is a token's."""
    rows = [normal(batch, 2 * D, dtype=dtype, seed=i) for i in (1, 2)]
    return [normal(batch, tokens, D, dtype=dtype), *rows, drawn(batch, tokens, high=2)]


def edit(m: Any, x: Tensor, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Qwen-Image's `zero_cond_t`."""
    (scale_a, shift_a), (scale_b, shift_b) = (t[:, None].chunk(2, -1) for t in (a, b))
    scale = torch.where(index[..., None] == 0, scale_a, scale_b)
    shift = torch.where(index[..., None] == 0, shift_a, shift_b)
    return F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift


def by_index(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, a branch, and the row of each token."""
    tensors = [normal(batch, tokens, D, dtype=dtype, seed=i) for i in (0, 1)]
    return [*tensors, drawn(tokens)]


def packed(m: Any, x: Tensor, branch: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """MiniMax-H3's rows by time and modality."""
    scale, shift, gate = m.table.chunk(3, -1)
    h = x + gate.index_select(0, index) * branch
    n = F.rms_norm(h, (D,), eps=1e-6)
    return h, n * (1 + scale.index_select(0, index)) + shift.index_select(0, index)


def test_a_condition() -> None:
    found = rewritten(edit, *by_condition(2, 5))
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_1, 1)
chunk = aten.chunk(unsqueeze, 2, -1)
getitem = chunk[0]
getitem_1 = chunk[1]
unsqueeze_1 = aten.unsqueeze(inputs_2, 1)
chunk_1 = aten.chunk(unsqueeze_1, 2, -1)
getitem_2 = chunk_1[0]
getitem_3 = chunk_1[1]
unsqueeze_2 = aten.unsqueeze(inputs_3, 2)
eq = aten.eq.Scalar(unsqueeze_2, 0)
cat = aten.cat([getitem_2, getitem], -2)
cat_1 = aten.cat([getitem_3, getitem_1], -2)
squeeze_dim = aten.squeeze.dim(eq, -1)
norm_modulate_segments = fxopt.norm_modulate_segments(inputs_0, None, None, None, None, cat,
    cat_1, None, squeeze_dim, False, 'layer', 1e-06, 0.0, 1.0, float32, float32)
getitem_5 = norm_modulate_segments[0]
return (getitem_5,)""",
    )


def test_an_index() -> None:
    found = rewritten(packed, *by_index(2, 5), table=normal(N, 3 * D))
    assert_expected_inline(
        found.code(),
        """\
chunk = aten.chunk(p_table, 3, -1)
getitem = chunk[0]
getitem_1 = chunk[1]
getitem_2 = chunk[2]
norm_modulate_segments = fxopt.norm_modulate_segments(inputs_1, inputs_0, getitem_2, None, None,
    getitem, getitem_1, None, inputs_2, False, 'rms', 1e-06, 0.0, 1.0, float32, float32)
getitem_5 = norm_modulate_segments[0]
getitem_6 = norm_modulate_segments[1]
return (getitem_6, getitem_5)""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype) -> None:
    found = rewritten(edit, *by_condition(2, 5, dtype))
    assert found.count("norm_modulate_segments") == 1
    found.assert_as_accurate(*by_condition(3, 7, dtype))
    found = rewritten(packed, *by_index(2, 5, dtype), table=normal(N, 3 * D, dtype=dtype))
    assert found.count("norm_modulate_segments") == 1
    found.assert_as_accurate(*by_index(3, 7, dtype))


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), eps=1e-6)


# Each takes x, two tensors of a row per sample, a table of N rows, an index [B, S] and one [S].
SPELLINGS: dict[str, Callable[..., Any]] = {
    "scale alone": lambda m, x, a, b, t, i, s: norm(x) * (1 + t[i]),
    "shift alone": lambda m, x, a, b, t, i, s: norm(x) + t[i],
    "one index for all": lambda m, x, a, b, t, i, s: norm(x) * (1 + t[s]),
    "negative index": lambda m, x, a, b, t, i, s: norm(x) * (1 + t[i - N]),
    "embedding": lambda m, x, a, b, t, i, s: norm(x) * (1 + F.embedding(i, t)),
    "gather": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + t.expand(x.shape[0], N, D).gather(1, i[..., None].expand(-1, -1, D)))
    ),
    "take_along_dim": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + torch.take_along_dim(t[None], i[..., None], 1))
    ),
    "where of expanded rows": lambda m, x, a, b, t, i, s: (
        norm(x)
        * torch.where(
            i[..., None] > 1,
            (1 + a)[:, None].expand(-1, x.shape[1], -1),
            (1 + b)[:, None].expand(-1, x.shape[1], -1),
        )
    ),
    "where of one row for all": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + torch.where(s.view(1, -1, 1) > 1, a[:, None], b[:1][None]))
    ),
    "where of vectors": lambda m, x, a, b, t, i, s: (
        norm(x) + torch.where(i[..., None] > 1, t[0], t[1])
    ),
    "a function of what is looked up": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + t[i].tanh().to(torch.float64).to(t.dtype))
    ),
    "a shift per sample": lambda m, x, a, b, t, i, s: norm(x) * (1 + t[i]) + a[:, None],
    "a residual behind": lambda m, x, a, b, t, i, s: x.sin() + t[i] * norm(x),
    "no norm": lambda m, x, a, b, t, i, s: x + t[i].tanh() * x.sin(),
    "gate by condition": lambda m, x, a, b, t, i, s: (
        x + torch.where(i[..., None] > 1, a[:, None], b[:, None]) * x.sin()
    ),
}


def given(batch: int, tokens: int) -> list[Tensor]:
    rows = [normal(batch, D, seed=i) for i in (1, 2)]
    tables = [normal(N, D, seed=3), drawn(batch, tokens), drawn(tokens)]
    return [normal(batch, tokens, D), *rows, *tables]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    found = rewritten(SPELLINGS[name], *given(2, 5))
    assert found.count("norm_modulate_segments") == 1, found.code()
    found.assert_as_accurate(*given(2, 5))  # of `take_along_dim` export fixes all sizes


NEAR_MISSES: dict[str, Callable[..., Any]] = {
    "a condition per element": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + torch.where(x.detach() > 0, a[:, None], b[:, None]))
    ),
    "branches per token": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + torch.where(i[..., None] > 1, x.sin(), x.cos()))
    ),
    "one branch per token": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + torch.where(i[..., None] > 1, x.sin(), b[:, None]))
    ),
    "a row of features": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + t.index_select(1, torch.arange(D).flip(0))[:1])
    ),
    "a condition per sample": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + torch.where(i[:, :1, None] > 1, a[:, None], b[:, None]))
    ),
    "an index per sample": lambda m, x, a, b, t, i, s: norm(x) * (1 + t[i[:, 0]][:, None]),
    "two indices": lambda m, x, a, b, t, i, s: norm(x) * (1 + t[i]) + t[s],
    "a shift of another length": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + t[i]) + x[:, :, :1].sin()
    ),
    "2 + scale": lambda m, x, a, b, t, i, s: norm(x) * (2 + t[i]),
    "1 - scale": lambda m, x, a, b, t, i, s: norm(x) * (1 - t[i]),
    "1 + 2 scale": lambda m, x, a, b, t, i, s: norm(x) * torch.add(1, t[i], alpha=2),
    "a padding row without gradient": lambda m, x, a, b, t, i, s: (
        norm(x) * (1 + F.embedding(i, t, padding_idx=0))
    ),
    "a softmax of what is looked up": lambda m, x, a, b, t, i, s: norm(x) * (1 + t[i].softmax(1)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_keep_their_meaning(name: str) -> None:
    found = rewritten(NEAR_MISSES[name], *given(2, 5))
    assert not found.count("norm_modulate_segments"), found.code()
    found.assert_as_accurate(*given(2, 5))


def test_other_indices_decline_with_the_reason() -> None:
    found = rewritten(NEAR_MISSES["two indices"], *given(2, 5))
    assert found.reasons("norm_modulate_segments") == [
        "the shift is looked up by another index than scale"
    ]
    found = rewritten(NEAR_MISSES["a shift of another length"], *given(2, 5))
    assert found.reasons("norm_modulate_segments") == [
        "the shift differs per token, and is no row of a table"
    ]


def per_sample(batch: int, tokens: int, num_tables: int | None = None) -> list[Tensor]:
    """x, an index, and for each sample a table of three times as many channels."""
    tables = normal(num_tables or batch, N, 3 * D, seed=3)
    return [normal(batch, tokens, D), drawn(batch, tokens), tables]


def gathered(index: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
        return norm(x) * (1 + t[..., :D].gather(1, index(i, x)))

    return forward


# A gather may take fewer samples and channels than the table has.
GATHERS: dict[str, Callable[..., Any]] = {
    "expanded": gathered(lambda i, x: i[..., None].expand(-1, -1, D)),
    "expanded as x": gathered(lambda i, x: i.unsqueeze(-1).expand_as(x)),
    "broadcast": gathered(lambda i, x: torch.broadcast_to(i[..., None], x.shape)),
    "repeated": gathered(lambda i, x: i[..., None].repeat(1, 1, D)),
    "tiled": gathered(lambda i, x: torch.tile(i[..., None], (1, 1, D))),
    "in memory": gathered(lambda i, x: i[..., None].expand(-1, -1, D).contiguous()),
    "widened": gathered(lambda i, x: i.int()[..., None].expand(-1, -1, D).long()),
    "of one sample": gathered(lambda i, x: i[:1, :, None].expand(x.shape[0], -1, D)),
    "of fewer channels": lambda m, x, i, t: (
        norm(x) * (1 + t.gather(1, i[..., None].expand(-1, -1, D)))
    ),
    "split": lambda m, x, i, t: (
        norm(x) * (1 + t.gather(1, i[..., None].expand(-1, -1, 3 * D)).chunk(3, -1)[1])
    ),
}


@pytest.mark.parametrize("name", GATHERS)
def test_tables_per_sample(name: str) -> None:
    found = rewritten(GATHERS[name], *per_sample(2, 5))
    assert found.count("norm_modulate_segments") == 1, found.reasons("norm_modulate_segments")
    found.assert_as_accurate(*per_sample(3, 7))
    found.assert_as_accurate(*per_sample(3, 7, num_tables=5))


NO_LOOKUPS: dict[str, tuple[Callable[..., Any], str]] = {
    "an index per channel": (
        gathered(lambda i, x: (i[..., None] + torch.arange(D)) % N),
        "the scale: gather gathers by remainder, which may differ from channel to channel",
    ),
    "a mask": (
        gathered(lambda i, x: (i[..., None].expand(-1, -1, D) > 1).long()),
        "the scale: gather gathers by to, which may differ from channel to channel",
    ),
    "two indices": (
        lambda m, x, i, t: norm(x) * (1 + t[torch.arange(x.shape[0])[:, None], i][..., :D]),
        "the scale: index indexes 3 dims by other than one index of rows",
    ),
    "a padding row": (
        lambda m, x, i, t: norm(x) * (1 + F.embedding(i, t[0, :, :D], padding_idx=0)),
        "the scale: embedding is an embedding whose gradient leaves out or scales rows",
    ),
}


def test_a_sparse_gradient_stays_sparse() -> None:
    x, index, tables = per_sample(2, 5)
    table = tables[0, :, :D]
    found = rewritten(
        lambda m, x, i, t: norm(x) * (1 + F.embedding(i, t, sparse=True)), x, index, table
    )
    assert not found.count("norm_modulate_segments")
    (reason,) = found.reasons("norm_modulate_segments")
    assert reason == "the scale: embedding is an embedding whose gradient is sparse"


@pytest.mark.parametrize("name", NO_LOOKUPS)
def test_what_is_no_lookup_says_what_is_seen(name: str) -> None:
    forward, reason = NO_LOOKUPS[name]
    found = rewritten(forward, *per_sample(2, 5))
    found.assert_as_accurate(*per_sample(2, 5))
    assert found.reasons("norm_modulate_segments") == [reason]


def test_a_wide_table_that_is_split_after_the_lookup() -> None:
    """Both ops take their part, and what was looked up whole is gone."""

    def forward(m: Any, x: Tensor, branch: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        scale, gate = m.table[i][..., : 2 * D].tanh().chunk(2, -1)
        n = norm(x) * (1 + scale) + m.table[i][..., 2 * D :]
        return n, n + gate * branch

    inputs = [*by_index(2, 5)[:2], drawn(2, 5)]
    found = rewritten(forward, *inputs, table=normal(N, 3 * D))
    assert found.count("norm_modulate_segments") == 2
    assert "aten.index" not in found.code()
    found.assert_as_accurate(*by_index(3, 7)[:2], drawn(3, 7))


def test_what_others_use_stays() -> None:
    def forward(m: Any, x: Tensor, t: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        scale = t[i]
        return norm(x) * (1 + scale), scale.sin()

    inputs = [normal(2, 5, D), normal(N, D), drawn(2, 5)]
    found = rewritten(forward, *inputs)
    assert found.count("norm_modulate_segments") == 1 and "aten.index" in found.code()
    found.assert_as_accurate(*inputs)


def test_a_lookup_without_gradient_declines() -> None:
    def forward(m: Any, x: Tensor, t: Tensor, i: Tensor) -> Tensor:
        with torch.no_grad():
            scale = t[i]
        return norm(x) * (1 + scale)

    inputs = [normal(2, 5, D), normal(N, D), drawn(2, 5)]
    found = rewritten(forward, *inputs)
    assert not found.count("norm_modulate_segments")
    found.assert_as_accurate(*inputs)


def test_a_table_that_is_written_declines_with_the_reason() -> None:
    def forward(m: Any, x: Tensor, t: Tensor, i: Tensor) -> Tensor:
        table = t * 2
        scale = table[i]
        table.add_(1)
        return norm(x) * (1 + scale)

    inputs = [normal(2, 5, D), normal(N, D), drawn(2, 5)]
    found = rewritten(forward, *inputs)
    assert not found.count("norm_modulate_segments")
    assert "mul is written in place by add_" in found.reasons("norm_modulate_segments")
    found.assert_as_accurate(*inputs)


def test_linears_before_and_behind() -> None:
    """The bias of the linear before waits, and the normed tensor between is not kept."""

    def forward(m: Any, x: Tensor, branch: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        h, n = packed(m, x, m.before(branch), index)
        return h, m.behind(n)

    linears = {"before": nn.Linear(D, D), "behind": nn.Linear(D, 8)}
    module = Written(forward, table=normal(N, 3 * D), **linears)
    found = rewrite(module, *by_index(2, 5), rules=[*RULES, "fuse_bias", "merge_linears"])
    assert_expected_inline(
        found.code(),
        """\
chunk = aten.chunk(p_table, 3, -1)
getitem = chunk[0]
getitem_1 = chunk[1]
getitem_2 = chunk[2]
linear = aten.linear(inputs_1, p_before_weight)
norm_modulate_segments_linears = fxopt.norm_modulate_segments_linears(linear, inputs_0,
    getitem_2, None, None, getitem, getitem_1, p_before_bias, inputs_2, False, 'rms', 1e-06,
    0.0, 1.0, float32, float32, [p_behind_weight], [p_behind_bias], [0, 0, 8])
getitem_9 = norm_modulate_segments_linears[0]
getitem_10 = getitem_9[0]
getitem_11 = norm_modulate_segments_linears[1]
return (getitem_11, getitem_10)""",
    )
    found.assert_as_accurate(*by_index(2, 7))
