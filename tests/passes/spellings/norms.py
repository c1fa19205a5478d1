"""RMSNorm and LayerNorm by hand, modulation and gated residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rewriting import normal
from tests.passes.spellings.parts import (
    DTYPES,
    EPS,
    D,
    H,
    Pick,
    Spelling,
    copied,
    downcast,
    finished,
    one_plus,
    plus,
    times,
    upcast,
)


def mean_square(pick: Pick) -> Callable[[Tensor], Tensor]:
    square = pick(
        "square",
        lambda h: h.pow(2),
        lambda h: h * h,
        lambda h: h**2,
        lambda h: h.square(),
        lambda h: torch.pow(h, 2.0),
        lambda h: torch.mul(h, h),
        lambda h: h.abs().square(),
    )
    mean = pick(
        "mean",
        lambda s: s.mean(-1, keepdim=True),
        lambda s: s.mean(dim=-1, keepdim=True),
        lambda s: torch.mean(s, dim=(-1,), keepdim=True),
        lambda s: s.mean(s.dim() - 1).unsqueeze(-1),
        lambda s: s.mean(-1)[..., None],
        lambda s: s.sum(-1, keepdim=True) / s.shape[-1],
        lambda s: s.sum(dim=-1, keepdim=True) * (1 / s.shape[-1]),
    )
    return pick(
        "mean square",
        *[lambda h: mean(square(h))] * 7,
        lambda h: (h.norm(2, dim=-1, keepdim=True) * h.shape[-1] ** -0.5) ** 2,
        lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / h.shape[-1],
    )


def over_root(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """over_root(h, v) = h / sqrt(v)."""
    multiply = times(pick)
    return pick(
        "over root",
        lambda h, v: multiply(h, torch.rsqrt(v)),
        lambda h, v: multiply(h, v.rsqrt()),
        lambda h, v: multiply(h, 1 / torch.sqrt(v)),
        lambda h, v: multiply(h, v.pow(-0.5)),
        lambda h, v: multiply(h, v**-0.5),
        lambda h, v: multiply(h, torch.reciprocal(v.sqrt())),
        lambda h, v: h / torch.sqrt(v),
        lambda h, v: torch.div(h, v**0.5),
    )


def affine(pick: Pick) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    multiply, one = times(pick), one_plus(pick)
    return pick(
        "weight",
        (lambda n, w: multiply(n, w), "weight"),
        (lambda n, w: multiply(n, w), "weight"),
        (lambda n, w: multiply(n, w[None, None]), "weight"),
        (lambda n, w: multiply(n, w.view(1, 1, -1)), "weight"),
        (lambda n, w: multiply(n, one(w)), "weight"),
        (lambda n, w: n, ""),
    )


def rms(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """rms(x, w): a decomposed RMSNorm."""
    raise_, lower, add = upcast(pick), downcast(pick), plus(pick)
    square, root, copy = mean_square(pick), over_root(pick), copied(pick)
    (weigh, _), weigh_first = affine(pick), pick("weigh first", True, False)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        h = raise_(copy(x))
        n = root(h, add(square(h), EPS))
        return lower(weigh(n, raise_(w)), x) if weigh_first else weigh(lower(n, x), w)

    return norm


def layer(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """layer(x, w): a decomposed LayerNorm without bias."""
    raise_, lower, add = upcast(pick), downcast(pick), plus(pick)
    square, root, (weigh, _) = mean_square(pick), over_root(pick), affine(pick)
    variance = pick(
        "variance",
        lambda h, c: square(c),
        lambda h, c: h.var(-1, unbiased=False, keepdim=True),
        lambda h, c: torch.var(h, dim=-1, correction=0, keepdim=True),
        lambda h, c: torch.var_mean(h, -1, correction=0, keepdim=True)[0],
    )

    def norm(x: Tensor, w: Tensor) -> Tensor:
        h = raise_(x)
        centred = h - h.mean(-1, keepdim=True)
        return lower(weigh(root(centred, add(variance(h, centred), EPS)), raise_(w)), x)

    return norm


def rms_norm(pick: Pick) -> Spelling:
    norm = pick("norm", rms, rms, rms, layer)(pick)
    dtype = pick("dtype", *DTYPES)
    x = pick("rank", normal(2, 5, D, dtype=dtype), normal(2, 5, H, D, dtype=dtype))
    return finished(pick, lambda m, x: norm(x, m.w), [x], w=normal(D, dtype=dtype))


def modulated(pick: Pick) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """modulated(n, s, b) = (1 + s) * n + b."""
    multiply, one, add = times(pick), one_plus(pick), plus(pick)
    return pick(
        "modulate",
        lambda n, s, b: add(multiply(n, one(s)), b),
        lambda n, s, b: add(multiply(n, one(s)), b),
        lambda n, s, b: torch.addcmul(b, n, one(s)),
        lambda n, s, b: torch.addcmul(b, one(s), n),
        lambda n, s, b: add(add(n, multiply(n, s)), b),
        lambda n, s, b: torch.addcmul(n, n, s) + b,
        lambda n, s, b: multiply(n, one(s)),
        lambda n, s, b: add(n, b),
    )


def vectors(pick: Pick, num: int, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    """(read, inputs): `read(*inputs)` gives `num` modulations of [B, S, D]."""
    wide = normal(2, num * D, dtype=dtype)
    single = [normal(2, D, dtype=dtype, seed=i) for i in range(num)]
    spread = pick(
        "spread",
        lambda t: t[:, None],
        lambda t: t.unsqueeze(1),
        lambda t: t.view(-1, 1, D),
        lambda t: t.reshape(t.shape[0], 1, t.shape[1]),
    )

    def each(split: Callable[[Tensor], Any]) -> Callable[..., Any]:
        return lambda t: [spread(v) for v in split(t)]

    return pick(
        "vectors",
        (lambda *t: [spread(v) for v in t], single),
        (each(lambda t: t.chunk(num, dim=-1)), [wide]),
        (each(lambda t: t.split(D, dim=1)), [wide]),
        (each(lambda t: torch.tensor_split(t, num, dim=-1)), [wide]),
        (each(lambda t: t.unflatten(-1, (num, D)).unbind(1)), [wide]),
        (each(lambda t: [t[:, i * D : (i + 1) * D] for i in range(num)]), [wide]),
        (lambda t: t.unsqueeze(1).chunk(num, dim=-1), [wide]),
        (lambda t: t.view(-1, num, D).split(1, dim=1), [wide]),
        (lambda t: t.view(-1, num, 1, D).unbind(1), [wide]),
        (lambda t: t.unflatten(1, (num, D)).select(1, 0)[:, None, :].expand(-1, 1, D), [wide])
        if num == 1
        else (lambda t: (t.view(-1, num, D)[:, i : i + 1] for i in range(num)), [wide]),
        (lambda *t: t, [normal(2, 5, D, dtype=dtype, seed=i) for i in range(num)]),
        (lambda *t: t, [normal(D, dtype=dtype, seed=i) for i in range(num)]),
    )


def composite(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """A norm by a function or module of PyTorch, or by hand."""
    return pick(
        "composite",
        lambda x, w: F.layer_norm(x, (D,), eps=EPS),
        lambda x, w: F.layer_norm(x, (D,), w, eps=EPS),
        lambda x, w: F.layer_norm(x.float(), [D], eps=EPS).to(x.dtype),
        lambda x, w: F.layer_norm(x.float(), [D], w.float(), None, EPS).type_as(x),
        lambda x, w: torch.layer_norm(x, (D,), None, None, EPS),
        lambda x, w: torch.native_layer_norm(x, (D,), None, None, EPS)[0],
        lambda x, w: F.rms_norm(x, (D,), w, EPS),
        lambda x, w: torch.rms_norm(x, (D,), None, EPS),
        lambda x, w: F.rms_norm(x, (D,)) * w,
        rms(pick),
        layer(pick),
    )


def norm_modulate(pick: Pick) -> Spelling:
    """Norm, then modulation."""
    norm, modulate, copy = composite(pick), modulated(pick), copied(pick)
    dtype = pick("dtype", *DTYPES)
    island = pick("island", False, False, True)
    read, inputs = vectors(pick, 2, dtype)

    def forward(m: nn.Module, x: Tensor, *mod: Tensor) -> Tensor:
        s, b = read(*mod)
        if island:
            return modulate(norm(x.float(), m.w.float()), s.float(), b.float()).to(x.dtype)
        return modulate(copy(norm(x, m.w)), s, b)

    x = normal(2, 5, D, dtype=dtype)
    return finished(pick, forward, [x, *inputs], w=normal(D, dtype=dtype))


def gated(pick: Pick) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """gated(x, g, y) = x + g * y."""
    multiply, add = times(pick), plus(pick)
    return pick(
        "gate",
        lambda x, g, y: add(x, multiply(g, y)),
        lambda x, g, y: add(x, multiply(g, y)),
        lambda x, g, y: torch.addcmul(x, g, y),
        lambda x, g, y: torch.addcmul(x, y, g),
        lambda x, g, y: add(x, multiply(torch.tanh(g), y)),
        lambda x, g, y: add(x.float(), multiply(g.float(), y.float())).type_as(x),
        lambda x, g, y: (x.float() + y * g).to(x.dtype),
    )


def gated_residual(pick: Pick) -> Spelling:
    """Gated residual, norm and modulation; the sum goes on as well, or does not."""
    norm, modulate, join, copy = composite(pick), modulated(pick), gated(pick), copied(pick)
    dtype, goes_on = pick("dtype", *DTYPES), pick("goes on", True, True, False)
    read, inputs = vectors(pick, 3, dtype)

    def forward(m: nn.Module, x: Tensor, y: Tensor, *mod: Tensor) -> Any:
        s, b, g = read(*mod)
        h = join(x, g, copy(y))
        out = modulate(norm(h, m.w), s, b)
        return (h, out) if goes_on else out

    x, y = normal(2, 5, D, dtype=dtype), normal(2, 5, D, dtype=dtype, seed=1)
    return finished(pick, forward, [x, y, *inputs], w=normal(D, dtype=dtype))
