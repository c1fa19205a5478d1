"""Cases of fxopt's ops against the eager ops that they replace, forward and backward, caches cold.

Shapes: batch samples, `tokens` tokens, HEADS heads of HEAD_DIM features each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.diagnose.case import Case
from fxopt.diagnose.subjects import Subject
from fxopt.diagnose.suites import Sweep, forward_backward, suffix
from fxopt.errors import UnknownOption

TOKENS, HEADS, HEAD_DIM = 1024, 8, 128
# Inputs that get no gradient.
TABLES = ("cos", "sin")


def _norm_modulate_shapes(batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    features = HEADS * HEAD_DIM
    per_token, per_sample = (batch, tokens, features), (batch, 1, features)
    sizes: dict[str, tuple[int, ...]] = {"x": per_token, "residual": per_token}
    return sizes | dict.fromkeys(("gate", "scale", "shift"), per_sample)


def _eager_norm_modulate(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    h = residual + gate * x
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift, h


def _norm_modulate(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    from fxopt.kernels.norm_modulate import norm_modulate

    affine = (None, None, scale, shift, None)
    y, h, *_ = norm_modulate(x, residual, gate, *affine, "layer", 1e-6, 0.0, 1.0, x.dtype, x.dtype)
    return y, h


def _rope_shapes(batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    table = (1, tokens, 1, HEAD_DIM)
    x = (batch, tokens, HEADS, HEAD_DIM)
    return {"x": x, "weight": (HEAD_DIM,), "cos": table, "sin": table}


def _eager_qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
    swapped = torch.stack([-n[..., 1::2], n[..., ::2]], -1).flatten(-2)
    return n * cos + swapped * sin


def _qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from fxopt.kernels.qk_norm_rope import qk_norm_rope

    tensors = [x], [None], [weight], [None], [cos], [sin]
    settings = [1], "rms", [1e-6], 0.0, False, "interleaved", "channels", "all", x.dtype
    out: Tensor = qk_norm_rope(*tensors, *settings)[0]
    return out


def _activation_shapes(batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("gate", "up"), (batch, tokens, 4 * HEADS * HEAD_DIM))


def _eager_gated_activation(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_activation(gate: Tensor, up: Tensor) -> Tensor:
    from fxopt.kernels.gated_activation import gated_activation

    out: Tensor = gated_activation(gate, up, "silu", "none")
    return out


# Shapes of the inputs for a batch and a number of tokens, the eager ops, the fused op.
KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "norm_modulate": (_norm_modulate_shapes, _eager_norm_modulate, _norm_modulate),
    "qk_norm_rope": (_rope_shapes, _eager_qk_norm_rope, _qk_norm_rope),
    "gated_activation": (_activation_shapes, _eager_gated_activation, _gated_activation),
}


def kernel_cases(
    only: str, sweep: Sweep, device: torch.device, seed: int, in_float64: bool
) -> Iterator[Case]:
    """fxopt's ops against the eager ops that they replace, forward and backward, caches cold.

    Args:
        only: part of the names of those to run.

    Raises:
        UnknownOption: if no name contains `only`.
    """
    selected = [name for name in KERNELS if only in name]
    if not selected:
        raise UnknownOption(only, tuple(KERNELS))
    for name, point in itertools.product(selected, sweep.points("batch", "tokens")):
        point = {"batch": 1, "tokens": TOKENS, "dtype": sweep.dtype} | point
        before, after = (
            functools.partial(_kernel, name, side, point, device, seed) for side in (0, 1)
        )
        truth = before if in_float64 else None
        yield Case(name + suffix(point), before, after, point, truth=truth, flush=True)


def _kernel(
    name: str, side: int, point: Mapping[str, Any], device: torch.device, seed: int
) -> Subject:
    torch.manual_seed(seed)
    shapes, *functions = KERNELS[name]
    dtype = getattr(torch, point["dtype"])
    inputs = {
        key: torch.randn(shape, device=device, dtype=dtype, requires_grad=key not in TABLES)
        for key, shape in shapes(point["batch"], point["tokens"]).items()
    }
    label = f"{name}, {('eager ops', 'fxopt op')[side]}"
    step = functools.partial(forward_backward, functions[side], nn.Identity(), seed)
    return Subject(label, step, None, inputs)
