"""Rotary tables and what they do to normed heads, in plain PyTorch.

Shape suffixes: B batch, S tokens, H heads, d head dim, r rotated channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_dim(head_dim: int, width: int, tables: str) -> int:
    """How many channels tables of `width` entries rotate.

    Raises:
        ValueError: no even number, or more than there are.
    """
    rotated = 2 * width if tables == "pairs" else width
    if rotated % 2 or rotated > head_dim:
        raise ValueError(
            f'tables of {width} entries ("{tables}") rotate {rotated} of {head_dim} channels: '
            "qk_norm_rope rotates pairs, within a head"
        )
    return rotated


def signed(
    cos: Tensor, sin: Tensor, rotation: str, tables: str, is_transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Tables of any form as (cos, sin) of `rotate`: one entry per channel, sin with its sign.

    Transposed ones are those of its backward.
    """
    if tables == "pairs":
        cos, sin_p, sin_q = joined_pairs(cos, cos, rotation), -sin, sin
    elif tables == "matrices":
        (pp, sin_q), (sin_p, qq) = (pairs(column, "interleaved") for column in (cos, sin))
        cos = joined_pairs(pp, qq, rotation)
    else:
        sin_p, sin_q = pairs(sin, rotation)
        sin_p = -sin_p
    if is_transposed:
        sin_p, sin_q = sin_q, sin_p
    return cos, joined_pairs(sin_p, sin_q, rotation)


def rotate(n_BSHd: Tensor, cos: Tensor, sin: Tensor, rotation: str) -> Tensor:
    """(p, q) -> (p cos_p + q sin_p, q cos_q + p sin_q) for the pairs of the first r channels."""
    width = cos.shape[-1]
    if width < n_BSHd.shape[-1]:
        rotated = rotate(n_BSHd[..., :width], cos, sin, rotation)
        return torch.cat((rotated, n_BSHd[..., width:]), -1)
    return _rotate(n_BSHd, cos, sin, rotation)


def rotate_into(out_BSHd: Tensor, n_BSHd: Tensor, cos: Tensor, sin: Tensor, rotation: str) -> None:
    """`rotate`, written where it is wanted; not differentiable."""
    width = cos.shape[-1]
    if width < n_BSHd.shape[-1]:
        out_BSHd[..., width:] = n_BSHd[..., width:]
        out_BSHd, n_BSHd = out_BSHd[..., :width], n_BSHd[..., :width]
    if out_BSHd.dtype == n_BSHd.dtype:
        _rotate(n_BSHd, cos, sin, rotation, out_BSHd)
    else:
        out_BSHd.copy_(_rotate(n_BSHd, cos, sin, rotation))


def turns(
    cos: Tensor, sin: Tensor, rotation: str, tables: str, is_transposed: bool = False
) -> Tensor | None:
    """cos + i sin for each pair, complex [..., r/2], of tables on a CPU that turn pairs.

    As complex numbers, neighbours are rotated in a third of the time. None for other rotations;
    what the tables hold is read for that, which on a GPU would wait for it.
    """
    if rotation != "interleaved" or not cos.is_cpu:
        return None
    if tables != "pairs":
        columns = pairs(cos, rotation), pairs(sin, rotation)
        if tables == "matrices":
            (cos, sin), (sin_q, cos_q) = columns
            sin_q = -sin_q
        else:
            (cos, cos_q), (sin, sin_q) = columns
        if not (torch.equal(cos, cos_q) and torch.equal(sin, sin_q)):
            return None
    return torch.complex(cos, -sin if is_transposed else sin)


def turn_into(out_BSHd: Tensor, n_BSHd: Tensor, turns_BSHr: Tensor) -> None:
    """`rotate_into`, by what `turns` returned."""
    width = 2 * turns_BSHr.shape[-1]
    if width < n_BSHd.shape[-1]:
        out_BSHd[..., width:] = n_BSHd[..., width:]
        out_BSHd, n_BSHd = out_BSHd[..., :width], n_BSHd[..., :width]
    n = _as_complex(n_BSHd if _is_complex(n_BSHd) else n_BSHd.contiguous())
    if out_BSHd.dtype == n_BSHd.dtype and _is_complex(out_BSHd):
        torch.mul(n, turns_BSHr, out=_as_complex(out_BSHd))
    else:
        out_BSHd.copy_(torch.view_as_real(n * turns_BSHr).flatten(-2))


def _is_complex(x: Tensor) -> bool:
    """Whether neighbours can be seen as complex numbers where they are."""
    *strides, last = x.stride()
    return last == 1 and not any(n % 2 for n in (x.storage_offset(), *strides))


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)))


def _rotate(
    n: Tensor, cos: Tensor, sin: Tensor, rotation: str, out: Tensor | None = None
) -> Tensor:
    p, q = pairs(n, rotation)
    return torch.mul(n, cos, out=out).addcmul_(joined_pairs(q, p, rotation), sin)


def pairs(x: Tensor, rotation: str) -> tuple[Tensor, ...]:
    """Views of the first and the second members of all pairs."""
    # Not x.unflatten, which is Python around this.
    return x.chunk(2, -1) if rotation == "half" else torch.unflatten(x, -1, (-1, 2)).unbind(-1)


def joined_pairs(first: Tensor, second: Tensor, rotation: str) -> Tensor:
    """Inverse of `pairs`."""
    if rotation == "half":
        return torch.cat((first, second), -1)
    return torch.stack((first, second), -1).flatten(-2)
