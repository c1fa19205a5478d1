"""What runs `qk_norm_rope` and its backward, where codes of x are left and read as well.

Shape suffixes: B batch, S tokens of a section, H heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxopt.kernels.counters import raise_to
from fxopt.kernels.qk_norm_rope_arguments import NUM_ARGUMENTS, NUM_BACKWARD_ARGUMENTS
from fxopt.kernels.quantize import can_cast
from fxopt.kernels.saving import BLOCK, fill, name_of, native_unpack, valued


def split_codes(args: Any) -> tuple[tuple[Any, ...], Sequence[Tensor], Sequence[Tensor]]:
    """These arguments with x of the dtype and shapes that it has where it is codes, these codes and
    their scales; none where it is not."""
    own, scales = args[:NUM_BACKWARD_ARGUMENTS], args[NUM_BACKWARD_ARGUMENTS:][:1]
    if not scales or scales[0] is None:
        return own, [], []
    return ([valued(x, own[-2]) for x in own[0]], *own[1:]), own[0], scales[0]


def seen_of(args: Any) -> Sequence[Tensor | None]:
    """What the backward is to raise to the magnitude of the gradient of each x, or None."""
    found = args[NUM_BACKWARD_ARGUMENTS + 1 :]
    return found[0] if found and found[0] is not None else [None] * len(args[0])


def _leave_magnitudes(found: Sequence[Tensor], args: Any) -> None:
    """The same in a pass of its own."""
    for seen, grad in zip(seen_of(args), found, strict=False):
        raise_to(seen, grad)


def has_whole_blocks(x_BSHd: Tensor) -> bool:
    """Whether a block of codes is one head, or some, of x."""
    num_heads, dim = x_BSHd.shape[2:]
    return BLOCK % dim == 0 and num_heads % (BLOCK // dim) == 0


def forward_launches(*args: Any) -> int:
    """And one for the codes of heads that are no blocks."""
    return 1 + (len(args) > NUM_ARGUMENTS and not all(map(has_whole_blocks, args[0])))


def leave_codes(args: Sequence[Any]) -> None:
    """Leave codes of x in a pass of its own, where there is room for them."""
    rooms = [t for pair in zip(*args[NUM_ARGUMENTS:], strict=True) for t in pair]
    fill(args[0], rooms, num_row_dims=2)


def decoded(args: Sequence[Any]) -> Sequence[Any]:
    """These arguments with what codes stand for."""
    own, codes, scales = split_codes(args)
    if not codes:
        return own
    return native_unpack(codes, scales, [name_of(own[-2])] * len(codes)), *own[1:]


def native(*args: Any) -> list[Tensor]:
    from fxopt.kernels import native_qk_norm_rope

    leave_codes(args)
    return native_qk_norm_rope.forward(*args[:NUM_ARGUMENTS])


def native_backward(grads: Sequence[Tensor], *args: Any) -> list[Tensor]:
    from fxopt.kernels import native_qk_norm_rope

    found = native_qk_norm_rope.backward(grads, *decoded(args))
    _leave_magnitudes(found, args)
    return found


def triton(*args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_qk_norm_rope

    if all(map(has_whole_blocks, args[0])) and can_cast(args[0][0]):
        return triton_qk_norm_rope.forward(*args)
    leave_codes(args)
    return triton_qk_norm_rope.forward(*args[:NUM_ARGUMENTS])


def triton_backward(grads: Sequence[Tensor], *args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_qk_norm_rope

    if can_cast(args[0][0]):
        return triton_qk_norm_rope.backward(grads, *args)
    found = triton_qk_norm_rope.backward(grads, *decoded(args))
    _leave_magnitudes(found, args)
    return found
