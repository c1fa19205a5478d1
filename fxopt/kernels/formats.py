"""Low-precision number formats: codes, scales and rounding, bit-exact in plain PyTorch.

A quantized matrix is codes, a scale for each block, and for two-level scales one more for the
whole tensor: value = decode(code) * scale * tensor_scale.

Shapes: R rows, C columns (the contraction), padded with zeros to whole blocks; r, c blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.counters import count
from fxopt.recipes import Operand


class Format(NamedTuple):
    """A floating-point format of few bits.

    largest: finite value. mantissa_bits: stored. least_exponent: of the normal numbers.
    dtype: of the codes; e2m1 packs two into a byte, the even column in the low bits.
    """

    largest: float
    mantissa_bits: int
    least_exponent: int
    dtype: torch.dtype


FORMATS = {
    "e4m3": Format(448.0, 3, -6, torch.float8_e4m3fn),
    "e5m2": Format(57344.0, 2, -14, torch.float8_e5m2),
    "e2m1": Format(6.0, 1, 0, torch.uint8),
}
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The contraction is padded to whole blocks, and to what the matrix units take at once.
ALIGNMENT = {"tensor": 16, "row": 16, "1x16": 32, "16x16": 32}
# Scales stay normal fp32 numbers: GPUs flush others to zero.
SMALLEST_SCALE = 2.0**-126
SMALLEST_BLOCK_SCALE = 2.0**-6  # the least normal e4m3, as torchao and its kernels bound it
# Signs before the Hadamard transform, of a bent function: a constant is spread evenly as well.
SIGNS = (1, 1, 1, -1, 1, 1, 1, -1, 1, 1, 1, -1, -1, -1, -1, 1)


class Quantized(NamedTuple):
    """codes [R, C] (e2m1: [R, C / 2]), scales [r, c], tensor_scale [1, 1] or empty."""

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor


def alignment(block: str) -> int:
    """What the contraction of an operand is padded to a multiple of."""
    return ALIGNMENT.get(block) or int(block.split("x")[1])


def block_shape(block: str, num_rows: int, num_columns: int) -> tuple[int, int]:
    """Rows and columns of a block in a matrix of this (padded) size."""
    if block == "tensor":
        return max(num_rows, 1), max(num_columns, 1)
    if block == "row":
        return 1, max(num_columns, 1)
    rows, columns = block.split("x")
    return int(rows), int(columns)


def num_blocks(block: str, num_rows: int, num_columns: int) -> tuple[int, int]:
    """Shape of the scales of a matrix with padded columns."""
    if block in ("tensor", "row"):
        return 1 if block == "tensor" else num_rows, 1
    rows, columns = block_shape(block, num_rows, num_columns)
    return -(-num_rows // rows), -(-num_columns // columns)


def round_to(x: Tensor, format: Format, uniform: Tensor | None = None) -> Tensor:
    """Round fp32 to the nearest value of `format`, ties to even, saturating; NaN stays.

    Args:
        uniform: in [0, 1), multiples of 2^-24, of x's shape: round x up if its distance from the
            value below, in steps between values, is larger. E[result] = x to 2^-24 steps.
    """
    x = x.clamp(-format.largest, format.largest)
    if uniform is None and format.dtype is not torch.uint8:
        return x.to(format.dtype).float()
    _, exponent = torch.frexp(x)  # |x| in [2^(e-1), 2^e)
    step = (exponent - 1).clamp(min=format.least_exponent) - format.mantissa_bits
    units = torch.ldexp(x, -step)
    if uniform is None:
        whole = units.round()
    else:
        below = units.floor()
        whole = below + (units - below > uniform)
    return torch.ldexp(whole.copysign(x), step)


def encode(values: Tensor, format: Format) -> Tensor:
    """Codes of fp32 values that `format` has; e2m1 has no NaN and takes it for zero."""
    if format.dtype is not torch.uint8:
        return values.to(format.dtype)
    twice = (2 * values.abs()).nan_to_num(0.0).to(torch.int64)
    of_twice = torch.zeros(13, dtype=torch.uint8, device=values.device)
    for code, value in enumerate(E2M1_VALUES):
        of_twice[int(2 * value)] = code
    codes = of_twice[twice] | (values.signbit().to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode(codes: Tensor, format: Format) -> Tensor:
    """The fp32 values behind codes."""
    if format.dtype is not torch.uint8:
        return codes.float()
    table = torch.tensor([s * v for s in (1, -1) for v in E2M1_VALUES], device=codes.device)
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return table[both.long()]


def power_of_two_above(x: Tensor) -> Tensor:
    """The exponent e of the least 2^e >= x, read off the bits: a logarithm would round."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    return exponent - (mantissa == 0.5).int()


