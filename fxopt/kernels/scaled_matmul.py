"""scaled_matmul: the product of two quantized matrices, by the device's units or emulated.

Shapes: M and N rows of the operands, K their padded columns, over which they are contracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.formats import FORMATS, Quantized, decode, dequantize_matrix
from fxopt.kernels.registration import CAPABILITIES, PROVIDERS, register
from fxopt.recipes import Gemm, Operand, Recipe

# Compute capability from which torch._scaled_mm multiplies operands of these blocks. Other blocks
# need scales in a swizzled layout that nothing here writes yet: they are emulated everywhere.
NATIVE_CAPABILITY = {"tensor": (8, 9), "row": (9, 0)}
MULTIPLE = 16  # of N, for the units


def native_capability(gemm: Gemm) -> tuple[int, int] | None:
    """The least compute capability whose units multiply like this here; None for none."""
    needed = [NATIVE_CAPABILITY.get(operand.block) for operand in (gemm.a, gemm.b)]
    known = [n for n in needed if n is not None]
    return max(known) if len(known) == 2 else None


def op_of(recipe: Recipe) -> str:
    """Under which name PROVIDERS has the products of a recipe: by which units multiply so."""
    needed = [native_capability(gemm) for _, gemm in recipe.gemms]
    known = [capability for capability in needed if capability is not None]
    return _name(max(known) if known and len(known) == len(needed) else None)


def _name(needed: tuple[int, int] | None) -> str:
    return f"scaled_matmul by units of {needed}" if needed else "scaled_matmul by emulation"


def multiply(
    a: Quantized, b: Quantized, gemm: Gemm, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """`fxopt::scaled_matmul` with its operands by name."""
    formats = (str(gemm.a), str(gemm.b), gemm.accumulation == "fast", dtype)
    out: Tensor = torch.ops.fxopt.scaled_matmul(*a, *b, bias, *formats)
    return out


def emulated(
    a: Tensor,
    a_scales: Tensor,
    a_tensor_scale: Tensor,
    b: Tensor,
    b_scales: Tensor,
    b_tensor_scale: Tensor,
    bias: Tensor | None,
    a_format: str,
    b_format: str,
    fast: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, N] = dequantize(a) dequantize(b)^T + bias, summed in fp32, rounded once to `dtype`.

    Args:
        a, b: codes [M, K] and [N, K], with scales as `fxopt::quantize` makes them.
        bias: [N], any floating-point dtype.
        a_format, b_format: as `Operand` is written.
        fast: whether the units may keep fewer bits between additions; no difference here.
    """
    first, second = Operand.parse(a_format), Operand.parse(b_format)
    left = Quantized(a, a_scales, a_tensor_scale)
    right = Quantized(b, b_scales, b_tensor_scale)
    with torch.autocast(a.device.type, enabled=False):
        if first.block in NATIVE_CAPABILITY:  # one scale for a whole sum: applied behind it
            values = [
                decode(q.codes, FORMATS[o.format]) for q, o in ((left, first), (right, second))
            ]
            y = values[0] @ values[1].t() * a_scales * b_scales.t()
        else:
            y = dequantize_matrix(left, first) @ dequantize_matrix(right, second).t()
        return (y if bias is None else y + bias).to(dtype)


def on_units(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    fast: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The same by torch._scaled_mm, which wants one kind of scale and a 16-bit bias."""
    by_row = a_scales.shape[0] != 1 or b_scales.shape[0] != 1
    if by_row and dtype != torch.bfloat16:
        # Not every device and PyTorch scale rows of others; the scales stand behind the sum.
        one = a_scales.new_ones(1, 1)
        y = on_units(a, one, b, one, None, fast, torch.float32).mul_(a_scales).mul_(b_scales.t())
        return (y if bias is None else y + bias).to(dtype)
    if by_row:
        a_scales = a_scales.repeat(a.shape[0] // a_scales.shape[0], 1)
        b_scales = b_scales.repeat(b.shape[0] // b_scales.shape[0], 1)
    inside = bias is not None and bias.dtype == dtype != torch.float32
    y = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scales,
        scale_b=b_scales.t(),
        bias=bias if inside else None,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return y if bias is None or inside else y + bias.to(dtype)


def native(*args: Any) -> Tensor:
    a, a_scales, _, b, b_scales, _, bias, a_format, b_format, fast, dtype = args
    fits = a.is_cuda and a.numel() and b.shape[0] % MULTIPLE == 0
    if fits and _has_units(a.device, a_format, b_format):
        return on_units(a, a_scales, b, b_scales, bias, fast, dtype)
    return emulated(*args)


def _has_units(device: torch.device, a_format: str, b_format: str) -> bool:
    needed = native_capability(Gemm(Operand.parse(a_format), Operand.parse(b_format)))
    return needed is not None and torch.cuda.get_device_capability(device) >= needed


def fake(a: Tensor, *args: Any) -> Tensor:
    b, dtype = args[2], args[-1]
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def flops(a: Sequence[int], *args: Any, **_: Any) -> int:
    """2 M N K from the shapes; e2m1 packs two columns into one."""
    b, a_format = args[2], args[6]
    per_code = 2 if a_format.startswith("e2m1") else 1
    return 2 * a[0] * b[0] * a[1] * per_code


scaled_matmul = register(
    "scaled_matmul(Tensor a, Tensor a_scales, Tensor a_tensor_scale, Tensor b, Tensor b_scales, "
    "Tensor b_tensor_scale, Tensor? bias, str a_format, str b_format, bool fast, "
    "ScalarType dtype) -> Tensor",
    native=native,
    fake=fake,
    flops=flops,
)
# On CUDA it is PyTorch's own kernel, where there is one for the formats (`op_of`).
PROVIDERS[_name(None)] = ("emulation",)
CAPABILITIES.update({_name(needed): needed for needed in NATIVE_CAPABILITY.values()})
PROVIDERS.update({_name(needed): ("library", "emulation") for needed in NATIVE_CAPABILITY.values()})
