"""QK-norm and rotary embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rewriting import normal
from tests.passes.spellings.norms import rms
from tests.passes.spellings.parts import (
    DTYPES,
    EPS,
    D,
    Pick,
    Spelling,
    copied,
    d,
    finished,
    split_heads,
    times,
    upcast,
)


def rotated(pick: Pick) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """(rotate, layout): `rotate(x, cos, sin)` of [B, S, H, d] or [B, H, S, d], tables [S, d / 2].

    `layout(table)` broadcasts a table to what is rotated.
    """
    raise_, multiply = upcast(pick), times(pick)

    def halves(x: Tensor, c: Tensor, s: Tensor, join: Callable[..., Tensor]) -> Tensor:
        a, b = cut(x)
        return join(multiply(a, c) - multiply(b, s), multiply(b, c) + multiply(a, s))

    cut = pick(
        "cut",
        lambda x: x.chunk(2, dim=-1),
        lambda x: x.split(x.shape[-1] // 2, dim=-1),
        lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
        lambda x: x.unflatten(-1, (2, -1)).unbind(-2),
    )
    pairs = pick(
        "pairs",
        lambda x: x.unflatten(-1, (-1, 2)).unbind(-1),
        lambda x: x.reshape(*x.shape[:-1], -1, 2).unbind(-1),
        lambda x: (x[..., 0::2], x[..., 1::2]),
        lambda x: (x.unflatten(-1, (-1, 2))[..., 0], x.reshape(*x.shape[:-1], -1, 2)[..., 1]),
    )

    def flat(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], dim=-1).flatten(-2)

    def neighbours(x: Tensor, c: Tensor, s: Tensor, write: Callable[..., Tensor]) -> Tensor:
        a, b = pairs(x)
        return write(a * c - b * s, multiply(a, s) + multiply(b, c))

    def written(even: Tensor, odd: Tensor) -> Tensor:
        out = torch.empty(*even.shape[:-1], 2 * even.shape[-1], dtype=even.dtype)
        out[..., 0::2] = even
        out[..., 1::2] = odd
        return out

    def turned_halves(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        a, b = cut(x)
        c, s = torch.cat([c, c], dim=-1), torch.cat((s, s), -1)
        return multiply(x, c) + multiply(torch.cat([-b, a], dim=-1), s)

    def turned_neighbours(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        a, b = pairs(x)
        c, s = (t.repeat_interleave(2, dim=-1) for t in (c, s))
        return multiply(x, c) + multiply(flat(-b, a), s)

    def by_complex(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(turned * torch.complex(c, s)).flatten(-2)

    def by_matrices(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        matrices = torch.stack([c, -s, s, c], dim=-1).unflatten(-1, (2, 2))
        a, b = x.float().unflatten(-1, (-1, 1, 2)).unbind(-1)
        return (matrices[..., 0] * a + matrices[..., 1] * b).flatten(-2)

    rotate = pick(
        "rotate",
        turned_halves,
        turned_neighbours,
        lambda x, c, s: halves(x, c, s, lambda a, b: torch.cat([a, b], dim=-1)),
        lambda x, c, s: halves(x, c, s, lambda a, b: torch.stack([a, b], dim=-2).flatten(-2)),
        lambda x, c, s: neighbours(x, c, s, flat),
        lambda x, c, s: neighbours(x, c, s, written),
        by_complex,
        by_matrices,
    )
    num_rotated = pick("rotated channels", d, d, d // 2)

    def first(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        c, s = (t[..., : num_rotated // 2] for t in (c, s))
        turned = rotate(x[..., :num_rotated], c, s)
        return torch.cat([turned, x[..., num_rotated:].to(turned.dtype)], dim=-1)

    turn = first if num_rotated < d else rotate
    return lambda x, c, s: turn(raise_(x), c, s).to(x.dtype), pick(
        "tables", lambda t: t, lambda t: t[None], lambda t: t.unsqueeze(0)
    )


def head_norm(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """norm(x, w) over the last dim."""
    return pick(
        "head norm",
        lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS),
        lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS),
        lambda x, w: F.layer_norm(x, (x.shape[-1],), w, eps=EPS),
        rms(pick),
        lambda x, w: x,
    )


def qk_norm_rope(pick: Pick) -> Spelling:
    """Self-attention with norms and rotation of queries and keys, up to two streams."""
    norm, heads, (rotate, layout) = head_norm(pick), split_heads(pick), rotated(pick)
    across, late = pick("across heads", False, False, True), pick("rotate", "BSHD", "BHSD")
    streams = pick("streams", "one", "one", "text unrotated", "joint", "text first")
    dtype, fused = pick("dtype", *DTYPES), pick("projection", False, True)
    copy = copied(pick)

    def project(m: nn.Module, x: Tensor) -> list[Tensor]:
        q, k, v = (
            F.linear(x, m.qkv).chunk(3, -1) if fused else (F.linear(x, w) for w in m.qkv.chunk(3))
        )
        if across:
            return [heads(norm(q, m.wide)), heads(norm(k, m.wide)), heads(v)]
        return [norm(copy(heads(q)), m.narrow), norm(heads(k), m.narrow), heads(v)]

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if late == "BHSD":
            return rotate(x.transpose(1, 2), layout(cos), layout(sin)).transpose(1, 2)
        return rotate(x, layout(cos).unsqueeze(-2), layout(sin).unsqueeze(-2))

    def forward(m: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, *text: Tensor) -> Tensor:
        q, k, v = project(m, x)
        if streams in ("one", "text unrotated", "text first"):
            offset = text[0].shape[1] if streams == "text first" else 0
            if not offset:
                q, k = turn(q, cos, sin), turn(k, cos, sin)
        if text:
            parts = [project(m, text[0]), [q, k, v]]
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
            if streams != "text unrotated":
                q, k = turn(q, cos, sin), turn(k, cos, sin)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2).flatten(2)

    num_text = 0 if streams == "one" else 3
    num_rotated = 5 + (0 if streams == "text unrotated" else num_text)
    angle = torch.arange(num_rotated)[:, None] * 0.7 ** torch.arange(d // 2)
    inputs = [normal(2, 5, D, dtype=dtype), angle.cos(), angle.sin()]
    if num_text:
        inputs.append(normal(2, num_text, D, dtype=dtype, seed=1))
    parameters = {
        "qkv": normal(3 * D, D, dtype=dtype) / 4,
        "wide": normal(D, dtype=dtype),
        "narrow": normal(d, dtype=dtype),
    }
    return finished(pick, forward, inputs, **parameters)
