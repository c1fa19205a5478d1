"""norm_modulate and gated_activation whose result is FP8 codes: the 16-bit tensor is never written.

The result is rounded to the model's dtype and then quantized, so that codes and scales are, bit for
bit, those of `fxopt::quantize` on the result. A forward writes the copy that the products read, and
what the transposed copy's scales are taken from; the backward makes that copy from what the
producer keeps anyway.

For operands with one scale for a tensor or a row (`quantize.covers`).

Shapes: K features, M tokens (all leading dims).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import native_gated_activation, native_norm_modulate, quantize
from fxopt.kernels.counters import raise_to
from fxopt.kernels.magnitude_parts import num_reductions
from fxopt.kernels.native_gated_activation import packs_apart
from fxopt.kernels.quantize import amax_for, fake_amax
from fxopt.kernels.registration import CAPABILITIES, opmath_of, register
from fxopt.kernels.saving import fill, values_of
from fxopt.kernels.together import Call, alone, register_together, where_it_fits
from fxopt.recipes import Operand

NORM_ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, Tensor? x_bias, str norm, float eps, float weight_offset, float scale_offset, "
    "ScalarType h_dtype, ScalarType dtype"
)

COUNTERS = "Tensor(a!)? counters"
OF_INPUT = f"{COUNTERS}, Tensor? known, Tensor(b!)? seen"
OF_COLUMNS = f"{COUNTERS}, Tensor? h_scales"
OF_GRADIENTS = f"{COUNTERS}, Tensor(b!)? gate_seen, Tensor(c!)? up_seen"
# Behind them, where codes of what is read are left.
OF_NORM = f"{OF_INPUT}, Tensor(c!)? h_codes, Tensor(d!)? h_scales, Tensor(e!)? x_codes, "
OF_NORM += "Tensor(f!)? x_scales"
OF_ACTIVATION = f"{OF_INPUT}, Tensor(c!)? gate_codes, Tensor(d!)? gate_scales, "
OF_ACTIVATION += "Tensor(e!)? up_codes, Tensor(f!)? up_scales"


def native_norm(*args: Any) -> tuple[Tensor, ...]:
    """Codes [M, K padded], scales [M or 1, 1] and amax_t of the y that `norm_modulate` makes.

    Args:
        args: those of `fxopt::norm_modulate`, then rows and columns: how y is quantized for the
            products (as `Operand` is written), and its transpose for weights' gradients or None;
            last, where they are given, the counters of the copy (a line as in `counters`), known
            and seen as in `quantize`, and where codes and scales of the norm's input and of x are
            left, those of `saving.pack`.

    Returns codes, scales, amax_t (see `amax_for`), and h, mean, rstd as norm_modulate does.
    """
    operands, (rows, columns, *more) = args[:14], args[14:]
    y, h, mean, rstd = native_norm_modulate.forward(*operands)
    counters, known, seen = (*more, None, None, None)[:3]
    fill((operands[0] if operands[1] is None else h, operands[0]), more[3:])
    codes, scales = quantize.native(y, rows, None, None, False, counters, None, known, seen)[:2]
    return codes, scales, amax_for(y, columns), h, mean, rstd


def native_norm_columns(
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    eps: float,
    weight_offset: float,
    scale_offset: float,
    dtype: torch.dtype,
    columns: str,
    amax_t: Tensor,
    counters: Tensor | None = None,
    h_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The transposed copy of the same y: codes_t [K, M padded] and scales_t [K or 1, 1].

    Args:
        h: the norm's input, the x where there was no residual; the others as they were.
        mean, rstd, amax_t: as the forward returned them.
        counters: of this copy, or None.
        h_scales: where h is codes of values of `dtype`, their scales.
    """
    h = values_of(h, h_scales, dtype)
    affine, settings = (weight, bias, scale, shift), (norm, eps, weight_offset, scale_offset)
    y = native_norm_modulate.forward(h, None, None, *affine, None, *settings, h.dtype, dtype)[0]
    codes_t, scales_t = quantize.native(y, None, columns, None, False, None, counters, amax_t)[3:5]
    return codes_t, scales_t


