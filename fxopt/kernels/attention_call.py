"""One call of scaled_dot_product_attention: its arguments, and what its choice of kernel looks at.

B batch, H heads, S queries, T keys, d and e channels of a head of queries and of values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """Those of scaled_dot_product_attention, with its defaults: `Arguments(*args, **kwargs)`.

    Args:
        query: [B, H, S, d]. key: [B, H, T, d]. value: [B, H, T, e].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Window(NamedTuple):
    """The keys that each query sees, of as many: those from i - left to i + right of query i.

    Args:
        left, right: -1 for all on that side, as in flash-attention.
    """

    left: int
    right: int

    def __str__(self) -> str:
        left, right = ("all" if n < 0 else n for n in self)
        return f"{left} before and {right} after"


ALL, CAUSAL = Window(-1, -1), Window(-1, 0)


class Call(NamedTuple):
    """What PyTorch looks at when it chooses. The defaults are a call that every kernel takes.

    Args:
        device: of the tensors.
        dtype: of queries, keys and values.
        batch: the sizes before those of `heads`; one in a tensor of four dims.
        heads, tokens: of queries, and of keys and values.
        head_dims: of queries and keys, and of values.
        mask: shape, dtype and whether it gets a gradient.
        is_grouped: whether several heads of queries may share one of keys and values.
        is_dense: whether the channels of a head lie side by side.
        is_deterministic: whether PyTorch is to use deterministic algorithms alone.
        is_padding: whether the mask is boolean and by its shape shared by all heads and queries.
        window: what the mask is known to say, and all that it says; None if it is not known.
    """

    device: torch.device
    dtype: torch.dtype = torch.float16
    batch: tuple[int, ...] = (1,)
    heads: tuple[int, int] = (1, 1)
    tokens: tuple[int, int] = (64, 64)
    head_dims: tuple[int, int] = (64, 64)
    mask: tuple[tuple[int, ...], torch.dtype, bool] | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    is_grouped: bool = False
    needs_grad: bool = False
    is_dense: bool = True
    is_deterministic: bool = False
    is_padding: bool = False
    window: Window | None = None

    @staticmethod
    def of(*args: Any, window: Window | None = None, **kwargs: Any) -> Call:
        """By the arguments of scaled_dot_product_attention."""
        q, k, v, mask, dropout_p, is_causal, _, enable_gqa = Arguments(*args, **kwargs)
        (*batch, heads, queries, head_dim), (*_, kv_heads, keys, _) = _sizes(q), _sizes(k)
        given = None if mask is None else (_sizes(mask), mask.dtype, mask.requires_grad)
        return Call(
            q.device,
            q.dtype,
            tuple(batch),
            (heads, kv_heads),
            (queries, keys),
            (head_dim, _sizes(v)[-1]),
            given,
            dropout_p,
            is_causal,
            enable_gqa,
            any(t.requires_grad for t in (q, k, v)),
            all(_hint(t.stride(-1)) == 1 for t in (q, k, v)),
            torch.are_deterministic_algorithms_enabled(),
            mask is not None and _is_padding(mask),
            window,
        )

    @property
    def mask_kind(self) -> str:
        """ "none", "padding", "window", "boolean" of another kind, or "additive"."""
        if self.window is not None:
            return "window"
        if self.mask is None or self.is_padding:
            return "padding" if self.is_padding else "none"
        return "boolean" if self.mask[1] == torch.bool else "additive"

    @property
    def without_mask(self) -> Call:
        return self._replace(mask=None, is_padding=False, window=None)

    @property
    def kind(self) -> Call:
        """What it has in common with calls of other sizes."""
        mask = None if self.mask is None else ((), *self.mask[1:])
        return self._replace(batch=(), heads=(1, 1), tokens=(1, 1), mask=mask)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Stand-ins for queries, keys, values and mask: one head's channels, expanded."""

        def stand_in(which: int, channels: int) -> Tensor:
            shape = (*self.batch, self.heads[which], self.tokens[which], channels)
            sizes = channels if self.is_dense else ()
            made = torch.zeros(sizes, dtype=self.dtype, device=self.device)
            return made.requires_grad_(self.needs_grad).expand(shape)

        mask = None
        if self.mask is not None:
            shape, dtype, needs_grad = self.mask
            made = torch.zeros((), dtype=dtype, device=self.device)
            mask = made.requires_grad_(needs_grad).expand(shape)
        d, e = self.head_dims
        return stand_in(0, d), stand_in(1, d), stand_in(1, e), mask

    def __str__(self) -> str:
        (h, h_kv), (s, t), (d, e) = self.heads, self.tokens, self.head_dims
        shapes = [[*self.batch, *sizes] for sizes in ((h, s, d), (h_kv, t, d), (h_kv, t, e))]
        mask = "no mask" if self.mask is None else f"{self.mask_kind} mask {list(self.mask[0])}"
        notes = {
            mask: True,
            f"{self.window}": self.window is not None,
            "causal": self.is_causal,
            "grouped queries": self.is_grouped,
            f"dropout {self.dropout_p:g}": self.dropout_p > 0,
            "with gradients": self.needs_grad,
        }
        dtype = str(self.dtype).removeprefix("torch.")
        described = ", ".join(note for note, holds in notes.items() if holds)
        return "q {}, k {}, v {} in {} on {}, {}".format(*shapes, dtype, self.device, described)


def _sizes(t: Tensor) -> tuple[int, ...]:
    """At least of heads, tokens and channels."""
    return *(1,) * (3 - t.dim()), *map(_hint, t.shape)


def _is_padding(mask: Tensor) -> bool:
    """By its shape, [..., 1, 1, T] or expanded from it; adds no guard."""
    each = zip(mask.shape[-3:-1], mask.stride()[-3:-1], strict=True)
    known = [[n if isinstance(n, int) else None for n in pair] for pair in each]
    return mask.dtype == torch.bool and all(n == 1 or stride == 0 for n, stride in known)


def _hint(size: int | torch.SymInt) -> int:
    """The size, of a dynamic one that of the call which is traced or 0; adds no guard."""
    return size.node.hint or 0 if isinstance(size, torch.SymInt) else size


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values as autocast hands them to scaled_dot_product_attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
