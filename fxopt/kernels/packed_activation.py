"""The backward of gated_activation_quantize where gate and up are kept as codes: it reads those.

Values are those of `fxopt::unpack` and the backward behind it, bit for bit, without what the former
writes and the latter reads again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxopt.kernels.quantize import can_cast
from fxopt.kernels.quantized_producers import (
    OF_GRADIENTS,
    gated_activation_quantize_backward,
    native_activation_backward,
)
from fxopt.kernels.registration import register
from fxopt.kernels.saving import name_of, native_unpack
from fxopt.kernels.together import Call, alone, register_together, where_it_fits


def native(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    gate_scales: Tensor,
    up_scales: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `gated_activation_quantize_backward` returns for gate and up in grad's dtype.

    Args:
        gate, up: e4m3 codes as `fxopt::pack` writes them, up None where there is none.
        gate_scales, up_scales: their scales [..., c], fp32.
        grad and the others as there.
    """
    kept = [(gate, gate_scales), *([(up, up_scales)] if up is not None else [])]
    codes, scales = zip(*kept, strict=True)
    values, *of_up = native_unpack(codes, scales, [name_of(grad.dtype)] * len(kept))
    return native_activation_backward(grad, values, of_up[0] if of_up else None, *args)


def fake(
    grad: Tensor, gate: Tensor, up: Tensor | None, gate_scales: Any, up_scales: Any, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = (None if t is None else t.new_empty(t.shape, dtype=grad.dtype) for t in (gate, up))
    found: Any = gated_activation_quantize_backward(grad, *whole, *args[:5])
    return found


def triton_together(calls: Sequence[Call]) -> Sequence[Call]:
    from fxopt.kernels import triton_gated_activation_quantize as kernels

    def together(calls: Sequence[Call]) -> Sequence[Call]:
        plain = [(*call[:3], *call[5:]) for call in calls]
        return kernels.backward_of(plain, [call[3:5] for call in calls])

    def fits(grad: Tensor, *_: Any) -> bool:
        return grad.numel() > 0 and can_cast(grad)

    return where_it_fits(calls, fits, together, native)


triton = alone(triton_together)

packed_backward = register(
    "packed_activation_quantize_backward(Tensor grad, Tensor gate, Tensor? up, Tensor gate_scales, "
    "Tensor? up_scales, Tensor? beside, str activation, str packing, str columns, Tensor amax_t) "
    "-> (Tensor dgate, Tensor dup, Tensor codes_t, Tensor scales_t)",
    native=native,
    fake=fake,
    triton=triton,
    further=OF_GRADIENTS,
)
register_together(packed_backward, triton_together)
