"""What runs `qk_norm_rope` and its backward, where codes of x are left and read as well.

Shape suffixes: B batch, S tokens of a section, H heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxopt.kernels.qk_norm_rope_arguments import NUM_ARGUMENTS, NUM_BACKWARD_ARGUMENTS
from fxopt.kernels.quantize import can_cast
from fxopt.kernels.saving import BLOCK, fill, name_of, native_unpack, valued


def split_codes(args: Any) -> tuple[tuple[Any, ...], Sequence[Tensor], Sequence[Tensor]]:
    """These arguments with x of the dtype and shapes that it has where it is codes, these codes and
    their scales; none where it is not."""
    own, scales = args[:NUM_BACKWARD_ARGUMENTS], args[NUM_BACKWARD_ARGUMENTS:]
    if not scales:
        return own, [], []
    return ([valued(x, own[-2]) for x in own[0]], *own[1:]), own[0], scales[0]


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

    return native_qk_norm_rope.backward(grads, *decoded(args))


def triton(*args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_qk_norm_rope

    if all(map(has_whole_blocks, args[0])) and can_cast(args[0][0]):
        return triton_qk_norm_rope.forward(*args)
    leave_codes(args)
    return triton_qk_norm_rope.forward(*args[:NUM_ARGUMENTS])


def triton_backward(grads: Sequence[Tensor], *args: Any) -> list[Tensor]:
    from fxopt.kernels import triton_qk_norm_rope

    given = args if can_cast(args[0][0]) else decoded(args)
    return triton_qk_norm_rope.backward(grads, *given)
