"""How the blocks of the presets call each op: its Triton provider, forward and backward.

Inputs are random numbers on the device in force; under `torch.device("meta")` only launches happen.

Shapes: B batch, S tokens, D features (the width of a case), H heads, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.saving import fake_pack

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6
HEAD_DIM = 128
NUM_TEXT = 5  # tokens of a first section; odd, as a row count must not matter
NUM_OUT = 128  # rows of a weight; few, as the tests interpret the kernels


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def norm_modulate(
    batch: int,
    num_tokens: int,
    width: int,
    operands: str,
    norm: str = "layer",
    dtype: torch.dtype = BF16,
    per_token: str = "",
    num_streams: int = 1,
    is_packing: bool = False,
    is_measuring: bool = False,
) -> None:
    """`operands` are the names of those that are there; gate, scale and shift are in `dtype`.

    Every stream has a token more than the one before it; `is_packing` leaves and reads codes of h
    and x, `is_measuring` leaves the magnitude of the gradient of x.
    """
    from fxopt.kernels import triton_norm_modulate as provider
    from fxopt.kernels.norm_modulate import asked

    def operand(name: str, num_tokens: int) -> Tensor | None:
        if name not in operands.split():
            return None
        if name in ("weight", "bias", "x_bias"):
            return randn(width)
        if name == "residual":
            return randn(batch, num_tokens, width)
        rows = num_tokens if name in per_token.split() else 1
        return randn(batch, rows, width, dtype=dtype)

    names = ("residual", "gate", "weight", "bias", "scale", "shift", "x_bias")
    forwards, backwards = [], []
    for num in range(num_tokens, num_tokens + num_streams):
        x, residual, *affine = randn(batch, num, width), *(operand(name, num) for name in names)
        rooms = rooms_of(x, x) if is_packing else []
        rooms[:2] = [None] * len(rooms[:2]) if norm == "none" else rooms[:2]
        forwards.append((x, residual, *affine, norm, EPS, 0.0, 1.0, BF16, BF16, *rooms))
    for call, (_, h, mean, rstd) in zip(forwards, provider.forward_of(forwards), strict=True):
        x, residual, *affine = call[:8]
        grad_y = torch.randn_like(x) if norm != "none" else None
        grad_h = None if residual is None else torch.randn_like(x)
        needs = asked([t is not None for t in call[:8]], call[6], x)
        saved = x if residual is None else h, x, *affine, mean, rstd
        constants = norm, 0.0, 1.0, BF16, needs, norm != "none"
        if is_packing:
            h_codes, h_scales, x_codes, x_scales = call[14:]
            h = grad_h if norm == "none" else h_codes
            saved, constants = (h, x_codes, *saved[2:]), (*constants, h_scales, x_scales)
        if is_measuring:
            constants = *constants, *(() if is_packing else (None, None)), new_seen()
        backwards.append((grad_y, grad_h, *saved, *constants))
    provider.backward_of(backwards)


def new_seen() -> Tensor:
    """What is raised to the bits of a magnitude."""
    return torch.zeros(1, dtype=torch.int32)


def rooms_of(*xs: Tensor, num_row_dims: int = 1) -> list[Tensor]:
    """Where the codes and scales of each are left."""
    found = fake_pack(xs, num_row_dims)
    pairs = zip(found[: len(xs)], found[len(xs) :], strict=True)
    return [t for pair in pairs for t in pair]


def norm_modulate_segments(
    batch: int,
    num_tokens: int,
    width: int,
    operands: str,
    norm: str = "layer",
    per_token: bool = False,
) -> None:
    """`operands` as for `norm_modulate`; gate, scale and shift have two rows, for a condition.

    Args:
        per_token: whether shift differs per token and is not looked up.
    """
    from fxopt.kernels import triton_norm_modulate_segments as provider

    shapes = {
        "residual": (batch, num_tokens, width),
        **dict.fromkeys(("gate", "scale", "shift"), (batch, 2, width)),
        **({"shift": (batch, num_tokens, width)} if per_token else {}),
        **dict.fromkeys(("weight", "bias", "x_bias"), (width,)),
    }
    names = ("residual", "gate", "weight", "bias", "scale", "shift", "x_bias")
    x = randn(batch, num_tokens, width)
    tensors = [x, *(randn(*shapes[n]) if n in operands.split() else None for n in names)]
    index = randn(batch, num_tokens) > 0
    _, h, mean, rstd = provider.forward(*tensors, index, per_token, norm, EPS, 0.0, 1.0, BF16, BF16)
    saved = (h if "residual" in operands else x, x, *tensors[2:], index, per_token, mean, rstd)
    grad_y = torch.randn_like(x) if norm != "none" else None
    grad_h = torch.randn_like(x) if "residual" in operands else None
    needs = [t is not None for t in tensors]
    needs[6] &= not per_token
    provider.backward(grad_y, grad_h, *saved, norm, 0.0, 1.0, BF16, needs, norm != "none")


def qk_norm_rope(
    batch: int,
    num_tokens: int,
    width: int,
    norm: str = "rms",
    rotation: str = "interleaved",
    tables: str = "channels",
    rotary_dim: int = HEAD_DIM,
    rotated: str = "all",
    across_heads: bool = False,
    joint: bool = False,
    biased: bool = False,
    merged: bool = False,
    is_packing: bool = False,
    is_measuring: bool = False,
) -> None:
    """Queries and keys of width / HEAD_DIM heads.

    Args:
        tables: as the op takes them; "pairs" are the two parts of [S, d/2] complex numbers.
        rotary_dim: how many channels of a head are rotated.
        rotated: as the op takes it; unless "all", the tables are for half of the tokens.
        joint: a section of text and one of image for each.
        biased: x_bias is there.
        merged: x is a view of one projection to q, k and v.
        is_packing: codes of x are left, and read.
        is_measuring: magnitudes of the gradients of x are left.
    """
    from fxopt.kernels import triton_qk_norm_rope as provider

    num_heads = width // HEAD_DIM
    lengths = [NUM_TEXT, num_tokens] if joint else [num_tokens]

    def make_x(length: int) -> Tensor:
        if merged:
            return randn(batch, length, 3, num_heads, HEAD_DIM)[:, :, 1]
        return randn(batch, length, num_heads, HEAD_DIM)

    def make_tables(length: int) -> tuple[Tensor | None, ...]:
        if rotation == "none":
            return None, None
        if tables == "matrices":
            columns = randn(1, length, 1, rotary_dim // 2, 2, 2, dtype=FP32).unbind(-1)
            return tuple(column.flatten(-2) for column in columns)
        if tables == "pairs":
            return randn(1, length, 1, rotary_dim // 2, 2, dtype=FP32).unbind(-1)
        cos_sin = randn(2, 1, length, 1, rotary_dim, dtype=FP32)
        return cos_sin.unbind(0)

    x = [make_x(length) for _ in range(2) for length in lengths]
    num_sections = len(x)
    size = width if across_heads else HEAD_DIM
    x_bias = [randn(width) if biased else None for _ in x]
    weight = [randn(size) if norm != "none" else None for _ in x]
    rows = lengths if rotated == "all" else [num_tokens // 2]
    cos, sin = zip(*[make_tables(length) for length in rows] * 2, strict=True)
    fields = (x, x_bias, weight, [None] * num_sections, cos, sin)
    settings = (
        *([len(lengths)] * 2, norm, [EPS] * num_sections, 0.0, across_heads),
        *(rotation, tables, rotated, BF16),
    )  # fmt: skip
    rooms = rooms_of(*x, num_row_dims=2) if is_packing else []
    codes, scales = rooms[::2], rooms[1::2]
    *outs, mean, rstd = provider.forward(*fields, *settings, *([codes, scales] if rooms else []))
    needs = [t is not None for field in fields[:4] for t in field]
    grads = [randn(*out.shape) for out in outs]
    kept = (codes, *fields[1:]) if rooms else fields
    further = [scales if rooms else None, [new_seen() for _ in x] if is_measuring else None]
    provider.backward(grads, *kept, mean, rstd, *settings, needs, *further)


def gated_activation(
    batch: int,
    num_tokens: int,
    width: int,
    activation: str,
    form: str = "none",
    biased: bool = False,
) -> None:
    """`form`: "none", "up" for a second tensor, a packing, or "streams" for two calls in one."""
    from fxopt.kernels.gated_activation import triton_backward_of, triton_forward_of

    is_packed = form == "gate_up"
    calls, grads = [], []
    for num in (num_tokens, num_tokens + 1) if form == "streams" else (num_tokens,):
        gate = randn(batch, num, 2 * width if is_packed else width)
        up = randn(batch, num, width) if form == "up" else None
        calls.append((gate, up, activation, "gate_up" if is_packed else "none"))
        grads.append(randn(batch, num, width))
    bias = randn(calls[0][0].shape[-1]) if biased else None
    triton_forward_of([(*call, bias) for call in calls])
    triton_backward_of(
        [(grad, *call, True, bias, biased) for grad, call in zip(grads, calls, strict=True)]
    )


def linear_cross_entropy(batch: int, num_tokens: int, width: int) -> None:
    """The softmax of `width` logits per token; their product is no kernel of fxopt's."""
    from fxopt.kernels.triton_linear_cross_entropy import softmax

    logits = randn(batch * num_tokens, width)
    target = torch.zeros(len(logits), dtype=torch.int64)
    losses = randn(len(logits), dtype=FP32)
    softmax(logits, target, randn(dtype=FP32), -100, losses, True)


def silu_linears(
    batch: int, num_tokens: int, width: int, num_pieces: int, num_linears: int = 1
) -> None:
    """AdaLN: linears with a bias, each to `num_pieces` times the width."""
    from fxopt.kernels.silu_linears import triton, triton_backward

    size = num_pieces * width
    x, weights = randn(batch, width), [randn(size, width) for _ in range(num_linears)]
    triton(x, weights, [randn(size) for _ in weights])
    rows = [
        (i, start, start + width) for i in range(num_linears) for start in range(0, size, width)
    ]
    grads = [randn(batch, width) for _ in rows]
    needs = [True] * (1 + 2 * num_linears)
    triton_backward(grads, [number for row in rows for number in row], x, weights, needs)
