"""How the blocks of the presets call each op that quantizes: its Triton provider.

As `bench.calls`, which has the others.

Shapes: B batch, S tokens, D features (the width of a case).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.calls import BF16, EPS, HEAD_DIM, NUM_OUT, new_seen, randn, rooms_of


def known_and_seen() -> tuple[Tensor, Tensor]:
    return torch.ones(1), torch.zeros(1, dtype=torch.int32)


def quantize(
    batch: int,
    num_tokens: int,
    width: int,
    rows: str | None,
    columns: str | None,
    is_delayed: bool = False,
) -> None:
    """Both copies; with delayed scaling of a gradient, the bias's as well."""
    from fxopt.kernels import quantize as provider

    line = known_and_seen() if is_delayed else (None, None)
    x = randn(batch, num_tokens, width)
    provider.triton(x, rows, columns, None, is_delayed, None, None, *line)


def quantize_pieces(batch: int, num_tokens: int, width: int, name: str) -> None:
    """Both copies of a gradient that lies in four pieces, a view of a wider one among them."""
    from fxopt.kernels import quantize as provider

    joint = randn(batch, num_tokens, 2 * width)
    xs = [*(randn(batch, num_tokens, n * width) for n in (1, 1, 6)), joint[..., :width]]
    provider.triton_pieces(xs, name, name, None, False)


def quantize_mixed(batch: int, num_tokens: int, width: int, gradient: str, weight: str) -> None:
    """A gradient with its bias's, one in pieces, and the transposed copies of two weights."""
    from fxopt.kernels import quantize_group as provider

    xs = [randn(batch * num_tokens, n * width) for n in (1, 2, 1)]
    weights = [randn(n * width, width) for n in (1, 3)]
    known = [torch.ones(1 if "tensor" in weight else width) for _ in weights]
    rows, columns = [gradient, gradient, "", ""], [gradient, gradient, weight, weight]
    sums = [True, False, False, False]
    provider.triton_mixed([*xs, *weights], [1, 2, 1, 1], rows, columns, sums, [None, None, *known])


def quantize_together(batch: int, num_tokens: int, width: int, name: str) -> None:
    """Both copies and the bias's gradient of four gradients of two streams."""
    from fxopt.kernels import quantize as provider

    sizes = [(num, features) for num in (num_tokens, num_tokens + 1) for features in (1, 4)]
    xs = [randn(batch, num, features * width) for num, features in sizes]
    provider.triton_together([(x, name, name, None, True) for x in xs])


def quantize_group(
    batch: int,
    num_tokens: int,
    width: int,
    name: str,
    num_weights: int = 0,
    is_delayed: bool = False,
) -> None:
    """Both copies of weights, or of an activation if there are none."""
    from fxopt.kernels import quantize_group as provider

    xs = [randn(NUM_OUT, width) for _ in range(num_weights)] or [randn(batch, num_tokens, width)]
    if is_delayed:
        known, seen = zip(*(known_and_seen() for _ in xs), strict=True)
        provider.triton_rows(xs, name, None, None, list(known), list(seen))
        amax_t = list(known)
    else:
        *_, amax_t = provider.triton_rows(xs, name, name)
    provider.triton_columns(xs, name, amax_t)


def quantize_heads(batch: int, num_tokens: int, width: int) -> None:
    """Queries, keys and values of one attention."""
    from fxopt.kernels import quantize_heads as provider

    heads = batch, num_tokens, width // HEAD_DIM, HEAD_DIM
    provider.triton(*[randn(*heads).transpose(1, 2) for _ in range(3)])


