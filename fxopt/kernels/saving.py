"""What fused ops keep for their own backward: activations as they are, or as FP8 codes.

`Recipe(saved="fp8")` asks for codes: a door's forward runs in `saving`, and the autograd Functions
inside of it save their activations through `packed` and read them back through `unpacked`.

Shapes: R rows (all dims but those of a row), C features of a row, c blocks of 128 features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.formats import FORMATS, quantize_matrix
from fxopt.kernels.in_force import is_high_precision
from fxopt.kernels.registration import register
from fxopt.recipes import Operand

OPERAND = Operand.parse("e4m3/1x128/fp32")
BLOCK = 128
# Reference runs in fp64 stay what they are.
PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_packs: ContextVar[bool] = ContextVar("packs", default=False)


@contextmanager
def saving(saved: str) -> Iterator[None]:
    """Inside, fused ops save their activations as `saved` of a recipe says; in this thread.

    Without gradients nothing is saved, and nothing packed.
    """
    token = _packs.set(saved == "fp8" and torch.is_grad_enabled())
    try:
        yield
    finally:
        _packs.reset(token)


def packed(
    ctx: Any,
    activations: Sequence[Tensor | None],
    are_own: Sequence[bool] | None = None,
    num_row_dims: int = 1,
) -> list[Tensor | None]:
    """What a node saves of its activations, which are to come first of all that it saves.

    Args:
        ctx: of the node; where `unpacked` finds which of them are packed.
        activations: what the node alone keeps.
        are_own: which of them that holds for; None for all. The others are saved as they are.
        num_row_dims: how many of the last dims make up a row.

    As they are saved as well: fp64, and tensors that do not fill their memory. That is kept whole
    by whoever keeps another part of it, as attention does the values of a joint projection.
    """
    ctx.packed = ()
    if not _packs.get() or not any(ctx.needs_input_grad) or is_high_precision():
        return [*activations]
    fill = _fill_their_memory(activations)
    are_packed = [
        t is not None and is_own and fills and t.dtype in PACKED_DTYPES
        for t, is_own, fills in zip(
            activations, are_own or [True] * len(activations), fill, strict=True
        )
    ]
    found: list[Tensor | None] = []
    for t, is_packed in zip(activations, are_packed, strict=True):
        ctx.packed += (t.dtype if t is not None and is_packed else None,)
        found += pack(t, num_row_dims) if is_packed else [t]
    return found


def unpacked(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """What a node saved: its activations, and what it saved behind them."""
    given = iter(saved)
    activations = [
        next(given) if dtype is None else unpack(next(given), next(given), dtype)
        for dtype in ctx.packed
    ]
    return [*activations, *given]


def _fill_their_memory(tensors: Sequence[Tensor | None]) -> list[bool]:
    """Of each, whether it and the others that lie in the same memory are all of it."""
    present = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t
        for t in tensors
        if t is not None
    }
    covered: Counter[int] = Counter()
    for (storage, *_), t in present.items():
        covered[storage] += t.numel() * t.element_size()
    return [
        t is not None
        and t.numel() > 0
        and covered[t.untyped_storage()._cdata] == t.untyped_storage().nbytes()
        for t in tensors
    ]


def native_pack(x: Tensor, num_row_dims: int) -> tuple[Tensor, Tensor]:
    """code = round(x / scale) in e4m3, scale = amax / 448 of each 128 neighbours in a row.

    Args:
        x: any shape and strides, fp32, bf16 or fp16.
        num_row_dims: how many of the last dims make up a row.

    Returns codes of x's shape and scales [..., c] in fp32; the last block of a row may be shorter.

    Numerics: to nearest, ties to even, once; nothing saturates, and the largest value of a block
    comes back but for fp32 rounding. A block of zeros has scale 1; one that holds a NaN or Inf
    becomes NaN.
    """
    rows = x.flatten(-num_row_dims)
    codes_RC, scales_Rc, _ = quantize_matrix(rows.reshape(-1, rows.shape[-1]), OPERAND)
    codes = codes_RC[:, : rows.shape[-1]].reshape(x.shape)
    scales = scales_Rc.reshape(*rows.shape[:-1], scales_Rc.shape[-1])
    return codes.contiguous(), scales.contiguous()


def native_unpack(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x = code * scale, rounded once from fp32 to `dtype`, contiguous."""
    rows = codes.flatten(scales.dim() - 1).float()
    per_code = scales.repeat_interleave(BLOCK, -1)[..., : rows.shape[-1]]
    return (rows * per_code).to(dtype).view(codes.shape)


def fake_pack(x: Tensor, num_row_dims: int) -> tuple[Tensor, Tensor]:
    lead, num_features = x.shape[:-num_row_dims], x.shape[-num_row_dims:].numel()
    scales = x.new_empty((*lead, -(-num_features // BLOCK)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FORMATS[OPERAND.format].dtype), scales


def fake_unpack(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def triton_pack(x: Tensor, num_row_dims: int) -> tuple[Tensor, Tensor]:
    from fxopt.kernels import triton_saving

    if not x.numel() or not triton_saving.can_cast(x.device):
        return native_pack(x, num_row_dims)
    codes, scales = fake_pack(x, num_row_dims)
    triton_saving.pack(x.flatten(-num_row_dims), codes, scales)
    return codes, scales


def triton_unpack(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from fxopt.kernels import triton_saving

    if not codes.numel() or not triton_saving.can_cast(codes.device):
        return native_unpack(codes, scales, dtype)
    x = fake_unpack(codes, scales, dtype)
    triton_saving.unpack(codes, scales, x)
    return x


pack = register(
    "pack(Tensor x, int num_row_dims) -> (Tensor codes, Tensor scales)",
    native=native_pack,
    fake=fake_pack,
    triton=triton_pack,
)
unpack = register(
    "unpack(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
    native=native_unpack,
    fake=fake_unpack,
    triton=triton_unpack,
)
