"""The idioms of the catalogue in the many ways in which people write them.

Each function draws one spelling and returns a module with inputs. `pick(what, *alternatives)`
returns one of its alternatives; the caller decides how.

Shapes: B batch, S tokens, T text tokens, D channels, F hidden channels, H heads, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rewriting import Written, normal

Pick = Callable[..., Any]
Spelling = tuple[nn.Module, list[Tensor]]

H, d = 3, 8
D = H * d
EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)


def copied(pick: Pick) -> Callable[[Tensor], Tensor]:
    """What leaves a tensor as it is."""
    return pick(
        "copy",
        lambda x: x,
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: x.to(x.dtype),
        lambda x: x.view(x.shape),
        lambda x: x.reshape(x.shape),
        lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: x.transpose(0, 1).transpose(0, 1),
        lambda x: F.dropout(x, 0.0),
        lambda x: x[:],
    )


def upcast(pick: Pick) -> Callable[[Tensor], Tensor]:
    return pick(
        "upcast",
        lambda x: x,
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.type(torch.float32),
        lambda x: x.to(dtype=torch.float32),
    )


def downcast(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    """downcast(x, like): x in the dtype of `like`."""
    return pick(
        "downcast",
        lambda x, like: x.to(like.dtype),
        lambda x, like: x.type_as(like),
        lambda x, like: x.to(like),
        lambda x, like: x.type(like.dtype),
    )


def times(pick: Pick) -> Callable[[Tensor, Tensor], Tensor]:
    return pick(
        "times",
        lambda a, b: a * b,
        lambda a, b: b * a,
        lambda a, b: a.mul(b),
        lambda a, b: torch.mul(b, a),
        lambda a, b: torch.multiply(a, b),
    )


def plus(pick: Pick) -> Callable[[Any, Any], Tensor]:
    return pick(
        "plus",
        lambda a, b: a + b,
        lambda a, b: b + a,
        lambda a, b: torch.add(a, b),
        lambda a, b: torch.add(b, a) if isinstance(b, Tensor) else a.add(b),
    )


def one_plus(pick: Pick) -> Callable[[Tensor], Tensor]:
    return pick(
        "one plus",
        lambda s: 1 + s,
        lambda s: s + 1.0,
        lambda s: s.add(1),
        lambda s: torch.add(s, 1),
        lambda s: torch.add(torch.ones_like(s), s),
    )


def wrapped(pick: Pick, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward as it is, or in a region without autocast."""

    def off(m: nn.Module, *inputs: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(m, *inputs)

    return pick(
        "wrapper",
        forward,
        forward,
        off,
    )


def finished(
    pick: Pick, forward: Callable[..., Any], inputs: list[Tensor], **parameters: Tensor
) -> Spelling:
    module = Written(wrapped(pick, forward), **parameters)
    module.requires_grad_(pick("weights", True, False))
    return module, inputs


# Norms


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
    """(read, inputs): `read(*inputs)` gives `num` modulations of [B, S, D] from one or more tensors."""
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


# Activations


def gated_activation(pick: Pick) -> Spelling:
    multiply, dtype = times(pick), pick("dtype", *DTYPES)
    root = pick("constant", math.sqrt(2 / math.pi), 0.7978845608028654, 0.79788456)
    cube = pick("cube", lambda x: x**3, lambda x: x.pow(3.0), lambda x: x * x * x)
    act = pick(
        "activation",
        F.silu,
        lambda x: torch.nn.functional.silu(x, inplace=False),
        lambda x: multiply(x, torch.sigmoid(x)),
        lambda x: multiply(x, x.sigmoid()),
        F.gelu,
        nn.GELU(),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * 0.5 * (1.0 + torch.erf(x * 2**-0.5)),
        lambda x: x * torch.special.ndtr(x),
        lambda x: 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * cube(x)))),
        lambda x: 0.5 * multiply(x, 1 + torch.tanh(root * (x + 0.044715 * cube(x)))),
        lambda x: 0.5 * x * (1 + torch.tanh(x * root * (1 + 0.044715 * x * x))),
    )
    raise_, lower, copy = upcast(pick), downcast(pick), copied(pick)
    width = 2 * D
    split = pick(
        "halves",
        lambda t: t.chunk(2, dim=-1),
        lambda t: t.split(D, dim=-1),
        lambda t: t.split([D, D], dim=2),
        lambda t: (t[..., :D], t[..., D:]),
        lambda t: t.unflatten(-1, (2, D)).unbind(-2),
        lambda t: torch.tensor_split(t, 2, dim=-1),
        lambda t: (t.narrow(-1, 0, D), t.narrow(-1, D, D)),
    )
    swapped = pick("order", False, True)
    form = pick("form", "two linears", "halves", "two inputs", "alone")

    def forward(m: nn.Module, *inputs: Tensor) -> Tensor:
        if form == "two inputs":
            g, u = inputs
        elif form == "two linears":
            g, u = F.linear(inputs[0], m.wide[:D]), F.linear(inputs[0], m.wide[D:])
        elif form == "halves":
            g, u = split(F.linear(inputs[0], m.wide))
        else:
            return F.linear(lower(act(raise_(F.linear(inputs[0], m.wide))), inputs[0]), m.down)
        g, u = (u, g) if swapped else (g, u)
        return multiply(lower(act(raise_(copy(g))), u), u)

    inputs = [normal(2, 5, D, dtype=dtype, seed=i) for i in range(2 if form == "two inputs" else 1)]
    parameters = {"wide": normal(width, D, dtype=dtype), "down": normal(D, width, dtype=dtype)}
    return finished(pick, forward, inputs, **parameters)


