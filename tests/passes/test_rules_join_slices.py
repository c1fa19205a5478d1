"""Slices of a sequence that are modulated apart and joined, to modulation by segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

D = 16
RULES = ["rms_norm", "join_slices", "norm_modulate", "norm_modulate_segments"]


def rewritten(forward: Callable[..., Any], *inputs: Tensor, **parameters: Any) -> Rewritten:
    return rewrite(Written(forward, **parameters), *inputs, rules=RULES)


def given(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two tensors of tokens, and a row of each sample for the scales and the shifts."""
    tokens_of = [normal(batch, tokens, D, dtype=dtype, seed=i) for i in (0, 1)]
    return [*tokens_of, *(normal(batch, 3 * D, dtype=dtype, seed=i) for i in (2, 3))]


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), eps=1e-6)


def rows(*modulations: Tensor) -> list[tuple[Tensor, ...]]:
    """shift, scale and gate of each."""
    return [t[:, None].chunk(3, -1) for t in modulations]


def token_replace(m: Any, x: Tensor, branch: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """HunyuanVideo's: the first four tokens are of time 0."""
    (shift_a, scale_a, gate_a), (shift_b, scale_b, gate_b) = rows(a, b)
    first = x[:, :4] + branch[:, :4] * gate_a
    rest = x[:, 4:] + branch[:, 4:] * gate_b
    h = torch.cat([first, rest], dim=1)
    n = norm(h)
    first = n[:, :4] * (1 + scale_a) + shift_a
    rest = n[:, 4:] * (1 + scale_b) + shift_b
    return h, torch.cat([first, rest], dim=1)


def test_token_replace() -> None:
    found = rewritten(token_replace, *given(2, 7))
    counts = [found.count(rule) for rule in ("join_slices", *RULES[-2:])]
    assert counts == [0, 1, 1]
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_2, 1)
chunk = aten.chunk(unsqueeze, 3, -1)
getitem = chunk[0]
getitem_1 = chunk[1]
getitem_2 = chunk[2]
unsqueeze_1 = aten.unsqueeze(inputs_3, 1)
chunk_1 = aten.chunk(unsqueeze_1, 3, -1)
getitem_3 = chunk_1[0]
getitem_4 = chunk_1[1]
getitem_5 = chunk_1[2]
cat_3 = aten.cat([getitem_2, getitem_5], -2)
cat_4 = aten.cat([getitem_1, getitem_4], -2)
cat_5 = aten.cat([getitem, getitem_3], -2)
new_full = aten.new_full(inputs_1, [4], 0, dtype = int32)
sym_size_int_20 = aten.sym_size.int(inputs_0, 1)
add_9 = -4 + sym_size_int_20
new_full_1 = aten.new_full(inputs_1, [add_9], 1, dtype = int32)
cat_6 = aten.cat([new_full, new_full_1])
norm_modulate_segments = fxopt.norm_modulate_segments(inputs_1, inputs_0, cat_3, None, None,
    cat_4, cat_5, None, cat_6, False, 'layer', 1e-06, 0.0, 1.0, float32, float32)
getitem_14 = norm_modulate_segments[0]
getitem_15 = norm_modulate_segments[1]
return (getitem_15, getitem_14)""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype) -> None:
    found = rewritten(token_replace, *given(2, 7, dtype))
    found.assert_as_accurate(*given(3, 9, dtype))


