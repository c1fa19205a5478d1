"""The kernels that PyTorch has for attention, how it is told to take one, and what they refuse.

B batch, H heads, S queries, T keys, d and e channels of a head of queries and of values.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn import attention as sdpa
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.kernels import varlen


class Backend(NamedTuple):
    """One way to run scaled_dot_product_attention.

    Args:
        name: as in a recipe.
        kernel: what PyTorch is told to take.
        is_enabled: whether the user has left it switched on.
        implementation: what must be active in place of PyTorch's own flash attention; None for
            PyTorch's own.
            Source: https://docs.pytorch.org/docs/stable/nn.attention.html
        in_place: what runs in the place of scaled_dot_product_attention, with its arguments, on
            this kernel or whatever is active in its place; None for that function itself.
        refuses: its own reasons against a call; the kernel is asked about it without its mask.
    """

    name: str
    kernel: SDPBackend
    is_enabled: Callable[[], bool]
    implementation: str | None = None
    in_place: Callable[..., Tensor] | None = None
    refuses: Callable[[Call], Iterable[str]] = lambda call: ()


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cudnn", SDPBackend.CUDNN_ATTENTION, cuda.cudnn_sdp_enabled),
        Backend("flash", SDPBackend.FLASH_ATTENTION, cuda.flash_sdp_enabled),
        Backend("flash3", SDPBackend.FLASH_ATTENTION, cuda.flash_sdp_enabled, "FA3"),
        Backend("flash4", SDPBackend.FLASH_ATTENTION, cuda.flash_sdp_enabled, "FA4"),
        Backend("efficient", SDPBackend.EFFICIENT_ATTENTION, cuda.mem_efficient_sdp_enabled),
        Backend("math", SDPBackend.MATH, cuda.math_sdp_enabled),
        Backend(
            "varlen",
            SDPBackend.FLASH_ATTENTION,
            cuda.flash_sdp_enabled,
            in_place=varlen.attention,
            refuses=varlen.refusals,
        ),
    )
}


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

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Call:
        """By the arguments of scaled_dot_product_attention: query [B, H, S, d], key [B, H, T, d],
        value [B, H, T, e].
        """
        q, k, v, mask = query, key, value, attn_mask
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
        )

    @property
    def mask_kind(self) -> str:
        """ "none", "padding", "boolean" of another kind, or "additive"."""
        if self.mask is None or self.is_padding:
            return "padding" if self.is_padding else "none"
        return "boolean" if self.mask[1] == torch.bool else "additive"

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


# What PyTorch is asked about one at a time, as it states the first reason alone.
ASPECTS = (
    ("dtype",),
    ("batch", "heads", "is_grouped"),
    ("head_dims", "needs_grad"),
    ("tokens", "is_causal", "dropout_p"),
    ("batch", "heads", "is_grouped", "tokens", "mask"),
    ("is_dense",),
)


def refusals(backend: Backend, call: Call) -> tuple[str, ...]:
    """All reasons why `backend` cannot run `call`; none if it can. PyTorch is asked for them."""
    of_kernel = call if backend.in_place is None else call._replace(mask=None, is_padding=False)
    return (*replaced(backend), *backend.refuses(call), *_asked(backend.kernel, of_kernel))


def replaced(backend: Backend) -> tuple[str, ...]:
    """Why PyTorch's flash attention is another than this backend's."""
    active, needed = sdpa.current_flash_attention_impl(), backend.implementation
    is_free = backend.kernel is not SDPBackend.FLASH_ATTENTION or backend.in_place is not None
    if is_free or active == needed:
        return ()
    if needed is None:
        remedy = "call torch.nn.attention.restore_flash_attention_impl()"
        return (f"{active} is in the place of PyTorch's own flash attention: {remedy}",)
    remedy = f"call torch.nn.attention.activate_flash_attention_impl({needed!r})"
    why = f"{needed} is not in the place of PyTorch's flash attention"
    return (f"{why}: install its package, and {remedy}",)


@lru_cache(1024)
def _asked(kernel: SDPBackend, call: Call) -> tuple[str, ...]:
    whole = _refused(kernel, call)
    if not whole:
        return ()
    benign = Call(call.device, is_deterministic=call.is_deterministic)
    found = _refused(kernel, benign)
    for aspect in ASPECTS:
        changes: dict[str, Any] = {field: getattr(call, field) for field in aspect}
        found += _refused(kernel, benign._replace(**changes))
    return tuple(dict.fromkeys(found or whole))


def _refused(kernel: SDPBackend, call: Call) -> list[str]:
    """PyTorch's first reason against `call`, in its own words.

    Source: https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
    (select_sdp_backend).
    """
    with (
        _disable_current_modes(),
        torch.enable_grad(),
        told(kernel),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        try:
            torch._fused_sdp_choice(
                *call.tensors(), call.dropout_p, call.is_causal, enable_gqa=call.is_grouped
            )
        except RuntimeError:
            heard = [str(w.message).partition(" (Triggered internally")[0] for w in said]
            # Headings, and what is said of the kernels that were switched off to ask.
            reasons = [w for w in heard if "because:" not in w and "runtime disabled" not in w]
            return reasons or [_unspoken(kernel, call)]
    return []


def _unspoken(kernel: SDPBackend, call: Call) -> str:
    if call.mask is not None and call.mask[2]:
        return "the mask gets a gradient"
    return f"PyTorch has no {kernel.name} for this call on {call.device.type}"


_SWITCHES = threading.RLock()


@contextmanager
def told(kernel: SDPBackend) -> Iterator[None]:
    """Allow PyTorch one kernel. Its switches are those of the process: one thread at a time."""
    with _SWITCHES, sdpa.sdpa_kernel(kernel):
        yield


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values as autocast hands them to scaled_dot_product_attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
