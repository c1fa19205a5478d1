"""Decomposed attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rewriting import normal
from tests.passes.spellings.parts import (
    DTYPES,
    D,
    H,
    Pick,
    Spelling,
    copied,
    d,
    finished,
    plus,
    split_heads,
)


def softmax(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """softmax(scores, q): over the last dim, in the dtype of `q`."""
    return pick(
        "softmax",
        lambda s, q: s.softmax(-1),
        lambda s, q: F.softmax(s, dim=-1),
        lambda s, q: torch.softmax(s, dim=3),
        lambda s, q: F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype),
        lambda s, q: torch.softmax(s.float(), dim=-1).type_as(q),
        lambda s, q: F.dropout(nn.functional.softmax(s, dim=-1), p=0.0),
        lambda s, q: torch.special.softmax(s, -1),
    )


def masked(pick: Pick) -> tuple[Callable[[Tensor, Any], Tensor], list[Tensor]]:
    """(apply, inputs) with `apply(scores, *inputs)`."""
    num_queries, num_keys = 5, 7
    keep = torch.rand(2, 1, num_queries, num_keys, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[..., 0] = True
    bias = pick("bias", keep[:1].float().log(), torch.randn(2, H, num_queries, num_keys))
    add, minus_infinity = plus(pick), float("-inf")
    lowest = torch.finfo(torch.float32).min
    return pick(
        "mask",
        (lambda s: s, []),
        (lambda s: s, []),
        (lambda s, m: add(s, m.to(s.dtype)), [bias]),
        (lambda s, m: s.masked_fill(~m, minus_infinity), [keep]),
        (lambda s, m: s.masked_fill(m == 0, minus_infinity), [keep]),
        (lambda s, m: s.masked_fill(m.logical_not(), torch.finfo(s.dtype).min), [keep]),
        (lambda s, m: torch.where(m, s, minus_infinity), [keep]),
        (lambda s, m: torch.where(m, s, torch.finfo(s.dtype).min), [keep]),
        (lambda s, m: torch.where(m, s, torch.full_like(s, minus_infinity)), [keep]),
        (lambda s, m: torch.where(m, s, torch.full([], minus_infinity, dtype=s.dtype)), [keep]),
        (lambda s, m: s.float().masked_fill(~m, lowest).to(s.dtype), [keep]),
    )


def scored(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """scored(q, k) = q @ k^T / sqrt(d)."""
    transposed = pick(
        "k^T",
        lambda k: k.transpose(-2, -1),
        lambda k: k.transpose(2, 3),
        lambda k: k.mT,
        lambda k: k.permute(0, 1, 3, 2),
        lambda k: k.swapaxes(-1, -2),
        lambda k: k.transpose(-1, -2).contiguous(),
    )
    product = pick("product", lambda q, k: q @ transposed(k), lambda q, k: q.matmul(transposed(k)))
    scale = pick("scale", d**-0.5, 1 / math.sqrt(d))

    return pick(
        "scaled",
        lambda q, k: product(q, k) * scale,
        lambda q, k: scale * product(q, k),
        lambda q, k: product(q, k) / math.sqrt(d),
        lambda q, k: product(q, k).div(d**0.5),
        lambda q, k: product(q * scale, k),
        lambda q, k: product(q, k * scale),
        lambda q, k: product(q / math.sqrt(d), k),
        lambda q, k: product(q * scale**0.5, k * scale**0.5),
        lambda q, k: torch.einsum("bhsd,bhtd->bhst", q, k) * scale,
        lambda q, k: product(q.float(), k.float()).to(q.dtype) * scale,
        product,
    )


def batched(pick: Pick) -> Callable[..., Tensor]:
    """batched(q, k, v, weigh, mask) over heads folded into the batch, as in the first diffusers."""
    fold = pick("fold", lambda x: x.flatten(0, 1), lambda x: x.reshape(-1, *x.shape[2:]))
    scale = d**-0.5

    def baddbmm(q: Tensor, k: Tensor) -> Tensor:
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        return torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=scale)

    product = pick(
        "batched product",
        baddbmm,
        lambda q, k: torch.bmm(q, k.transpose(-1, -2)) * scale,
        lambda q, k: torch.einsum("b i d, b j d -> b i j", q, k) * scale,
    )
    spread = pick("spread scores", True, False)

    def attend(q: Tensor, k: Tensor, v: Tensor, weigh: Any, mask: Any) -> Tensor:
        scores = product(fold(q), fold(k))
        if spread:
            weights = weigh(mask(scores.view(-1, H, *scores.shape[1:])), q).flatten(0, 1)
        else:
            weights = F.softmax(scores, dim=-1)
        return torch.bmm(weights, fold(v)).view(-1, H, q.shape[2], d)

    return attend


def attention(pick: Pick) -> Spelling:
    weigh, score, (mask, extra), copy = softmax(pick), scored(pick), masked(pick), copied(pick)
    attend = pick(
        "attend",
        lambda p, v: p @ v,
        lambda p, v: torch.matmul(p, v),
        lambda p, v: p.matmul(v).transpose(1, 2).reshape(v.shape[0], -1, H * d),
        lambda p, v: torch.einsum("bhst,bhtd->bhsd", p, v),
    )
    num_groups, heads = pick("groups", 1, 1, H), split_heads(pick)
    repeat = pick(
        "repeat",
        lambda k: k[:, :, None].expand(-1, -1, num_groups, -1, -1).flatten(1, 2),
        lambda k: (
            k[:, :, None]
            .expand(k.shape[0], k.shape[1], num_groups, k.shape[2], d)
            .reshape(k.shape[0], -1, k.shape[2], d)
        ),
        lambda k: k.unsqueeze(2).repeat(1, 1, num_groups, 1, 1).flatten(1, 2),
        lambda k: k.repeat_interleave(num_groups, dim=1),
        lambda k: torch.repeat_interleave(k, num_groups, 1),
    )
    dtype = pick("dtype", *DTYPES)
    batch, folded = batched(pick), pick("folded", False, False, True)

    def forward(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        q, k, v = (heads(t).transpose(1, 2) for t in (q, k, v))
        if num_groups > 1:
            k, v = repeat(k), repeat(v)
        if folded:
            return batch(q, k, v, weigh, lambda s: mask(s, *masks))
        return attend(copy(weigh(mask(score(q, k), *masks), q)), v)

    shapes = [(2, 5, D), (2, 7, D // num_groups), (2, 7, D // num_groups)]
    inputs = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return finished(pick, forward, [*inputs, *extra])