# Attention


def split_heads(pick: Pick) -> Callable[[Tensor], Tensor]:
    """[B, S, n * d] to [B, S, n, d]."""
    return pick(
        "heads",
        lambda x: x.unflatten(-1, (-1, d)),
        lambda x: x.unflatten(2, (x.shape[-1] // d, d)),
        lambda x: x.view(x.shape[0], -1, x.shape[-1] // d, d),
        lambda x: x.reshape(*x.shape[:-1], -1, d),
        lambda x: x.view(x.size(0), x.size(1), -1, d),
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


# QK-norm and rotary embedding


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
        lambda x: x.split(d // 2, dim=-1),
        lambda x: (x[..., : d // 2], x[..., d // 2 :]),
        lambda x: x.unflatten(-1, (2, d // 2)).unbind(-2),
    )
    pairs = pick(
        "pairs",
        lambda x: x.unflatten(-1, (-1, 2)).unbind(-1),
        lambda x: x.reshape(*x.shape[:-1], -1, 2).unbind(-1),
        lambda x: (x[..., 0::2], x[..., 1::2]),
        lambda x: (x.view(*x.shape[:-1], d // 2, 2)[..., 0], x.unflatten(-1, (d // 2, 2))[..., 1]),
    )

    def flat(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], dim=-1).flatten(-2)

    def neighbours(x: Tensor, c: Tensor, s: Tensor, write: Callable[..., Tensor]) -> Tensor:
        a, b = pairs(x)
        return write(a * c - b * s, multiply(a, s) + multiply(b, c))

    def written(even: Tensor, odd: Tensor) -> Tensor:
        out = torch.empty(*even.shape[:-1], d, dtype=even.dtype)
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

    rotate = pick(
        "rotate",
        turned_halves,
        turned_neighbours,
        lambda x, c, s: halves(x, c, s, lambda a, b: torch.cat([a, b], dim=-1)),
        lambda x, c, s: halves(x, c, s, lambda a, b: torch.stack([a, b], dim=-2).flatten(-2)),
        lambda x, c, s: neighbours(x, c, s, flat),
        lambda x, c, s: neighbours(x, c, s, written),
        by_complex,
    )
    return lambda x, c, s: rotate(raise_(x), c, s).to(x.dtype), pick(
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
