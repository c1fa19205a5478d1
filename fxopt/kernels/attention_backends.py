"""The kernels that PyTorch has for attention, how it is told to take one, and what they refuse."""

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

from fxopt.kernels import flex, varlen
from fxopt.kernels.attention_call import Call


class Backend(NamedTuple):
    """One way to run scaled_dot_product_attention.

    Args:
        name: as in a recipe.
        kernel: what PyTorch is told to take; None for what its switches are not about.
        is_enabled: whether the user has left it switched on.
        implementation: what must be active in place of PyTorch's own flash attention; None for
            PyTorch's own.
            Source: https://docs.pytorch.org/docs/stable/nn.attention.html
        in_place: what runs in the place of scaled_dot_product_attention, with its arguments and
            `window`, on this kernel or whatever is active in its place; None for that function
            itself, which knows no window and reads the mask.
        refuses: its own reasons against a call; the kernel is asked about it without its mask.
    """

    name: str
    kernel: SDPBackend | None
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
        Backend("flex", None, lambda: True, in_place=flex.attention, refuses=flex.refusals),
    )
}


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
    own = (*replaced(backend), *backend.refuses(call))
    if backend.kernel is None:
        return own
    of_kernel = call if backend.in_place is None else call.without_mask
    return (*own, *_asked(backend.kernel, of_kernel))


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
def told(kernel: SDPBackend | None) -> Iterator[None]:
    """Allow PyTorch one kernel. Its switches are those of the process: one thread at a time."""
    assert kernel is not None, "a backend without a kernel has a function of its own"
    with _SWITCHES, sdpa.sdpa_kernel(kernel):
        yield