def quantized_producers(
    batch: int,
    num_tokens: int,
    width: int,
    name: str,
    is_joined: bool = False,
    is_delayed: bool = False,
    num_streams: int = 1,
    is_packing: bool = False,
    is_measuring: bool = False,
) -> None:
    """A modulated norm and a gated activation that write codes quantized as `name` says.

    Args:
        is_joined: the norm has a gated residual, and the activation a tensor beside it.
        is_packing: codes of h, of x and of what is activated are left, and those of h read.
        is_measuring: the activation's backward leaves the magnitudes of its gradients.
    """
    from fxopt.kernels import quantized_producers as provider

    known, seen = known_and_seen()
    formats = (name, None, None, known, seen) if is_delayed else (name, name)
    norms, activations, grads = [], [], []
    constants = ("layer", EPS, 0.0, 1.0, BF16)
    for num in range(num_tokens, num_tokens + num_streams):
        x, gate, up = (randn(batch, num, width) for _ in range(3))
        gated = (randn(batch, num, width), randn(batch, 1, width))
        operands = (None, None, randn(batch, 1, width), randn(batch, 1, width))
        residual = gated if is_joined else (None, None)
        norms.append((x, *residual, *operands, None, *constants, BF16, *formats))
        activations.append((gate, up, x if is_joined else None, "silu", "none"))
        grads.append(randn(batch, num, 2 * width if is_joined else width)[..., -width:])
    rooms = [(None, None, None, *rooms_of(x, x)) if is_packing else () for x, *_ in norms]
    norms = [(*call, *own) for call, own in zip(norms, rooms, strict=True)]
    saved = []
    for call, found in zip(norms, provider.triton_norms(norms), strict=True):
        _, _, amax_t, h, mean, rstd = found
        kept = h if is_joined else call[0], *call[3:7], mean, rstd, *constants
        if is_packing:
            kept = call[19], *kept[1:]
        read = (None, call[20]) if is_packing else ()
        saved.append((*kept, name, known if is_delayed else amax_t, *read))
    provider.triton_columns_of_norms(saved)
    made = provider.triton_activations([
        (*call, *formats, *(own and (*own[:3], *rooms_of(*call[:2]))))
        for call, own in zip(activations, rooms, strict=True)
    ])  # fmt: skip
    each = zip(grads, activations, made, strict=True)
    measured = (None, new_seen(), new_seen()) if is_measuring else ()
    provider.triton_activations_backward([
        (g, *call, name, known if is_delayed else amax_t, *measured)
        for g, call, (*_, amax_t) in each
    ])  # fmt: skip


def activation_with_weights(
    batch: int, num_tokens: int, width: int, name: str, is_packing: bool = False
) -> None:
    """A gated activation beside another tensor, and two weights; its codes are left as well."""
    from fxopt.kernels import activation_with_weights as provider

    gate, up, beside = (randn(batch, num_tokens, width) for _ in range(3))
    weights = [randn(width, n * width) for n in (1, 2)]
    rooms = [[t] for t in rooms_of(gate, up)] if is_packing else []
    given = [gate], [up], [beside], "silu", "none", name, name, weights, name, name
    provider.triton(*given, *rooms)


def packed_activation(
    batch: int, num_tokens: int, width: int, form: str, is_measuring: bool = False
) -> None:
    """The backward of an activation that is kept as codes, beside another tensor; `form` is "up" or
    how gate and up are packed in one tensor. `is_measuring` leaves magnitudes of the gradients."""
    from fxopt.kernels import packed_activation as provider
    from fxopt.kernels import saving

    num_halves = 2 if form == "gate_up" else 1
    kept = [randn(batch, num_tokens, num_halves * width) for _ in range(1 + (form == "up"))]
    codes = saving.fake_pack(kept, 1)
    pairs = [[*t, None][:2] for t in (codes[: len(kept)], codes[len(kept) :])]
    grad, beside = (randn(batch, num_tokens, width) for _ in range(2))
    settings = "silu", "none" if form == "up" else form, "e4m3/tensor/fp32", torch.ones(1)
    seen = (None, new_seen(), new_seen() if form == "up" else None) if is_measuring else ()
    provider.triton(grad, *pairs[0], *pairs[1], beside, *settings, *seen)


def norm_modulate_segments_quantize(batch: int, num_tokens: int, width: int, name: str) -> None:
    """A norm by segment, with a gated residual, that writes codes quantized as `name` says."""
    from fxopt.kernels import norm_modulate_segments_quantize as provider

    x, residual = (randn(batch, num_tokens, width) for _ in range(2))
    gate, scale, shift = (randn(batch, 2, width) for _ in range(3))
    reading, constants = (randn(batch, num_tokens) > 0, False), ("layer", EPS, 0.0, 1.0, BF16)
    operands = x, residual, gate, None, None, scale, shift, None, *reading
    *_, amax_t, h, mean, rstd = provider.triton(*operands, *constants, BF16, name, name)
    saved = h, None, None, scale, shift, *reading, mean, rstd, *constants, name, amax_t
    provider.triton_columns(*saved)


def sum_parts(batch: int, num_tokens: int, width: int) -> None:
    from fxopt.kernels import sum_parts as provider

    provider.triton([randn(batch, num_tokens, width) for _ in range(3)])


def saving(batch: int, num_tokens: int, width: int) -> None:
    """Two views of one projection, packed and unpacked."""
    from fxopt.kernels import saving as provider

    xs = randn(batch, num_tokens, 2 * width).chunk(2, -1)
    found = provider.triton_pack(xs, 1)
    provider.triton_unpack(found[:2], found[2:], ["bfloat16"] * 2)
