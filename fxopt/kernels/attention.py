"""Who runs an attention: what a recipe names, or the backend that was measured as the fastest.

fxopt has no attention kernel of its own. Where a recipe names none and `TABLE` has no row, PyTorch
chooses, and the graph is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import fp8_attention
from fxopt.kernels.attention_backends import BACKENDS, refusals, replaced, told
from fxopt.kernels.attention_call import Arguments, Call, Window
from fxopt.kernels.in_place import InPlace
from fxopt.kernels.registration import register_composite
from fxopt.recipe_errors import AttentionRefused, UnknownAttention
from fxopt.recipe_problems import CHOICES
from fxopt.recipes import FP8_ATTENTION


class Row(NamedTuple):
    """Of the calls of one kind, the backend that was measured as the fastest.

    Args:
        backend: its name.
        speedup: over PyTorch's own choice, forward and backward; of the calls measured, the least.
        head_dim, mask, is_causal, is_grouped, dtype: of these calls, as in `Call`.
        min_tokens, max_tokens: of queries and of keys, inclusive.
    """

    backend: str
    speedup: float
    head_dim: int
    mask: str
    is_causal: bool
    is_grouped: bool
    min_tokens: int
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16

    def holds(self, call: Call) -> bool:
        return (
            (self.head_dim, self.head_dim) == call.head_dims
            and (self.mask, self.is_causal) == (call.mask_kind, call.is_causal)
            and self.is_grouped == (call.heads[0] != call.heads[1])
            and self.dtype == call.dtype
            and all(self.min_tokens <= n <= self.max_tokens for n in call.tokens)
        )


# By name of the device, what was measured on it: `python -m bench.attention` prints the rows.
TABLE: dict[str, tuple[Row, ...]] = {}


class Choice(NamedTuple):
    """Who runs a call, and why.

    Args:
        backend: its name, or "pytorch".
        why: for the report.
    """

    backend: str
    why: str


def device_name(device: torch.device) -> str:
    """The GPU's name; of other devices, and of a GPU that is not there, the type."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if is_there else device.type


def named(asked: str) -> str | None:
    """The name of what a recipe says is to run its attentions; None if it does not say."""
    if asked in FP8_ATTENTION:
        return fp8_attention.NAME
    return asked if asked in BACKENDS else None


def steers(asked: str, device: torch.device) -> bool:
    """Whether calls on `device` may run on another kernel than PyTorch would take."""
    if asked == "auto":
        return bool(TABLE) and device_name(device) in TABLE
    return named(asked) is not None


def _measured_on(target: str) -> str:
    """The device in `TABLE` that has the words of a target's name, or that name."""
    words = set(target.split("-"))
    return next((name for name in TABLE if words <= set(name.lower().split())), target)


def choose(asked: str, described: Callable[[], Call], target: str | None = None) -> Choice:
    """Who runs a call.

    Args:
        asked: "auto", "pytorch", the name of a backend, or of `FP8_ATTENTION`.
        described: the call; it costs too much to describe where nobody asks.
        target: of `hardware`, which is planned for; nobody can ask here what it refuses. None for
            the device of the call.

    Raises:
        UnknownAttention: nothing is called so.
    """
    if asked in FP8_ATTENTION:
        return Choice(fp8_attention.NAME, fp8_attention.why(described(), target))
    if asked != "auto":
        if asked not in CHOICES["attention"]:
            raise UnknownAttention(asked, CHOICES["attention"])
        return Choice(asked, "as the recipe says")
    call = described()
    name = device_name(call.device) if target is None else _measured_on(target)
    rows = TABLE.get(name, ())
    row = next((row for row in rows if row.holds(call)), None)
    if row is None:
        what = f"nothing like {call}" if rows else "nothing"
        hint = "" if name == "cpu" else ": python -m bench.attention prints the rows"
        return Choice("pytorch", f"{what} has been measured on {name}{hint}")
    backend = BACKENDS[row.backend]
    measured = f"{row.speedup:.3g}x PyTorch's own choice as measured on {name}"
    reasons = refusals(backend, call) if target is None else ()
    if target is None and not backend.is_enabled():
        reasons = ("it is switched off in torch.backends.cuda", *reasons)
    if reasons:
        return Choice("pytorch", f"{row.backend} is {measured}, but refuses: {'; '.join(reasons)}")
    return Choice(row.backend, measured)


def attend(
    choice: Choice,
    described: Callable[[], Call],
    run: Callable[[], Tensor],
    window: Window | None = None,
) -> Tensor:
    """What `run` returns, its one attention on the kernel that was chosen.

    Args:
        window: what its mask is known to say.

    Raises:
        AttentionRefused: the backend cannot run the call.
    """
    if choice.backend == "pytorch":
        return run()
    backend = BACKENDS[choice.backend]
    reasons = replaced(backend)
    if not reasons:
        try:
            with told(backend.kernel) if backend.in_place is None else InPlace(backend, window):
                return run()
        except RuntimeError:
            reasons = refusals(backend, described())
            if not reasons:
                raise
    raise AttentionRefused(backend.name, str(described()), reasons)


def _attention(*arguments: Any) -> Tensor:
    *each, sides, asked = arguments
    given, window = Arguments(*each), None if sides is None else Window(*sides)
    if asked in FP8_ATTENTION:
        return fp8_attention.attend(asked, given)
    described = partial(Call.of, *given, window=window)
    run = partial(F.scaled_dot_product_attention, **given._asdict())
    return attend(choose(asked, described), described, run, window)


# scaled_dot_product_attention, what its mask is known to say, and what a recipe asks for.
attention = register_composite(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
    "bool is_causal, float? scale, bool enable_gqa, int[]? window, str asked) -> Tensor",
    _attention,
)
