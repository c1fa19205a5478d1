"""What a recipe moves, keeps and multiplies at the real size of a FLUX.1 block, on fake tensors."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bench import traffic as bench
from fxopt import explain
from fxopt.backends.exported import rewrite_block
from fxopt.traffic import Traffic

pytest.importorskip("diffusers", reason="presets need diffusers")


@cache
def single(recipe: str) -> Traffic:
    ((_, preset),) = bench.cases("flux-dev single")
    with torch.device("meta"):
        block, inputs = preset.build(), preset.inputs()
    return bench.count(block, inputs, rewrite_block(block, (), inputs, recipe))


def test_bytes_of_quantization() -> None:
    tokens, width = 4608, 3072
    sizes = [(width, width)] * 3 + [(4 * width, width), (width, 5 * width)]  # out, features
    inputs = tokens * (width + 5 * width)  # q, k, v and the MLP share one
    elements = inputs + sum(out * features + tokens * out for out, features in sizes)
    found = single("fp8_tensorwise")
    per_element = found.glue["fxopt::quantize"] / elements
    # Values are read for the scale and again for the codes, two bytes each; the two copies are one
    # byte each: 6. A weight makes one copy forward and the other backward: 5 each time.
    assert 6 < per_element < 8
    assert found.launches["fxopt::quantize"] / 5 <= 7  # per linear, two for each use


def test_products_are_those_of_bf16() -> None:
    plain, low = single("bf16"), single("fp8_tensorwise")
    flops = {16: 0, 8: 0}
    for gemm in low.gemms:
        flops[gemm.bits] += gemm.flops
    assert sum(flops.values()) == sum(g.flops for g in plain.gemms)
    assert flops[8] > 0.99 * sum(flops.values())


def test_what_is_kept() -> None:
    plain, low = single("bf16"), single("fp8_tensorwise")
    # bf16 makes the linears' inputs again in backward and keeps none of them; here their codes are
    # kept: a byte for each of 4608 x (3072 + 15360).
    codes = 4608 * (3072 + 15360)
    assert low.saved <= plain.saved + codes * 1.01


@pytest.mark.slow
def test_explain_declines_what_does_not_pay() -> None:
    report = explain("flux-dev", recipe="fp8_tensorwise", height=512, width=512)
    double = [d for d in report.declined if d.block_class == "FluxTransformerBlock"]
    reasons = {r for d in double for r in d.reasons}
    assert "3072 -> 3072 features: FP8 pays from 743 tokens, here are 512" in reasons
    block = report.blocks[0]
    # Of its 1,024 + 512 tokens the first take half the time: 2/3 of what BF16 takes, and bytes.
    assert 0.66 < block.after.gemm_s / block.before.gemm_s < 0.75
    assert report.recipe == "fp8_tensorwise"
