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
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.kernels.formats import FORMATS, quantize_matrix
from fxopt.kernels.in_force import is_high_precision
from fxopt.kernels.quantize import can_cast
from fxopt.kernels.registration import register
from fxopt.kernels.together import Ask, Call, Steps, parts, run, share
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


def is_packing() -> bool:
    """Whether activations are packed now. What is in pieces, of which only some can be, then has to
    be made in pieces: a part of a tensor keeps all of its memory."""
    return _packs.get() and not is_high_precision()


def packed(
    ctx: Any,
    activations: Sequence[Tensor | None],
    are_own: Sequence[bool] | None = None,
    num_row_dims: int = 1,
) -> list[Tensor | None]:
    """What `packing` ends with."""
    return run(packing(ctx, activations, are_own, num_row_dims))


def packing(
    ctx: Any,
    activations: Sequence[Tensor | None],
    are_own: Sequence[bool] | None = None,
    num_row_dims: int = 1,
) -> Steps[list[Tensor | None]]:
    """What a node saves of its activations, which are to come first of all that it saves.

    Args:
        ctx: of the node; where `unpacked` finds which of them are packed.
        activations: what the node alone keeps.
        are_own: which of them that holds for; None for all. The others are saved as they are.
        num_row_dims: how many of the last dims make up a row.

    As they are saved as well: fp64, and tensors that do not fill their memory. That is kept whole
    by whoever keeps another part of it, as attention does the values of a joint projection.
    """
    ctx.packed = [None] * len(activations)
    if not is_packing():
        return [*activations]
    chosen: dict[int, Any] = {i: activations[i] for i in _chosen(ctx, activations, are_own)}
    kept = [*activations]
    if not chosen:
        return kept
    (found,) = yield [Ask(pack, ([*chosen.values()], num_row_dims))]
    for (i, t), codes in zip(chosen.items(), found, strict=False):
        ctx.packed[i], kept[i] = t.dtype, codes
    return [*kept, *found[len(chosen) :]]


def room_for(
    ctx: Any,
    like: Tensor,
    activations: Sequence[Tensor | None],
    are_own: Sequence[bool] | None = None,
    num_row_dims: int = 1,
) -> list[Tensor | None]:
    """Where an op that reads or makes activations is to leave their codes and scales, of each in
    turn; None where it is saved as it is. As `packing` decides, before the op runs.

    Args:
        like: of the device of the rooms, and no subclass where there are to be any.
        activations: what is still to be made on the device "meta".
        ctx, are_own, num_row_dims: as in `packing`.
    """
    ctx.packed = [None] * len(activations)
    rooms: list[Tensor | None] = [None] * (2 * len(activations))
    if not is_packing() or is_traceable_wrapper_subclass(like):
        return rooms
    for i in _chosen(ctx, activations, are_own):
        t = activations[i]
        assert t is not None
        ctx.packed[i] = t.dtype
        rooms[2 * i : 2 * i + 2] = _room(like, t.shape, num_row_dims)
    return rooms


