"""The ops by their Triton kernels on CPU tensors, and awkward tensors to give them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels import (
    activation_with_weights,
    gated_activation,
    norm_modulate,
    norm_modulate_segments,
    norm_modulate_segments_quantize,
    norm_modulate_segments_streams,
    norm_modulate_streams,
    packed_activation,
    qk_norm_rope,
    qk_norm_rope_providers,
    quantize,
    quantize_group,
    quantized_producers,
    silu_linears,
)
from fxopt.kernels.registration import SECOND_FORMS


def triton_together(op: torch._ops.OpOverload) -> dict[torch._ops.OpOverload, Any]:
    """The Triton providers of an op for several calls, counting or not."""
    keys, found = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), {}
    for each in (op, SECOND_FORMS[op]):
        name = f"{each._schema.name}_together"
        kernel = torch.library.get_kernel(name, "CUDA")
        together = getattr(torch.ops.fxopt, name.removeprefix("fxopt::")).default
        found[together] = partial(kernel.call_boxed, keys)
    return found


QUANTIZING = {
    torch.ops.fxopt.quantize.default: quantize.triton,
    torch.ops.fxopt.norm_modulate_quantize.default: quantized_producers.triton_norm,
    torch.ops.fxopt.norm_modulate_quantize_columns.default: quantized_producers.triton_norm_columns,
    torch.ops.fxopt.norm_modulate_segments_quantize.default: norm_modulate_segments_quantize.triton,
    torch.ops.fxopt.norm_modulate_segments_quantize_columns.default: (
        norm_modulate_segments_quantize.triton_columns
    ),
    torch.ops.fxopt.gated_activation_quantize.default: quantized_producers.triton_activation,
    torch.ops.fxopt.gated_activation_quantize_backward.default: (
        quantized_producers.triton_activation_backward
    ),
    packed_activation.packed_backward: packed_activation.triton,
}
TRITON = {
    torch.ops.fxopt.norm_modulate.default: norm_modulate._triton,
    torch.ops.fxopt.norm_modulate_backward.default: norm_modulate._triton_backward,
    torch.ops.fxopt.norm_modulate_streams.default: norm_modulate_streams._triton,
    torch.ops.fxopt.norm_modulate_streams_backward.default: norm_modulate_streams._triton_backward,
    torch.ops.fxopt.norm_modulate_segments.default: norm_modulate_segments._triton,
    torch.ops.fxopt.norm_modulate_segments_backward.default: (
        norm_modulate_segments._triton_backward
    ),
    torch.ops.fxopt.norm_modulate_segments_streams.default: norm_modulate_segments_streams._triton,
    torch.ops.fxopt.norm_modulate_segments_streams_backward.default: (
        norm_modulate_segments_streams._triton_backward
    ),
    qk_norm_rope.qk_norm_rope: qk_norm_rope_providers.triton,
    qk_norm_rope.qk_norm_rope_backward: qk_norm_rope_providers.triton_backward,
    torch.ops.fxopt.gated_activation.default: gated_activation.triton_forward,
    torch.ops.fxopt.gated_activation_backward.default: gated_activation.triton_backward,
    silu_linears.silu_products: silu_linears.triton,
    silu_linears.silu_products_backward: silu_linears.triton_backward,
    torch.ops.fxopt.quantize_rows.default: quantize_group.triton_rows,
    torch.ops.fxopt.quantize_columns.default: quantize_group.triton_columns,
    torch.ops.fxopt.quantize_mixed.default: quantize_group.triton_mixed,
    torch.ops.fxopt.quantize_pieces.default: quantize.triton_pieces,
    torch.ops.fxopt.gated_activation_quantize_with_weights.default: activation_with_weights.triton,
    **QUANTIZING,
    **{SECOND_FORMS[op]: run for op, run in QUANTIZING.items()},
    **{op: run for alone in QUANTIZING for op, run in triton_together(alone).items()},
}
# Forms that leave codes, or read them.
# Those of calls together have second forms of their own above.
TRITON = {SECOND_FORMS[op]: run for op, run in TRITON.items() if op in SECOND_FORMS} | TRITON


class Interpreted(TorchDispatchMode):
    """Inside, the ops of fxopt run by their Triton providers, also in a backward; or, if not
    `is_on`, as everywhere on a CPU."""

    def __init__(self, is_on: bool = True) -> None:
        super().__init__()
        self.is_on = is_on

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = TRITON.get(op, op) if self.is_on else op
        return run(*args, **(kwargs or {}))


LAYOUTS = ("contiguous", "transposed", "piece", "every other")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of `t` [B, ..., D] in other memory: of a transposed tensor, of a piece of a wider
    projection, or of every other element of one."""
    if layout == "transposed" and t.dim() > 2:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "piece":
        return torch.cat([t, t], -1)[..., t.shape[-1] :]
    if layout == "every other":
        return torch.stack([t, t], -1)[..., 0]
    return t


# Factors of normal values, by dtype. Squares of the huge ones stay finite in fp32; the last are
# denormal.
SIZES = {
    torch.float32: {"normal": 1.0, "huge": 1e15, "tiny": 1e-15, "denormal": 1e-40},
    torch.float16: {"normal": 1.0, "huge": 100.0, "tiny": 1e-3, "denormal": 1e-6},
}
VALUES = ("normal", "huge", "tiny", "denormal", "constant")


def valued(t: Tensor, values: str, dtype: torch.dtype) -> Tensor:
    """`t` [..., D] with values of another size, or the same in all of a row."""
    if values == "constant":
        t = t[..., :1].expand(t.shape)
    return (t * SIZES[dtype].get(values, 1.0)).to(dtype)
