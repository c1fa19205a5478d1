"""Codes, scales and rounding against independent casts: torchao's, ml_dtypes' and integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fxopt.kernels import formats
from fxopt.kernels.formats import FORMATS, Quantized, dequantize_matrix, quantize_matrix, round_to
from fxopt.recipes import RECIPES, Operand

INF, NAN = math.inf, math.nan
OPERANDS = sorted({str(o) for r in RECIPES.values() for _, g in r.gemms for o in (g.a, g.b)})
NEAREST = [o for o in OPERANDS if "stochastic" not in o]


def all_bf16() -> Tensor:
    return torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.bfloat16).float()


def adversarial() -> Tensor:
    """fp32 on, one ulp beside and half way between all that could be a boundary."""
    powers = torch.ldexp(torch.ones(253), torch.arange(-126, 127))
    values = [decoded(name) for name in FORMATS]
    halves = [(v[:-1] + v[1:]) / 2 for v in values]
    points = torch.cat([powers, *values, *halves, torch.tensor([0.0, 1e-45, 3.4028235e38])])
    points = points[points.isfinite()].abs()
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (INF, 0.0))
    positive = torch.cat([points, up, down])
    return torch.cat([positive, -positive, torch.tensor([INF, -INF, NAN])])


def decoded(name: str) -> Tensor:
    """All finite values of a format >= 0, ascending."""
    if name == "e2m1":
        return torch.tensor(formats.E2M1_VALUES)
    codes = torch.arange(128, dtype=torch.uint8).view(FORMATS[name].dtype).float()
    return codes[codes.isfinite()].sort().values


INPUTS = {"bf16": all_bf16(), "adversarial": adversarial()}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_agrees_with_ml_dtypes(name: str, inputs: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes, an independent oracle")
    x, format = INPUTS[inputs], FORMATS[name]
    # It does not saturate, so that it gets what does not overflow; e2m1 has no NaN.
    wanted = x.clamp(-format.largest, format.largest).nan_to_num(NAN if name != "e2m1" else 0.0)
    dtype = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}[name]
    expected = torch.from_numpy(wanted.numpy().astype(getattr(ml_dtypes, dtype)).astype(np.float32))
    found = round_to(x.nan_to_num(NAN if name != "e2m1" else 0.0, INF, -INF), format)
    assert torch.equal(found.nan_to_num(-7.0), expected.nan_to_num(-7.0))
    assert torch.equal(found.signbit()[~x.isnan()], expected.signbit()[~x.isnan()])


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_takes_the_nearest_value_and_ties_to_even(name: str, inputs: str) -> None:
    format, x = FORMATS[name], INPUTS[inputs]
    x = x[~x.isnan()]
    values = decoded(name).double()
    magnitude = x.abs().double().clamp(max=format.largest)
    right = torch.searchsorted(values, magnitude).clamp(1, len(values) - 1)
    below, above = values[right - 1], values[right]
    # Codes of magnitudes are consecutive: the even one of two neighbours has an even index.
    tie = torch.where((right % 2 == 0), above, below)
    less, more = magnitude - below, above - magnitude
    expected = torch.where(less < more, below, torch.where(less > more, above, tie))
    found = round_to(x, format)
    assert torch.equal(found.abs().double(), expected)
    assert torch.equal(found.signbit(), x.signbit())


def test_e2m1_agrees_with_torchao() -> None:
    kernels = pytest.importorskip(
        "torchao.prototype.mx_formats.kernels", reason="needs torchao, an oracle"
    )
    for x in INPUTS.values():
        x = x[x.isfinite()]
        x = x[: len(x) // 2 * 2].reshape(1, -1)
        codes = formats.encode(round_to(x, FORMATS["e2m1"]), FORMATS["e2m1"])
        expected = kernels.f32_to_f4_unpacked(x.clamp(-6, 6))
        assert torch.equal(codes, kernels.pack_uint4(expected))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_decodes_to_what_encodes_to_it(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[name].dtype)
    values = formats.decode(codes[None], FORMATS[name])
    again = formats.encode(values, FORMATS[name])[0]
    finite = values.reshape(256, -1).isfinite().all(1)
    assert finite.sum() >= 248  # e5m2 has three NaN and one Inf of either sign
    assert torch.equal(again.view(torch.uint8)[finite], codes.view(torch.uint8)[finite])


def test_round_up_is_exact_beside_powers_of_two() -> None:
    powers = torch.ldexp(torch.ones(240), torch.arange(-120, 120))
    x = torch.cat([powers, *(torch.nextafter(powers, torch.tensor(e)) for e in (0.0, INF))])
    for value, exponent in zip(x.tolist(), formats.power_of_two_above(x).tolist(), strict=True):
        assert Fraction(2) ** (exponent - 1) < Fraction(value) <= Fraction(2) ** exponent
    # The trap: a logarithm in fp32 takes one ulp above a power of two for the power itself.
    above = torch.nextafter(powers, torch.tensor(INF))
    assert (above.log2().ceil().int() != formats.power_of_two_above(above)).any()


def test_e8m0_bytes_and_what_they_stand_for() -> None:
    exponents = torch.arange(-127, 128)
    scales = formats.encode_e8m0(exponents, torch.zeros(255, dtype=torch.bool))
    assert torch.equal(scales.view(torch.uint8), torch.arange(255, dtype=torch.uint8))
    expected = torch.tensor([2.0**e for e in exponents.tolist()], dtype=torch.float64)
    assert torch.equal(formats.decode_scales(scales).double(), expected)
    nan = formats.encode_e8m0(torch.tensor([0]), torch.tensor([True]))
    assert formats.decode_scales(nan).isnan().all()
    # The trap: the cast rounds to nearest, so that what it scales would saturate.
    assert torch.tensor([1.25]).to(torch.float8_e8m0fnu).float().item() == 1.0
    assert formats.power_of_two_above(torch.tensor([1.25])).item() == 1


def test_casts_hide_inf_and_blocks_do_not() -> None:
    # The trap: torch's own cast makes the largest number of an Inf, and no one is told.
    assert torch.tensor([INF]).clamp(-448, 448).to(torch.float8_e4m3fn).float().item() == 448
    for text in NEAREST:
        x = torch.ones(16, 256)
        x[3, 5] = INF
        values = dequantize_matrix(quantize_matrix(x, o := Operand.parse(text)), o)
        assert values[3, 5].isnan(), text
        assert not values.isinf().any(), text


def relative_blocks(operand: Operand, x: Tensor) -> tuple[int, int]:
    return formats.block_shape(operand.block, *x.shape)


@pytest.mark.parametrize("text", NEAREST)
def test_nothing_saturates_and_the_largest_is_used(text: str) -> None:
    operand = Operand.parse(text)
    x = adversarial()
    x = x[x.isfinite() & ((x == 0) | (x.abs() > 1e-30)) & (x.abs() < 1e30)]
    x = x[: len(x) // 128 * 128].reshape(-1, 128)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    quantized = quantize_matrix(x, operand)
    values = dequantize_matrix(quantized, operand)
    rows, columns = relative_blocks(operand, x)
    x = formats.hadamard(x) if operand.hadamard else x
    pad = -len(x) % rows
    amax, found = (
        formats.block_amax(torch.nn.functional.pad(t, (0, 0, 0, pad)), rows, columns)
        for t in (x, values)
    )
    if operand.format == "e2m1":
        return  # its block scales are rounded to nearest, by at most 1/16, as hardware does
    # The largest of a block keeps its relative precision: half a step of 1 in 2^mantissa_bits.
    step = 2.0 ** -(FORMATS[operand.format].mantissa_bits + 1)
    assert ((found - amax).abs() <= amax * step * (1 + 1e-6)).all()


@pytest.mark.parametrize("text", NEAREST)
def test_zeros_have_scale_one_and_nan_stays(text: str) -> None:
    operand = Operand.parse(text)
    zero = quantize_matrix(torch.zeros(32, 256), operand)
    assert not dequantize_matrix(zero, operand).any()
    if operand.scale == "two_level":  # its blocks keep at least the least normal e4m3
        assert zero.tensor_scale.item() == 1
    else:
        assert (formats.decode_scales(zero.scales) == 1).all()
    x = torch.ones(32, 256)
    x[7, 9] = NAN
    values = dequantize_matrix(quantize_matrix(x, operand), operand)
    assert values[7, 9].isnan()


@pytest.mark.parametrize("text", NEAREST)
@pytest.mark.parametrize("shape", [(0, 64), (1, 16), (5, 41), (33, 130)])
def test_any_shape_is_padded_with_zeros(text: str, shape: tuple[int, int]) -> None:
    operand = Operand.parse(text)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = quantize_matrix(x, operand)
    values = dequantize_matrix(quantized, operand)
    assert values.shape == (shape[0], formats.padded_columns(operand, shape[1]))
    if not operand.hadamard:
        assert not values[:, shape[1] :].any()
        if values.numel():
            floor = {"e4m3": 28, "e5m2": 22, "e2m1": 15}[operand.format]
            assert signal_to_noise(x, values[:, : shape[1]]) > floor


def signal_to_noise(x: Tensor, found: Tensor) -> float:
    """In decibel."""
    noise = (x.double() - found.double()).square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise))


# Gaussian values. Floating point with m stored bits keeps 6.02 m + 13.4 dB or so; the figures are
# those of the formats themselves, less 0.5 dB for scales that are rounded and blocks that are few.
FLOORS = {
    "e4m3/tensor/fp32": 31.0,
    "e4m3/tensor/pow2": 31.0,
    "e4m3/row/pow2": 31.0,
    "e4m3/1x128/fp32": 31.0,
    "e4m3/128x128/fp32": 31.0,
    "e4m3/1x32/e8m0": 31.0,
    "e5m2/tensor/fp32": 25.0,
    "e2m1/1x16/two_level": 20.0,
    "e2m1/1x16/two_level/hadamard": 20.0,
    "e2m1/16x16/two_level": 18.5,  # 256 values share a scale
    "e2m1/1x16/two_level/stochastic": 16.9,  # three times the variance of rounding to nearest
    "e2m1/1x16/two_level/stochastic/hadamard": 16.9,
}


def test_every_operand_of_the_table_has_a_floor() -> None:
    assert FLOORS.keys() == set(OPERANDS)


@pytest.mark.parametrize("text, floor", FLOORS.items())
def test_signal_to_noise(text: str, floor: float) -> None:
    operand = Operand.parse(text)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    uniform = formats.random_uniform(torch.tensor([1]), x.shape, 0)
    found = dequantize_matrix(
        quantize_matrix(x, operand, uniform if operand.stochastic else None), operand
    )
    x = formats.hadamard(x) if operand.hadamard else x
    assert floor < signal_to_noise(x, found) < floor + 1.5


def underflow(text: str) -> float:
    """Share of zeros that a gradient-like tensor becomes, its rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    x = x * torch.exp(2.5 * torch.randn(512, 1, generator=generator))
    operand = Operand.parse(text)
    return (dequantize_matrix(quantize_matrix(x, operand), operand) == 0).double().mean().item()