def native_activation(
    gate: Tensor,
    up: Tensor | None,
    beside: Tensor | None,
    activation: str,
    packing: str,
    rows: str,
    columns: str | None,
    counters: Tensor | None = None,
    known: Tensor | None = None,
    seen: Tensor | None = None,
    *rooms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [M, K padded], scales [M or 1, 1] and amax_t of y = [beside | act(gate) * up].

    Args:
        gate, up, activation, packing: those of `fxopt::gated_activation`.
        beside: [..., K - F], what a linear takes beside F features of the activation, or None.
        rows, columns, counters, known, seen: as in `native_norm`.
        rooms: where gate's and up's own codes and scales are left, those of `saving.pack`.
    """
    fill((gate, up), rooms)
    y = _joined(gate, up, beside, activation, packing)
    codes, scales = quantize.native(y, rows, None, None, False, counters, None, known, seen)[:2]
    return codes, scales, amax_for(y, columns)


def native_activation_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    beside: Tensor | None,
    activation: str,
    packing: str,
    columns: str,
    amax_t: Tensor,
    counters: Tensor | None = None,
    *seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up (empty without one), as `gated_activation_backward` makes them, and
    the transposed copy of the same y: codes_t [K, M padded] and scales_t [K or 1, 1].

    Args:
        grad: [..., F], of the activation; the others as they were.
        amax_t: as the forward returned it.
        counters, seen: of this copy; raised to the magnitudes of both gradients; or None.
    """
    found = native_gated_activation.native_backward(grad, gate, up, activation, packing, True)
    dgate, dup, y, _ = found
    for t, own in zip((dgate, dup), seen, strict=False):
        raise_to(own, t)
    y = y if beside is None else torch.cat([beside, y], -1)
    codes_t, scales_t = quantize.native(y, None, columns, None, False, None, counters, amax_t)[3:5]
    return dgate, dup, codes_t, scales_t


def _joined(
    gate: Tensor, up: Tensor | None, beside: Tensor | None, activation: str, packing: str
) -> Tensor:
    y = native_gated_activation.native(gate, up, activation, packing)
    return y if beside is None else torch.cat([beside, y], -1)


def fake_norm(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    norm, (h_dtype, dtype, rows, columns) = args[6], args[10:14]
    _, h, mean, rstd = native_norm_modulate.outputs(x, residual, norm, h_dtype, dtype)
    num_features = x.shape[-1]
    codes, scales, _ = quantize.fake_matrix(x, x.numel() // num_features, num_features, rows)
    return codes, scales, fake_amax(x, num_features, columns), h, mean, rstd


def fake_norm_columns(h: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    num_features = h.shape[-1]
    codes, scales, _ = quantize.fake_matrix(h, num_features, h.numel() // num_features, args[11])
    return codes, scales


def _size(gate: Tensor, beside: Tensor | None, packing: str) -> tuple[int, int]:
    """M and K of [beside | activation]."""
    width = gate.shape[-1] // (1 if packing == "none" else 2)
    num_tokens = gate.numel() // gate.shape[-1]
    return num_tokens, width if beside is None else width + beside.shape[-1]


def _fake_activation(
    gate: Tensor,
    up: Any,
    beside: Any,
    name: str,
    packing: str,
    rows: str,
    columns: str | None,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_features = _size(gate, beside, packing)
    codes, scales, _ = quantize.fake_matrix(gate, num_tokens, num_features, rows)
    return codes, scales, fake_amax(gate, num_features, columns)


def _fake_activation_backward(
    grad: Tensor, gate: Tensor, up: Any, beside: Any, name: str, packing: str, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_features = _size(gate, beside, packing)
    codes, scales, _ = quantize.fake_matrix(gate, num_features, num_tokens, args[0])
    return *_activation_gradients(gate, up), codes, scales


def _activation_gradients(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def fits(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take `x` and compute in `dtype`."""
    return dtype != torch.float64 and x.numel() > 0 and quantize.can_cast(x)


def triton_norms(calls: Sequence[Call]) -> Sequence[Call]:
    from fxopt.kernels import triton_norm_modulate_quantize as kernels

    def has_rows(x: Tensor, *args: Any) -> bool:
        return fits(x, opmath_of(x, *args[11:13]))

    return where_it_fits(calls, has_rows, kernels.forward_of, native_norm)


def triton_columns_of_norms(calls: Sequence[Call]) -> Sequence[Call]:
    from fxopt.kernels import triton_norm_modulate_quantize as kernels

    def has_rows(h: Tensor, *args: Any) -> bool:
        return fits(h, args[5].dtype)

    return where_it_fits(calls, has_rows, kernels.columns_of, native_norm_columns)


def triton_activations(calls: Sequence[Call]) -> Sequence[Call]:
    from fxopt.kernels import triton_gated_activation_quantize as kernels

    return where_it_fits(calls, _has_tiles, kernels.forward_of, native_activation)


def triton_activations_backward(calls: Sequence[Call]) -> Sequence[Call]:
    from fxopt.kernels import triton_gated_activation_quantize as kernels

    def has_tiles(_: Tensor, gate: Tensor, *args: Any) -> bool:
        return _has_tiles(gate)

    return where_it_fits(calls, has_tiles, kernels.backward_of, native_activation_backward)


def _has_tiles(gate: Tensor, *_: Any) -> bool:
    return fits(gate, gate.dtype)


triton_norm, triton_norm_columns = alone(triton_norms), alone(triton_columns_of_norms)
triton_activation = alone(triton_activations)
triton_activation_backward = alone(triton_activations_backward)


def _is_of_tensor(operand: str | None) -> bool:
    return operand is not None and Operand.parse(operand).block == "tensor"


def norm_launches(*args: Any) -> int:
    """Rows are cast where they are normed, unless they share a scale that is not known; else the
    magnitudes for the transposed copy, which programs leave in parts, take a reduction."""
    rows, columns = args[14:16]
    if _is_known(args, 17):
        return 1
    return 2 if _is_of_tensor(rows) or columns is not None else 1


def launches_of_norms(calls: Sequence[Call]) -> int:
    """The reductions are one for each call."""
    alone = [norm_launches(*call) for call in calls]
    casts_later = _is_of_tensor(calls[0][14]) and not _is_known(calls[0], 17)
    return max(alone) if casts_later else 1 + sum(num - 1 for num in alone)


def norm_rereads(args: Any, out: Any) -> list[Tensor]:
    """What is normed, where its cast waits for the scale."""
    x, residual, h = args[0], args[1], out[3]
    casts_later = _is_of_tensor(args[14]) and not _is_known(args, 17)
    return [x if residual is None else h] if casts_later else []


def _is_known(args: Any, index: int) -> bool:
    """Whether the magnitude that scales come from is given at `index`."""
    return len(args) > index and args[index] is not None


def launches_of_activations(calls: Sequence[Call]) -> int:
    """As the call that launches most, and all reductions of magnitudes."""
    measured = [c for c in calls if not _is_known(c, 8)]
    own = any(packs_apart(c[0], c[1], c[2], c[4], c[10:]) for c in calls)
    each = [num_reductions(*_size(c[0], c[2], c[4]), *c[5:7]) for c in measured]
    return 1 + bool(measured) + own + sum(each)


norm_modulate_quantize = register(
    f"norm_modulate_quantize({NORM_ARGUMENTS}, str rows, str? columns) -> "
    "(Tensor codes, Tensor scales, Tensor amax_t, Tensor h, Tensor mean, Tensor rstd)",
    native=native_norm,
    fake=fake_norm,
    triton=triton_norm,
    launches=norm_launches,
    rereads=norm_rereads,
    further=OF_NORM,
)
norm_modulate_quantize_columns = register(
    "norm_modulate_quantize_columns(Tensor h, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, Tensor mean, Tensor rstd, str norm, float eps, float weight_offset, "
    "float scale_offset, ScalarType dtype, str columns, Tensor amax_t) "
    "-> (Tensor codes_t, Tensor scales_t)",
    native=native_norm_columns,
    fake=fake_norm_columns,
    triton=triton_norm_columns,
    further=OF_COLUMNS,
)
gated_activation_quantize = register(
    "gated_activation_quantize(Tensor gate, Tensor? up, Tensor? beside, str activation, "
    "str packing, str rows, str? columns) -> (Tensor codes, Tensor scales, Tensor amax_t)",
    native=native_activation,
    fake=_fake_activation,
    triton=triton_activation,
    launches=lambda *args: launches_of_activations([args]),
    rereads=lambda args, _: [] if _is_known(args, 8) else [t for t in args[:3] if t is not None],
    further=OF_ACTIVATION,
)
gated_activation_quantize_backward = register(
    "gated_activation_quantize_backward(Tensor grad, Tensor gate, Tensor? up, Tensor? beside, "
    "str activation, str packing, str columns, Tensor amax_t) "
    "-> (Tensor dgate, Tensor dup, Tensor codes_t, Tensor scales_t)",
    native=native_activation_backward,
    fake=_fake_activation_backward,
    triton=triton_activation_backward,
    further=OF_GRADIENTS,
)
register_together(
    norm_modulate_quantize,
    triton_norms,
    launches=launches_of_norms,
    kind=lambda x, *_: x.shape[-1],
)
register_together(norm_modulate_quantize_columns, triton_columns_of_norms)
register_together(gated_activation_quantize, triton_activations, launches_of_activations)
register_together(gated_activation_quantize_backward, triton_activations_backward)
_FORWARDS = ("norm_modulate_quantize", "gated_activation_quantize")
for _name in (*_FORWARDS, *(f"{name}_together" for name in _FORWARDS), "quantize_together"):
    CAPABILITIES[_name] = quantize.CAST_CAPABILITY