def encode_e8m0(exponent: Tensor, is_nan: Tensor) -> Tensor:
    """Bytes of 2^exponent; `.to(float8_e8m0fnu)` would round what it is given to nearest."""
    code = (exponent + 127).clamp(0, 254).masked_fill(is_nan, 255)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_scales(scales: Tensor) -> Tensor:
    """Stored scales as fp32."""
    if scales.dtype is not torch.float8_e8m0fnu:
        return scales.float()
    code = scales.view(torch.uint8).int()
    return torch.ldexp(torch.ones_like(code, dtype=torch.float32), code - 127).masked_fill(
        code == 255, float("nan")
    )


def block_amax(x_RC: Tensor, rows: int, columns: int) -> Tensor:
    """Largest magnitude of each block, [r, c]; NaN if the block holds anything not finite."""
    tiles = x_RC.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    amax = tiles.abs().amax((1, 3))
    return amax.masked_fill(~amax.isfinite(), float("nan"))


def quotient(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b, rounded once: with a plain number PyTorch multiplies by a reciprocal."""
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    a, b = (t if isinstance(t, Tensor) else torch.full_like(like, t) for t in (a, b))
    return a / b


def scale_blocks(
    amax_rc: Tensor, scale: str, format: Format
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stored scales, the factors that x is multiplied by, and the tensor's own scale.

    The factor takes the largest magnitude to at most `format.largest`; it is 1 for a block of
    zeros, and NaN where the magnitude is NaN.
    """
    zero = amax_rc == 0
    if scale == "two_level":
        return _two_levels(amax_rc, format)
    if scale == "e8m0":
        exponent = power_of_two_above(quotient(amax_rc, format.largest)).masked_fill(zero, 0)
        scales = encode_e8m0(exponent, amax_rc.isnan())
        return scales, 1 / decode_scales(scales), None
    factor = quotient(format.largest, amax_rc).clamp(max=1 / SMALLEST_SCALE)
    if scale == "pow2":
        _, exponent = torch.frexp(factor)  # factor in [2^(e-1), 2^e)
        below = torch.ldexp(torch.ones_like(factor), exponent - 1)
        factor = below.masked_fill(factor.isnan(), float("nan"))
    factor = factor.masked_fill(zero, 1.0)
    return 1 / factor, factor, None


def _two_levels(amax_rc: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    e4m3 = FORMATS["e4m3"]
    largest = amax_rc.amax() if amax_rc.numel() else amax_rc.new_zeros(())
    tensor_scale = quotient(largest, format.largest * e4m3.largest).clamp(min=SMALLEST_SCALE)
    tensor_scale = tensor_scale.masked_fill(largest == 0, 1.0).reshape(1, 1)
    wanted = quotient(amax_rc, format.largest) / tensor_scale
    scales = wanted.clamp(SMALLEST_BLOCK_SCALE, e4m3.largest).to(e4m3.dtype)
    return scales, (1 / tensor_scale) / scales.float(), tensor_scale


def is_clipped(amax: Tensor, known: Tensor, operand: Operand) -> Tensor:
    """Whether a scale made for `known` takes `amax` further beyond the format's largest value than
    rounding would bring it back: half a step of the values below it."""
    format = FORMATS[operand.format]
    exponent = math.frexp(format.largest)[1] - 1
    limit = format.largest + 2.0 ** (exponent - format.mantissa_bits - 1)
    return amax * scale_blocks(known, operand.scale, format)[1] > limit


def spread(blocks_rc: Tensor, rows: int, columns: int) -> Tensor:
    """Each block's value at all of its elements, [r * rows, c * columns]."""
    num_rows, num_columns = blocks_rc.shape
    tiles = blocks_rc[:, None, :, None].expand(num_rows, rows, num_columns, columns)
    return tiles.reshape(num_rows * rows, num_columns * columns)


def hadamard(x_RC: Tensor) -> Tensor:
    """Mix each 16 columns by an orthogonal matrix: Walsh-Hadamard after fixed signs."""
    matrix = torch.ones(1, 1, device=x_RC.device)
    while matrix.shape[0] < 16:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=x_RC.device)
    mixed = x_RC.unflatten(-1, (-1, 16)) * signs @ (matrix / 4)
    return mixed.flatten(-2)


def quantize_matrix(
    x_RC: Tensor,
    operand: Operand,
    uniform: Tensor | None = None,
    counters: Tensor | None = None,
    known: Tensor | None = None,
) -> Quantized:
    """Quantize a matrix for a contraction over its columns, which are padded to whole blocks.

    Args:
        x_RC: any floating-point dtype; taken as fp32.
        uniform: random numbers as `round_to` takes them, of the padded shape; None for rounding
            to nearest.
        counters: a line as in `counters`, which is added to, or None.
        known: fp32, the largest magnitude of each block, or another that the scales are taken
            from: what is larger saturates, and what is not finite becomes NaN by itself.
    """
    format, num_rows = FORMATS[operand.format], x_RC.shape[0]
    x = _pad(x_RC.float(), 1, alignment(operand.block))
    if operand.hadamard:
        x = hadamard(x)
    rows, columns = block_shape(operand.block, *x.shape)
    x = _pad(x, rows, columns)
    shape = num_blocks(operand.block, *x.shape)
    if known is None or counters is not None:
        amax = block_amax(x, rows, columns) if x.numel() else x.new_zeros(shape)
    used = amax if known is None else known.view(shape)
    used = used.masked_fill(used.isinf(), float("nan"))
    scales, factor, tensor_scale = scale_blocks(used, operand.scale, format)
    scaled = (x * spread(factor, rows, columns))[:num_rows]
    rounded = round_to(scaled, format, uniform)
    if known is not None:
        rounded = rounded.masked_fill(~scaled.isfinite(), float("nan"))
    if counters is not None:
        of_blocks = decode_scales(scales) * (1 if tensor_scale is None else tensor_scale)
        count(counters, x[:num_rows], scaled, rounded, amax, of_blocks, format.largest)
    codes = encode(rounded, format)
    return Quantized(codes, scales, x.new_empty(0) if tensor_scale is None else tensor_scale)


def padded_columns(operand: Operand, num_columns: int) -> int:
    """Columns of the quantized matrix."""
    unit = alignment(operand.block)
    return -(-num_columns // unit) * unit


def dequantize_matrix(quantized: Quantized, operand: Operand) -> Tensor:
    """The fp32 matrix [R, C] that the codes and scales stand for, padding included."""
    values = decode(quantized.codes, FORMATS[operand.format])
    rows, columns = block_shape(operand.block, *values.shape)
    scales = decode_scales(quantized.scales)
    if quantized.tensor_scale.numel():
        scales = scales * quantized.tensor_scale
    return values * spread(scales, rows, columns)[: values.shape[0]]


def _pad(x_RC: Tensor, rows: int, columns: int) -> Tensor:
    num_rows, num_columns = x_RC.shape
    more = (0, -num_columns % columns, 0, -num_rows % rows)
    return torch.nn.functional.pad(x_RC, more) if any(more) else x_RC


def random_uniform(seed: Tensor, shape: torch.Size, stream: int) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1), a function of the seed and the element alone.

    Philox-4x32-10 at counter (index, stream, 0), as `tl.philox` computes it; its first word.

    Args:
        seed: int64, one element.
        stream: tells draws with one seed apart.
    Source: https://www.thesalmons.org/john/random123/papers/random123sc11.pdf
    """
    index = torch.arange(shape.numel(), device=seed.device).view(shape)
    mask = 0xFFFFFFFF
    c0, c1 = index & mask, index >> 32
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        # Products wrap at 64 bits; their halves are read as if unsigned.
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((high >> 32) & mask) ^ c1 ^ k0, ((low >> 32) & mask) ^ c3 ^ k1
        c1, c3 = high & mask, low & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return (c0 >> 8).float() * 2.0**-24