def test_underflow_of_gradients_whose_rows_differ() -> None:
    tensor, pow2 = underflow("e4m3/tensor/fp32"), underflow("e4m3/tensor/pow2")
    # Why gradients are e5m2 where one scale serves a tensor, and why weights alone have square
    # blocks of e2m1: each bound is far from what the next one measures.
    assert 0.01 < tensor < pow2
    assert underflow("e5m2/tensor/fp32") < tensor / 50
    assert underflow("e4m3/row/pow2") < tensor / 50
    assert underflow("e2m1/16x16/two_level") > 2 * underflow("e2m1/1x16/two_level")


def test_fp8_agrees_with_torchao() -> None:
    utils = pytest.importorskip("torchao.float8.float8_utils", reason="needs torchao, an oracle")
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for name in ("e4m3", "e5m2"):
        dtype = FORMATS[name].dtype
        for block, amax in (("tensor", x.abs().amax()), ("row", x.abs().amax(1, keepdim=True))):
            for scale, pow2 in (("fp32", False), ("pow2", True)):
                factor = utils.amax_to_scale(amax, dtype, pow2)
                expected = utils.to_fp8_saturated(x.float() * factor, dtype)
                found = quantize_matrix(x, Operand(name, block, scale))
                assert torch.equal(found.codes.float(), expected.float())
                assert torch.equal(found.scales.flatten(), (1 / factor).flatten().float())