def kept_in(
    rooms: Sequence[Tensor | None], activations: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What a node saves of its activations, as `packing` returns it, once `rooms` are filled."""
    codes, scales = rooms[::2], rooms[1::2]
    kept = [t if c is None else c for t, c in zip(activations, codes, strict=True)]
    return [*kept, *(s for s in scales if s is not None)]


def fill(
    activations: Sequence[Tensor | None], rooms: Sequence[Tensor | None], num_row_dims: int = 1
) -> None:
    """Leave codes and scales of activations where there is room for them, by `pack`."""
    each = zip(activations, rooms[::2], rooms[1::2], strict=False)
    given = [(t, c, s) for t, c, s in each if t is not None and c is not None and s is not None]
    if not given:
        return
    xs, codes, scales = zip(*given, strict=True)
    if xs[0].is_cuda and can_cast(xs[0]):
        _launch_pack(xs, codes, scales, num_row_dims)
        return
    found = native_pack(xs, num_row_dims)
    for target, values in zip((*codes, *scales), found, strict=True):
        target.copy_(values)


def unpacked(ctx: Any, saved: Sequence[Any]) -> list[Any]:
    """What `unpacking` ends with."""
    return run(unpacking(ctx, saved))


def unpacking(ctx: Any, saved: Sequence[Any]) -> Steps[list[Any]]:
    """What a node saved: its activations, and what it saved behind them."""
    where = [i for i, dtype in enumerate(ctx.packed) if dtype is not None]
    if not where:
        return [*saved]
    activations, others = [*saved[: len(ctx.packed)]], saved[len(ctx.packed) :]
    scales, dtypes = others[: len(where)], [name_of(ctx.packed[i]) for i in where]
    (found,) = yield [Ask(unpack, ([activations[i] for i in where], scales, dtypes))]
    for i, activation in zip(where, found, strict=True):
        activations[i] = activation
    return [*activations, *others[len(where) :]]


def read_codes(
    ctx: Any, saved: Sequence[Any], dtype: torch.dtype, can_read: bool = True
) -> Steps[tuple[list[Any], tuple[Tensor | None, ...]]]:
    """What a node saved, its packed activations as codes, and the scales of each activation; or
    unpacked where its op cannot read codes, which it does as values of `dtype`."""
    num = len(ctx.packed)
    if not can_read or any(packed not in (None, dtype) for packed in ctx.packed):
        return (yield from unpacking(ctx, saved)), (None,) * num
    others = iter(saved[num:])
    scales = tuple(None if packed is None else next(others) for packed in ctx.packed)
    return [*saved[:num], *others], scales


def valued(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape and dtype of what codes stand for."""
    return codes.new_empty((), dtype=dtype).expand(codes.shape)


def values_of(t: Any, scales: Tensor | None, dtype: torch.dtype) -> Any:
    """What codes stand for; a tensor without scales as it is."""
    return t if scales is None else unpack([t], [scales], [name_of(dtype)])[0]


def _chosen(
    ctx: Any, activations: Sequence[Tensor | None], are_own: Sequence[bool] | None
) -> list[int]:
    """Which of them are packed."""
    if not any(ctx.needs_input_grad):
        return []
    fill = _fill_their_memory(activations)
    return [
        i
        for i, t in enumerate(activations)
        if t is not None and fill[i] and t.dtype in PACKED_DTYPES and (not are_own or are_own[i])
    ]


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


def native_pack(xs: Sequence[Tensor], num_row_dims: int) -> list[Tensor]:
    """code = round(x / scale) in e4m3, scale = amax / 448 of each 128 neighbours in a row.

    Args:
        xs: any shapes and strides, fp32, bf16 or fp16.
        num_row_dims: how many of the last dims make up a row.

    Returns the codes of all, of x's shape, then the scales of all, [..., c] in fp32; the last block
    of a row may be shorter.

    Numerics: to nearest, ties to even, once; nothing saturates, and the largest value of a block
    comes back but for fp32 rounding. A block of zeros has scale 1; one that holds a NaN or Inf
    becomes NaN.
    """
    codes, scales = [], []
    for x in xs:
        rows = x.flatten(-num_row_dims)
        codes_RC, scales_Rc, _ = quantize_matrix(rows.reshape(-1, rows.shape[-1]), OPERAND)
        codes.append(codes_RC[:, : rows.shape[-1]].reshape(x.shape).contiguous())
        scales.append(scales_Rc.reshape(*rows.shape[:-1], scales_Rc.shape[-1]).contiguous())
    return codes + scales


def name_of(dtype: torch.dtype) -> str:
    """As `unpack` takes it: lists of dtypes reach an op as numbers in torch 2.11."""
    return str(dtype).removeprefix("torch.")


def native_unpack(
    codes: Sequence[Tensor], scales: Sequence[Tensor], dtypes: Sequence[str]
) -> list[Tensor]:
    """x = code * scale, rounded once from fp32 to its dtype, contiguous."""
    found = []
    for code, scale, dtype in zip(codes, scales, dtypes, strict=True):
        rows = code.flatten(scale.dim() - 1).float()
        per_code = scale.repeat_interleave(BLOCK, -1)[..., : rows.shape[-1]]
        found.append((rows * per_code).to(getattr(torch, dtype)).view(code.shape))
    return found


def fake_pack(xs: Sequence[Tensor], num_row_dims: int) -> list[Tensor]:
    codes, scales = zip(*(_room(x, x.shape, num_row_dims) for x in xs), strict=True)
    return [*codes, *scales]


def _room(like: Tensor, shape: torch.Size, num_row_dims: int) -> tuple[Tensor, Tensor]:
    lead, num_features = shape[:-num_row_dims], shape[-num_row_dims:].numel()
    codes = like.new_empty(shape, dtype=FORMATS[OPERAND.format].dtype)
    return codes, like.new_empty((*lead, -(-num_features // BLOCK)), dtype=torch.float32)


def fake_unpack(
    codes: Sequence[Tensor], scales: Sequence[Tensor], dtypes: Sequence[str]
) -> list[Tensor]:
    named = zip(codes, dtypes, strict=True)
    return [c.new_empty(c.shape, dtype=getattr(torch, dtype)) for c, dtype in named]


def triton_pack(xs: Sequence[Tensor], num_row_dims: int) -> list[Tensor]:
    if not can_cast(xs[0]):
        return native_pack(xs, num_row_dims)
    found = fake_pack(xs, num_row_dims)
    _launch_pack(xs, found[: len(xs)], found[len(xs) :], num_row_dims)
    return found


def _launch_pack(
    xs: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor], num_row_dims: int
) -> None:
    from fxopt.kernels import triton_saving

    triton_saving.pack([x.flatten(-num_row_dims) for x in xs], codes, scales)


def triton_unpack(
    codes: Sequence[Tensor], scales: Sequence[Tensor], dtypes: Sequence[str]
) -> list[Tensor]:
    from fxopt.kernels import triton_saving

    if not can_cast(codes[0]):
        return native_unpack(codes, scales, dtypes)
    found = fake_unpack(codes, scales, dtypes)
    triton_saving.unpack(codes, scales, found)
    return found


# (codes..., scales...)
pack = register(
    "pack(Tensor[] xs, int num_row_dims) -> Tensor[]",
    native=native_pack,
    fake=fake_pack,
    triton=triton_pack,
)
unpack = register(
    "unpack(Tensor[] codes, Tensor[] scales, str[] dtypes) -> Tensor[]",
    native=native_unpack,
    fake=fake_unpack,
    triton=triton_unpack,
)


def _pack_together(calls: Sequence[Call]) -> list[list[Tensor]]:
    sizes = [len(xs) for xs, _ in calls]
    found = pack([x for xs, _ in calls for x in xs], calls[0][1])
    codes, scales = (parts(each, sizes) for each in parts(found, [sum(sizes)] * 2))
    return [[*c, *s] for c, s in zip(codes, scales, strict=True)]


def _unpack_together(calls: Sequence[Call]) -> list[Sequence[Tensor]]:
    fields = ([t for own in field for t in own] for field in zip(*calls, strict=True))
    return parts(unpack(*fields), [len(codes) for codes, *_ in calls])


share(pack, _pack_together, lambda xs, num_row_dims: num_row_dims)
share(unpack, _unpack_together, lambda *args: ())
