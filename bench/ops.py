"""fxopt's ops as a benchmark calls them, the eager ops that they replace, and Liger's kernels.

Shapes: B batch, S tokens, D features, H heads of d = 128 features; D = H * d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.diagnose.subjects import Subject
from fxopt.diagnose.suites import forward_backward
from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.qk_norm_rope import qk_norm_rope

HEAD_DIM = 128
EPS = 1e-6
# Inputs that get no gradient.
TABLES = ("cos", "sin")

Function = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    batch: int
    tokens: int
    features: int

    @property
    def name(self) -> str:
        return f"B={self.batch} S={self.tokens} D={self.features}"


@dataclass(frozen=True)
class Op:
    """One variant of an fxopt op.

    Args:
        name: of the op and the variant.
        sizes: of the inputs by name, for a shape.
        eager: PyTorch's own ops, one after the other.
        fused: the fxopt op; takes the same inputs and gives the same outputs.
        forward_tensors, backward_tensors: how many tensors of the size of the first input each
            pass has to read or write. Statistics, operands per sample and tables are left out: the
            share of the bandwidth that follows is a lower bound.
        forward_share, backward_share: of the copy bandwidth, to reach.
        liger: Liger's kernel, where it has one for the same inputs; imported on call.
    """

    name: str
    sizes: Callable[[Shape], dict[str, tuple[int, ...]]]
    eager: Function
    fused: Function
    forward_tensors: int
    backward_tensors: int
    forward_share: float = 0.90
    backward_share: float = 0.85
    liger: Function | None = None

    def inputs(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Normal random values from PyTorch's generator."""
        return {
            name: torch.randn(size, device=device, dtype=dtype, requires_grad=name not in TABLES)
            for name, size in self.sizes(shape).items()
        }

    def subject(
        self, function: Function, who: str, shape: Shape, device: torch.device, dtype: torch.dtype
    ) -> Subject:
        """Forward and backward of `function` on inputs that depend on the seed alone."""
        torch.manual_seed(0)
        step = functools.partial(forward_backward, function, nn.Identity(), 0)
        return Subject(f"{self.name}, {who}", step, None, self.inputs(shape, device, dtype))


def _sizes(*per_sample: str, features: tuple[str, ...] = (), tokens: tuple[str, ...] = ("x",)):
    """Inputs [B, S, D], [B, 1, D] and [D]."""

    def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
        per_token = (shape.batch, shape.tokens, shape.features)
        modulation = (shape.batch, 1, shape.features)
        return (
            dict.fromkeys(tokens, per_token)
            | dict.fromkeys(per_sample, modulation)
            | dict.fromkeys(features, (shape.features,))
        )

    return sizes


def _normed(norm: str, scale_offset: float = 0.0) -> Function:
    """The fxopt op; gives y, and h where there is a residual."""

    def fused(x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None, **t: Tensor):
        names = ("weight", "bias", "scale", "shift")
        operands = (x, residual, gate, *(t.get(name) for name in names), None)
        y, h, *_ = norm_modulate(*operands, norm, EPS, 0.0, scale_offset, x.dtype, x.dtype)
        return y if residual is None else (y, h)

    return fused


def _layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _layer_norm(x) * (1 + scale) + shift


def _gated(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor):
    h = residual + gate * x
    return _modulated(h, scale, shift), h


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _added_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _rms_norm(h, weight), h


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS)


def _liger_added_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _rope_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    x = (shape.batch, shape.tokens, shape.features // HEAD_DIM, HEAD_DIM)
    table = (1, shape.tokens, 1, HEAD_DIM)
    weights = dict.fromkeys(("q_weight", "k_weight"), (HEAD_DIM,))
    return {"q": x, "k": x} | weights | dict.fromkeys(TABLES, table)


def _eager_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor) -> Tensor:
        n = _rms_norm(x, weight)
        turned = torch.stack([-n[..., 1::2], n[..., ::2]], -1).flatten(-2)
        return n * cos + turned * sin

    return one(q, q_weight), one(k, k_weight)


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    tensors = ([q, k], [None] * 2, [q_weight, k_weight], [None] * 2, [cos] * 2, [sin] * 2)
    settings = ([1, 1], "rms", [EPS] * 2, 0.0, False, "interleaved", "channels", "all", q.dtype)
    return tuple(qk_norm_rope(*tensors, *settings)[:2])


def _hidden(*names: str) -> Callable[[Shape], dict[str, tuple[int, ...]]]:
    """Inputs [B, S, 4 D]."""
    return lambda shape: dict.fromkeys(names, (shape.batch, shape.tokens, 4 * shape.features))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _activation(name: str) -> Function:
    return lambda gate, up=None: gated_activation(gate, up, name, "none")


OPS = (
    Op(
        "norm_modulate: residual, gate, layer norm, modulation",
        _sizes("gate", "scale", "shift", tokens=("x", "residual")),
        _gated,
        _normed("layer", 1.0),
        forward_tensors=4,
        backward_tensors=6,
    ),
    Op(
        "norm_modulate: layer norm, modulation",
        _sizes("scale", "shift"),
        _modulated,
        _normed("layer", 1.0),
        forward_tensors=2,
        backward_tensors=3,
    ),
    Op(
        "norm_modulate: layer norm, modulation per token",
        _sizes(tokens=("x", "scale", "shift")),
        _modulated,
        _normed("layer", 1.0),
        forward_tensors=4,
        backward_tensors=5,
    ),
    Op(
        "norm_modulate: layer norm, affine",
        _sizes(features=("weight", "bias")),
        _layer_norm,
        _normed("layer"),
        forward_tensors=2,
        backward_tensors=3,
        liger=_liger_layer_norm,
    ),
    Op(
        "norm_modulate: RMS norm",
        _sizes(features=("weight",)),
        _rms_norm,
        _normed("rms"),
        forward_tensors=2,
        backward_tensors=3,
        liger=_liger_rms_norm,
    ),
    Op(
        "norm_modulate: residual, RMS norm",
        _sizes(features=("weight",), tokens=("x", "residual")),
        _added_rms_norm,
        _normed("rms"),
        forward_tensors=4,
        backward_tensors=4,
        liger=_liger_added_rms_norm,
    ),
    Op(
        "qk_norm_rope: RMS norm per head, interleaved pairs",
        _rope_sizes,
        _eager_qk_norm_rope,
        _qk_norm_rope,
        forward_tensors=4,
        backward_tensors=6,
        forward_share=0.88,
    ),
    Op(
        "gated_activation: SwiGLU",
        _hidden("gate", "up"),
        _swiglu,
        _activation("silu"),
        forward_tensors=3,
        backward_tensors=5,
        forward_share=0.92,
        backward_share=0.92,
        liger=_liger_swiglu,
    ),
    Op(
        "gated_activation: GELU, tanh",
        _hidden("gate"),
        _gelu,
        _activation("gelu_tanh"),
        forward_tensors=2,
        backward_tensors=3,
        forward_share=0.92,
        backward_share=0.92,
    ),
)