def test_mx_and_nvfp4_agree_with_torchao() -> None:
    mx = pytest.importorskip(
        "torchao.prototype.mx_formats.mx_tensor", reason="needs torchao, an oracle"
    )
    nv = pytest.importorskip(
        "torchao.prototype.mx_formats.nvfp4_tensor", reason="needs torchao, an oracle"
    )
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scales, codes = mx.to_mx(x, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.RCEIL)
    found = quantize_matrix(x, Operand("e4m3", "1x32", "e8m0"))
    assert torch.equal(found.codes.float(), codes.float())
    assert torch.equal(found.scales.view(torch.uint8), scales.view(torch.uint8))
    tensor_scale = nv.per_tensor_amax_to_scale(x.abs().amax())
    scales, codes = nv.nvfp4_quantize(x, 16, tensor_scale)
    found = quantize_matrix(x, Operand("e2m1", "1x16", "two_level"))
    assert torch.equal(found.tensor_scale.flatten(), tensor_scale.flatten())
    assert torch.equal(found.scales.float(), scales.view(torch.float8_e4m3fn).float())
    assert torch.equal(found.codes, codes)


def test_tiny_and_huge_tensors_keep_their_values() -> None:
    # The trap: a factor that overflows makes Inf * 0 = NaN, a clamped amax makes zeros.
    for size in (1e-38, 1e-30, 1e30, 3e38):
        x = size * torch.linspace(-1, 1, 256).reshape(2, 128)
        for text in ("e4m3/tensor/fp32", "e4m3/row/pow2", "e4m3/1x32/e8m0", "e5m2/1x128/fp32"):
            operand = Operand.parse(text)
            values = dequantize_matrix(quantize_matrix(x, operand), operand)
            assert values.isfinite().all()
            assert (values - x).abs().max() <= size / 4, (size, text)


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    format, num = FORMATS[name], 4096
    points = torch.tensor([0.3, 1.3, -2.7, 5.1, -0.02, 0.9999, 1e-4])
    uniform = formats.random_uniform(torch.tensor([5]), torch.Size((len(points), num)), 0)
    rounded = round_to(points[:, None].expand(-1, num), format, uniform).double()
    step = torch.where(rounded.amax(1) > rounded.amin(1), rounded.amax(1) - rounded.amin(1), 0)
    # The mean of `num` draws that are one of two values a step apart has a standard deviation of
    # at most step / 2 / sqrt(num). Five of them: one false alarm in 1.7 million per point, and the
    # draws are fixed.
    bound = 5 * step / 2 / num**0.5 + step * 2**-24
    assert ((rounded.mean(1) - points.double()).abs() <= bound + 1e-12).all()
    assert (step > 0).sum() >= 6