def in_three(m: Any, x: Tensor, branch: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (shift_a, scale_a, gate_a), (shift_b, scale_b, gate_b) = rows(a, b)
    n = norm(x)
    pieces = n[:, :2], n.narrow(1, 2, 3), n[:, 5:]
    scales, shifts = (scale_a, gate_a, scale_b), (shift_a, shift_b, gate_b)
    each = zip(pieces, scales, shifts, strict=True)
    return torch.cat([piece * (1 + scale) + shift for piece, scale, shift in each], 1)


def by_text(m: Any, x: Tensor, branch: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Cut where another input ends."""
    (shift_a, scale_a, _), (shift_b, scale_b, _) = rows(a, b)
    n, cut = norm(torch.cat([x, branch], 1)), x.shape[1]
    return torch.cat(
        [n[:, :-cut] * (1 + scale_a) + shift_a, n[:, -cut:] * (1 + scale_b) + shift_b], 1
    )


def modulated(*kinds: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Both halves by each of `kinds`, of a slice, its scale and its shift."""

    def forward(m: Any, x: Tensor, branch: Tensor, a: Tensor, b: Tensor) -> Tensor:
        (shift_a, scale_a, _), (shift_b, scale_b, _) = rows(a, b)
        n = norm(x)
        first = kinds[0](n[:, :4], scale_a, shift_a)
        return torch.cat([first, kinds[-1](n[:, 4:], scale_b, shift_b)], 1)

    return forward


SPELLINGS: dict[str, Callable[..., Any]] = {
    "three pieces": in_three,
    "a cut that is a size": by_text,
    "scale alone": modulated(lambda n, scale, shift: n * (1 + scale)),
    "shift alone": modulated(lambda n, scale, shift: n + shift),
    "no offset": modulated(lambda n, scale, shift: n * scale + shift),
    "the operands turned round": modulated(lambda n, scale, shift: shift + (scale + 1) * n),
    "addcmul": modulated(lambda n, scale, shift: torch.addcmul(shift, n, 1 + scale)),
    "in a wider dtype": modulated(lambda n, scale, shift: (n.double() * (1 + scale)).float()),
    "a shift that both share": lambda m, x, y, a, b: torch.cat(
        [norm(x)[:, :4] * (1 + a[:, None, :D]) + b[:, None, :D],
         norm(x)[:, 4:] * (1 + a[:, None, D : 2 * D]) + b[:, None, :D]], 1,
    ),
    "split": lambda m, x, y, a, b: torch.cat(
        [n * (1 + t[:, None, :D])
         for n, t in zip(norm(x).split([3, x.shape[1] - 3], 1), (a, b), strict=True)], 1,
    ),
    "parameters": lambda m, x, y, a, b: torch.cat(
        [norm(x)[:, :4] * (1 + m.table[0]), norm(x)[:, 4:] * (1 + m.table[1])], 1,
    ),
    "a gate before the sum": lambda m, x, y, a, b: (
        x + torch.cat([y[:, :4] * a[:, None, :D], y[:, 4:] * b[:, None, :D]], 1)
    ),
    "a function of the gate": lambda m, x, y, a, b: torch.cat(
        [x[:, :4] + y[:, :4] * a[:, None, :D].tanh(),
         x[:, 4:] + y[:, 4:] * b[:, None, :D].tanh()], 1,
    ),
    "rows that are repeated": lambda m, x, y, a, b: norm(x) * (1 + torch.cat(
        [a[:, None, :D].expand(-1, 4, -1), b[:, None, :D].expand(-1, x.shape[1] - 4, -1)], 1,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    found = rewritten(SPELLINGS[name], *given(2, 7), table=normal(2, D))
    assert found.count("norm_modulate_segments") == 1, found.code()
    assert "aten.expand" not in found.code() and not found.count("join_slices")
    found.assert_as_accurate(*given(3, 9))


def sliced(first: slice, rest: slice) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor, branch: Tensor, a: Tensor, b: Tensor) -> Tensor:
        (shift_a, scale_a, _), (shift_b, scale_b, _) = rows(a, b)
        n = norm(x)
        return torch.cat(
            [n[:, first] * (1 + scale_a) + shift_a, n[:, rest] * (1 + scale_b) + shift_b], 1
        )

    return forward


NOT_ALL = "the slices of layer_norm are not all of it, one by one"
NEAR_MISSES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "slices that overlap": (sliced(slice(0, 4), slice(3, None)), [NOT_ALL]),
    "a token left out": (sliced(slice(0, 4), slice(5, None)), [NOT_ALL]),
    "the first left out": (sliced(slice(1, 4), slice(4, None)), [NOT_ALL]),
    "the last left out": (sliced(slice(0, 4), slice(4, -1)), [NOT_ALL]),
    "in another order": (sliced(slice(4, None), slice(0, 4)), [NOT_ALL]),
    "every other token": (sliced(slice(0, None, 2), slice(1, None, 2)), [NOT_ALL]),
    "of two norms": (
        lambda m, x, y, a, b: torch.cat(
            [norm(x)[:, :4] * (1 + a[:, None, :D]), norm(y)[:, 4:] * (1 + b[:, None, :D])], 1
        ),
        ["what is joined are slices of layer_norm and layer_norm_1"],
    ),
    "of norms that differ in eps": (
        lambda m, x, y, a, b: torch.cat(
            [norm(x)[:, :4] * (1 + a[:, None, :D]),
             F.layer_norm(x, (D,), eps=1e-3)[:, 4:] * (1 + b[:, None, :D])], 1,
        ),
        ["what is joined are slices of layer_norm and layer_norm_1"],
    ),
    "rows of several shapes": (
        lambda m, x, y, a, b: torch.cat(
            [norm(x)[:, :4] * (1 + a[:, None, :D]), norm(x)[:, 4:] * (1 + b[:1, None, :D])], 1
        ),
        ["the pieces are modulated by rows of several shapes or dtypes"],
    ),
    "one piece as it was": (
        lambda m, x, y, a, b: torch.cat([norm(x)[:, :4] * (1 + a[:, None, :D]), norm(x)[:, 4:]], 1),
        [],
    ),
    "a sum and a difference": (
        lambda m, x, y, a, b: torch.cat(
            [norm(x)[:, :4] + a[:, None, :D], norm(x)[:, 4:] - b[:, None, :D]], 1
        ),
        [],
    ),
    "offsets that differ": (
        lambda m, x, y, a, b: torch.cat(
            [torch.add(norm(x)[:, :4], a[:, None, :D], alpha=2), norm(x)[:, 4:] + b[:, None, :D]], 1
        ),
        [],
    ),
    "along the channels": (
        lambda m, x, y, a, b: torch.cat(
            [norm(x)[..., :4] * (1 + a[:, None, :4]), norm(x)[..., 4:] * (1 + b[:, None, 4:D])], -1
        ),
        [],
    ),
    "along the samples": (
        lambda m, x, y, a, b: torch.cat([norm(x)[:1] * (1 + a[:1, None, :D]), norm(x)[1:] * 2], 0),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_decline(name: str) -> None:
    forward, reasons = NEAR_MISSES[name]
    found = rewritten(forward, *given(2, 7))
    assert not found.count("norm_modulate_segments") and not found.count("join_slices")
    assert found.reasons("join_slices") == reasons
    found.assert_as_accurate(*given(2, 7))


def test_another_user_of_a_piece_declines() -> None:
    def forward(m: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first = norm(x)[:, :4] * (1 + a[:, None, :D])
        return torch.cat([first, norm(x)[:, 4:] * (1 + b[:, None, :D])], 1), first.sin()

    found = rewritten(forward, *given(2, 7))
    assert not found.count("join_slices")
    assert found.reasons("join_slices") == ["mul is also used by sin (aten.sin.default)"]
    found.assert_as_accurate(*given(2, 7))


def test_slices_that_are_joined_as_they_were() -> None:
    """No copy; but for one that others get, who may write to it."""
    linear = nn.Linear(D, D)

    def taken(m: Any, x: Tensor, *others: Tensor) -> Tensor:
        y = x.sin()
        return m.linear(torch.cat([y[:, :3], y[:, 3:]], 1)) + m.linear(y)

    found = rewritten(taken, *given(2, 7), linear=linear)
    assert found.count("join_slices") == 1 and "aten.cat" not in found.code()
    found.assert_as_accurate(*given(3, 9))

    def returned(m: Any, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        return torch.cat([y[:, :3], y[:, 3:]], 1), y

    assert not rewritten(returned, *given(2, 7)).count("join_slices")

    def written(m: Any, x: Tensor, *others: Tensor) -> Tensor:
        y = x.sin()
        z = torch.cat([y[:, :3], y[:, 3:]], 1)
        z.mul_(2)
        return z + y

    found = rewritten(written, *given(2, 7))
    assert not found.count("join_slices")
    found.assert_as_accurate(*given(2, 7))


def test_equal_stretches_share_their_index() -> None:
    def forward(m: Any, *inputs: Tensor) -> Tensor:
        h, n = token_replace(m, *inputs)
        return token_replace(m, h, n, *inputs[2:])[1]

    found = rewritten(forward, *given(2, 7))
    assert found.count("norm_modulate_segments") == 2
    assert found.code().count("new_full(") == 2, found.code()
    found.assert_as_accurate(*given(3, 9))
