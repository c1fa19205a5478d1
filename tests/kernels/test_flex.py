"""FlexAttention as a backend: what it computes, and what it refuses.

On a CPU it is compiled for forwards alone; all else runs on PyTorch's own reference of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import flex
from fxopt.kernels.attention import attention
from fxopt.kernels.attention_call import Window
from fxopt.recipe_errors import AttentionRefused
from tests.kernels.uncompiled_flex import on_cpu
from tests.numerics import Tensors, assert_as_accurate

B, H, S, T, D = 2, 4, 9, 12, 16


@pytest.fixture
def windows() -> Iterator[list[Any]]:
    with on_cpu() as ran:
        yield ran


def qkv(
    dtype: torch.dtype = torch.float32, kv_heads: int = H, queries: int = S, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, queries, D), (B, kv_heads, T, D), (B, kv_heads, T, D)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype).requires_grad_() for t in drawn]


def attend(inputs: list[Tensor], asked: str, mask: Any = None, **options: Any) -> Tensor:
    is_grouped = inputs[0].shape[1] != inputs[1].shape[1]
    window = options.get("window")
    arguments = mask, options.get("dropout_p", 0.0), options.get("causal", False), 0.3, is_grouped
    return attention(*inputs, *arguments, window, asked)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> Tensors:
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape)
    gradients = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    return {"out": out.detach()} | dict(zip("qkv", gradients, strict=True))


def assert_accurate(
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = H,
    queries: int = S,
    **options: Any,
) -> None:
    def three(seed: int) -> tuple[Tensors, Tensors, Tensors]:
        inputs = qkv(dtype, kv_heads, queries, seed)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
        truth = with_gradients(attend(exact, "math", wide, **options), exact)
        found, eager = (
            with_gradients(attend(inputs, asked, mask, **options), inputs)
            for asked in ("flex", "math")
        )
        return found, eager, truth

    assert_as_accurate(*three(0), again=three)


def drawn(*sizes: int) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(1))


IS_TOKEN = torch.arange(T) < torch.tensor([[T], [5]])
SEGMENT = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [3] * 7])
MASKS = {
    "none": None,
    "padding": IS_TOKEN[:, None, None],
    "by query": drawn(B, 1, S, T) > 0.5,
    "by head": drawn(H, S, T) > 0.5,
    "of two dims": drawn(S, T) > 0.5,
    "hides all keys of a query": (drawn(B, 1, S, T) > 0.5).index_fill(2, torch.tensor([3]), False),
    "segments": SEGMENT[:, None, :, None]
    == torch.nn.functional.pad(SEGMENT, (0, 3))[:, None, None],
    "added": drawn(B, H, S, T),
    "added, shared": torch.where(IS_TOKEN[:1, None, None], 0.0, -torch.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, windows: list[Any]) -> None:
    assert_accurate(MASKS[name])
    assert windows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_dtypes_and_groups(dtype: torch.dtype, kv_heads: int, windows: list[Any]) -> None:
    assert_accurate(MASKS["by query"], dtype, kv_heads)
    assert windows


@pytest.mark.parametrize("queries", [S, T])
def test_causal(queries: int, windows: list[Any]) -> None:
    assert_accurate(queries=queries, causal=True)
    assert set(windows) == {(flex.FAR, 0)}


@pytest.mark.parametrize("sides", [(3, 0), (2, 5), (-1, 2), (4, -1)])
def test_a_window_is_told_and_its_mask_not_read(sides: Any, windows: list[Any]) -> None:
    left, right = (T if n < 0 else n for n in sides)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril(right).triu(-left)
    assert_accurate(mask, queries=T, window=Window(*sides))
    assert set(windows) == {tuple(n if n >= 0 else flex.FAR for n in sides)}


def test_compiled_on_a_cpu() -> None:
    """One graph for windows of all widths, another for none."""
    q, k, v = (t.detach() for t in qkv(queries=T))
    for sides in ((3, 0), (-1, -1), (5, 2)):
        left, right = (T if n < 0 else n for n in sides)
        mask = torch.ones(T, T, dtype=torch.bool).tril(right).triu(-left)
        found = attend([q, k, v], "flex", mask, window=Window(*sides))
        # fp32, sums of 12 products of size 1 in another order.
        torch.testing.assert_close(found, attend([q, k, v], "math", mask), rtol=1e-5, atol=1e-6)


def test_all_reasons_are_collected() -> None:
    mask = torch.zeros(S, T, requires_grad=True)
    inputs = [t[..., :8] for t in qkv()]
    with pytest.raises(AttentionRefused) as caught:
        attend(inputs, "flex", mask, dropout_p=0.5)
    for reason in (
        "FlexAttention has no dropout",
        "the mask gets a gradient",
        "heads have 8 channels; FlexAttention takes 16 or more",
        "FlexAttention does not support backward on CPU",
    ):
        assert reason in str(caught.value)


def test_other_heads_are_refused(windows: list[Any]) -> None:
    q, k, v = qkv()
    with pytest.raises(AttentionRefused, match="4 heads of queries cannot share 3 of keys"):
        attend([q, k[:, :3], v[:, :3]], "flex")
    assert not windows
