"""What looks like an idiom of the catalogue and means something else.

Each function draws one near miss, spelled as freely as the idiom itself (see `spellings`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rewriting import normal
from tests.passes.spellings.attention import scored
from tests.passes.spellings.norms import mean_square, modulated, over_root, vectors
from tests.passes.spellings.parts import (
    DTYPES,
    EPS,
    D,
    H,
    Pick,
    Spelling,
    copied,
    d,
    downcast,
    finished,
    plus,
    split_heads,
    times,
    upcast,
)


def rms_norm(pick: Pick) -> Spelling:
    raise_, lower, add, multiply = upcast(pick), downcast(pick), plus(pick), times(pick)
    square, root, copy = mean_square(pick), over_root(pick), copied(pick)

    def used_elsewhere(h: Tensor) -> tuple[Tensor, Tensor]:
        v = add(square(h), EPS)
        return root(h, v), v

    def written(h: Tensor) -> Tensor:
        return root(h, (square(h) * 1.0).add_(EPS))

    fault = pick(
        "fault",
        lambda h: root(h, add(h.pow(2).mean(-2, keepdim=True), EPS)),
        lambda h: root(h, add(h.pow(2).mean((-2, -1), keepdim=True), EPS)),
        lambda h: root(h, add(h.pow(2).sum(-1, keepdim=True), EPS)),
        lambda h: root(h, add(-square(h), 100.0)),
        lambda h: h / add(square(h).sqrt(), 1e-2),
        lambda h: h / add(square(h), EPS),
        lambda h: root(h, add(square(h) - h.mean(-1, keepdim=True).square(), EPS)),
        lambda h: root(h.roll(1, -1), add(square(h), EPS)),
        used_elsewhere,
        written,
    )

    def forward(m: nn.Module, x: Tensor) -> Any:
        found = fault(raise_(copy(x)))
        n, *rest = found if isinstance(found, tuple) else (found,)
        return multiply(lower(n, x), m.w), *rest

    dtype = pick("dtype", *DTYPES)
    return finished(pick, forward, [normal(2, 5, D, dtype=dtype)], w=normal(D, dtype=dtype))


def norm_modulate(pick: Pick) -> Spelling:
    modulate, multiply = modulated(pick), times(pick)
    norm = pick(
        "norm",
        lambda x, w: F.layer_norm(x, (D,), w, eps=EPS),
        lambda x, w: F.layer_norm(x.float(), (D,), None, None, EPS).to(x.dtype),
        lambda x, w: F.rms_norm(x, (D,), w, EPS),
    )
    read, mod = vectors(pick, 2, torch.float32)

    def used_elsewhere(n: Tensor, s: Tensor, b: Tensor) -> Any:
        return modulate(n, s, b), n.sin()

    def written(n: Tensor, s: Tensor, b: Tensor) -> Any:
        return modulate(n.mul_(2), s, b)

    def scale_written_later(n: Tensor, s: Tensor, b: Tensor) -> Any:
        scale = s * 2
        view = scale[..., : D // 2].repeat_interleave(2, -1), scale[..., :]
        scale.add_(1)
        return multiply(n, view[1]) + view[0]

    fault = pick(
        "fault",
        used_elsewhere,
        written,
        scale_written_later,
        lambda n, s, b: multiply(n, n) + b,
        lambda n, s, b: torch.add(b, n, alpha=-1),
        lambda n, s, b: multiply(n, multiply(s, s).mean(-1, keepdim=True).sqrt() + n),
    )

    def forward(m: nn.Module, x: Tensor, *mod: Tensor) -> Any:
        return fault(norm(x, m.w), *read(*mod))

    return finished(pick, forward, [normal(2, 5, D), *mod], w=normal(D))


def gated_activation(pick: Pick) -> Spelling:
    multiply, copy = times(pick), copied(pick)
    fault = pick(
        "fault",
        lambda g, u: multiply(g, torch.sigmoid(1.702 * g)),
        lambda g, u: multiply(g, torch.sigmoid(u)),
        lambda g, u: multiply(g, torch.sigmoid(-g)),
        lambda g, u: 0.5 * g * (1 + torch.tanh(0.7978845608 * (g + 0.04 * g**3))),
        lambda g, u: 0.5 * g * (1 - torch.tanh(0.7978845608 * (g + 0.044715 * g**3))),
        lambda g, u: 0.5 * g * (1 + torch.tanh(0.7978845608 * (g + 0.044715 * g**2))),
        lambda g, u: 0.5 * g * (1 + torch.erf(g)),
        lambda g, u: multiply(0.5 * g, torch.erf(g * 2**-0.5)),
        lambda g, u: multiply(F.silu(g), F.silu(g)),
        lambda g, u: F.silu(g) + u,
        lambda g, u: (lambda a: (multiply(a, u), a))(F.silu(copy(g))),
        lambda g, u: multiply(F.silu(g)[:, :1], u),
    )
    inputs = [normal(2, 5, D, seed=i) for i in range(2)]
    return finished(pick, lambda m, g, u: fault(g, u), inputs)


def attention(pick: Pick) -> Spelling:
    score, heads = scored(pick), split_heads(pick)
    fault = pick(
        "fault",
        lambda s, v: s.softmax(-2) @ v,
        lambda s, v: F.softmax(s, dim=1) @ v,
        lambda s, v: F.softmax(s.transpose(0, 1), dim=-1).transpose(0, 1).cumsum(-1) @ v,
        lambda s, v: (lambda p: (p @ v, p))(s.softmax(-1)),
        lambda s, v: s.softmax(-1).tril() @ v,
        lambda s, v: torch.sigmoid(s) @ v,
        lambda s, v: (s.softmax(-1) + 1e-3) @ v,
        lambda s, v: s.relu().softmax(-1) @ v,
        lambda s, v: (s.softmax(-1) * 1.0).add_(0.1) @ v,
        lambda s, v: v.mT @ s.softmax(-1),
        lambda s, v: s.softmax(-1).mT @ v,
        lambda s, v: (s * s.mean()).softmax(-1) @ v,
        lambda s, v: (s - s.detach()).softmax(-1) @ v,
    )

    def forward(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (heads(t).transpose(1, 2) for t in (q, k, v))
        return fault(score(q, k), v)

    # As many tokens as channels: shapes give nothing away.
    return finished(pick, forward, [normal(2, d, D, seed=i) for i in range(3)])


def qk_norm_rope(pick: Pick) -> Spelling:
    heads, multiply = split_heads(pick), times(pick)
    cut = pick(
        "cut",
        lambda x: x.chunk(2, dim=-1),
        lambda x: x.unflatten(-1, (-1, 2)).unbind(-1),
        lambda x: (x[..., 0::2], x[..., 1::2]),
    )
    join = pick(
        "join",
        lambda a, b: torch.stack([a, b], dim=-1).flatten(-2),
        lambda a, b: torch.cat([a, b], dim=-1),
    )
    fault = pick(
        "fault",
        lambda a, b, c, s: (a * c + multiply(b, s), b * c + multiply(a, s)),
        lambda a, b, c, s: (b * c + multiply(a, s), a * c - multiply(b, s)),
        lambda a, b, c, s: (a * c - multiply(b, c), b * c + multiply(a, s)),
        lambda a, b, c, s: (a * c - multiply(b, s), b * c + multiply(a, s) * 2),
        lambda a, b, c, s: (a * c - multiply(a, s), b * c + multiply(b, s)),
        lambda a, b, c, s: (a * c - multiply(b, s).flip(1), b * c + multiply(a, s)),
        lambda a, b, c, s: (a * c - multiply(b, s), (b * c + multiply(a, s)).abs()),
        lambda a, b, c, s: (a * c - multiply(b, s) + 0.1, b * c + multiply(a, s)),
    )

    def forward(m: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in F.linear(x, m.qkv).chunk(3, dim=-1))
        cos, sin = cos[:, None], sin[:, None]
        q, k = (join(*fault(*cut(F.rms_norm(t, (d,), m.w, EPS)), cos, sin)) for t in (q, k))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2).reshape(-1, x.shape[1], H * d)

    angle = torch.arange(5)[:, None] * 0.7 ** torch.arange(d // 2)
    inputs = [normal(2, 5, D), angle.cos(), angle.sin()]
    return finished(pick, forward, inputs, qkv=normal(3 * D, D) / 4, w=normal(d))