def test_draws_depend_on_seed_stream_and_element_alone() -> None:
    seed = torch.tensor([2**40 + 3])
    whole = formats.random_uniform(seed, torch.Size((64, 32)), 0)
    flat = formats.random_uniform(seed, torch.Size((2048,)), 0)
    assert torch.equal(whole.flatten(), flat)
    assert torch.equal(whole, formats.random_uniform(seed.clone(), torch.Size((64, 32)), 0))
    for other in (
        formats.random_uniform(seed + 1, whole.shape, 0),
        formats.random_uniform(seed, whole.shape, 1),
    ):
        # Independent uniform numbers: |correlation| of 2048 pairs beyond 5 / sqrt(2048) once in
        # 1.7 million.
        assert abs(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1]) < 0.11
    assert abs(whole.mean() - 0.5) < 5 / (12 * 2048) ** 0.5


def test_the_transform_is_orthogonal_and_spreads() -> None:
    a, b = (torch.randn(8, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    product = formats.hadamard(a) @ formats.hadamard(b).T
    # Two sums of 64 products in fp32.
    torch.testing.assert_close(product, a @ b.T, rtol=1e-5, atol=1e-5)
    for outlier in (torch.eye(16), torch.ones(1, 16)):
        assert formats.hadamard(outlier).abs().max() <= 1  # a constant alone would become 4


def test_what_is_stored() -> None:
    x = torch.ones(32, 256)
    shapes = {
        "e4m3/tensor/fp32": ((32, 256), (1, 1)),
        "e4m3/row/pow2": ((32, 256), (32, 1)),
        "e4m3/128x128/fp32": ((32, 256), (1, 2)),
        "e4m3/1x32/e8m0": ((32, 256), (32, 8)),
        "e2m1/16x16/two_level": ((32, 128), (2, 16)),
    }
    for text, expected in shapes.items():
        found: Quantized = quantize_matrix(x, Operand.parse(text))
        assert (tuple(found.codes.shape), tuple(found.scales.shape)) == expected
