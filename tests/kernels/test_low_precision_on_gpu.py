"""Quantization and scaled products on a CUDA device, against the emulation on the same inputs."""

from dataclasses import replace

import pytest
import torch

import fxopt
from fxopt.gemms import GEMMS
from fxopt.kernels import quantize, scaled_matmul
from fxopt.kernels.quantize import Cast
from fxopt.recipes import RECIPES, Operand
from tests.families import FAMILIES, built
from tests.numerics import relative_l2, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NATIVE = ["fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_gw_hp"]
PRODUCTS = [(name, gemm) for name in NATIVE for gemm in GEMMS if getattr(RECIPES[name], gemm)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["e4m3/tensor/fp32", "e4m3/row/pow2", "e5m2/row/fp32"])
@pytest.mark.parametrize("shape", [(4608, 3072), (3, 37, 200), (1, 17)])
def test_codes_and_scales_are_bit_identical(shape, name, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    found = quantize.triton(x, name, name, None, False)
    for f, e in zip(found, quantize.native(x, name, name, None, False), strict=True):
        assert f.dtype == e.dtype and torch.equal(f.float(), e.float())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [4608, 77, 1])
@pytest.mark.parametrize("name, which", PRODUCTS)
def test_products_are_those_of_the_emulation(name, which, num_tokens, dtype, fast):
    how = getattr(RECIPES[name], which)
    generator = torch.Generator("cuda").manual_seed(0)
    x, w, bias = (
        torch.randn(s, device="cuda", generator=generator).to(dtype)
        for s in ((num_tokens, 512), (768, 512), (768,))
    )
    a, b = Cast(x, how.a, None).pair().rows, Cast(w, how.b, None).pair().rows
    formats = (str(how.a), str(how.b), fast, dtype)
    for addend in (None, bias):
        found = torch.ops.fxopt.scaled_matmul(*a, *b, addend, *formats)
        expected = scaled_matmul.emulated(*a, *b, addend, *formats)
        # In bf16 both round once; Hopper's sums keep fewer bits than fp32's, 14 or so.
        assert relative_l2(found, expected.double()) < 2 * torch.finfo(torch.bfloat16).eps


def test_other_blocks_are_emulated():
    x = torch.randn(64, 256, device="cuda")
    for name in ("e4m3/1x32/e8m0", "e2m1/1x16/two_level"):
        found = Cast(x, Operand.parse(name), None).pair().rows
        expected = Cast(x.cpu(), Operand.parse(name), None).pair().rows
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f.float().cpu(), e.float())


@pytest.mark.parametrize("name", [*NATIVE, "mxfp8", "nvfp4"])
def test_flux_trains(name):
    family = FAMILIES["flux"]
    model = built(family).to("cuda", torch.bfloat16)
    inputs = {
        k: v.cuda() if isinstance(v, torch.Tensor) else v
        for k, v in family.inputs(2, 0, torch.bfloat16).items()
    }
    plain = run(model, inputs)
    low = run(fxopt.optimize(model, recipe=replace(RECIPES[name], profit="always")), inputs)
    assert fxopt.report(model).count("quantized_linear") == 34
    bound = 0.35 if name == "nvfp4" else 0.08  # as on the CPU
    assert 0.01 < relative_l2(low["output 0"], plain["output 0"].double()) < bound


def test_a_small_model_does_not_pay():
    family = FAMILIES["flux"]
    model = fxopt.optimize(built(family).to("cuda"), recipe="fp8")
    inputs = family.inputs(2, 0, torch.float32)
    model(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    assert not fxopt.report(model).count("quantized_linear")
