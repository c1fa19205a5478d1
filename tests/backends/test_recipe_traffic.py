"""What a recipe moves, keeps and multiplies at the real size of a FLUX.1 block, on fake tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from bench import traffic as bench
from fxopt import explain
from fxopt.backends.exported import rewrite_block
from fxopt.recipes import RECIPES
from fxopt.traffic import Traffic

pytest.importorskip("diffusers", reason="presets need diffusers")


@cache
def passes(recipe: str) -> tuple[Traffic, Traffic]:
    ((_, preset),) = bench.cases("flux-dev single")
    with torch.device("meta"):
        block, inputs = preset.build(), preset.inputs()
    return bench.passes(block, inputs, rewrite_block(block, (), inputs, recipe))


def single(recipe: str) -> Traffic:
    forward, backward = passes(recipe)
    return forward + backward


NAMES = ["fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_gw_hp"]
TOKENS, WIDTH = 4608, 3072
INPUT = TOKENS * WIDTH  # elements
SIZES = [(WIDTH, WIDTH)] * 3 + [(4 * WIDTH, WIDTH), (WIDTH, 5 * WIDTH)]  # out, features
WEIGHTS = sum(out * features for out, features in SIZES)
LAST = 5 * WIDTH * WIDTH
GRADIENTS = sum(TOKENS * out for out, _ in SIZES)


def test_bytes_of_quantization_by_op() -> None:
    """Every element's way, as the design says; statistics and scales are the slack."""
    found = single("fp8_tensorwise").glue
    expected = {
        # Of a weight: read for the scale and for the codes, one copy. Likewise of the last one,
        # of five times the width, with what it multiplies.
        "quantize_rows": (2 + 2 + 1) * (WEIGHTS - LAST),
        "gated_activation_quantize_with_weights": (2 + 2 + 1) * (5 * INPUT + LAST),
        # Of a gradient, whose magnitude comes with it (but for the values'), two copies and the
        # bias's sum; with it the weight once more, without the scale.
        "quantize_mixed": (2 + 1 + 1) * GRADIENTS + 2 * INPUT + (2 + 1) * WEIGHTS,
        # Of an input: twice what the producer reads, and codes in place of 16 bits.
        "norm_modulate_quantize": (2 + 2 + 1) * INPUT,
        "norm_modulate_quantize_columns": (2 + 1) * INPUT,
        # Gradients of the activation with their magnitude, and the other copy from the same read.
        "gated_activation_quantize_backward_counting": (3 * 2 * 4 + 2 + 5) * INPUT,
    }
    for op, num_bytes in expected.items():
        assert num_bytes <= found[f"fxopt::{op}"] <= 1.01 * num_bytes, op
    names = {op.removeprefix("fxopt::") for op in found if "quantize" in op}
    assert names == expected.keys()


def test_rows_of_a_norm_are_quantized_in_one_pass() -> None:
    found = single("fp8_rowwise").glue
    assert 3 * INPUT <= found["fxopt::norm_modulate_quantize"] <= 1.01 * 3 * INPUT


@pytest.mark.parametrize("recipe", NAMES)
def test_gates(recipe: str) -> None:
    """What `python -m bench.traffic --recipe` holds, on one block."""
    found, plain = single(recipe), single("bf16")
    linears = bench.Linears.of(passes(recipe)[1], RECIPES[recipe])
    assert linears == (len(SIZES), sum(TOKENS * (m + k) + m * k for m, k in SIZES))
    assert 4 < bench.per_element(found, plain, linears) < bench.QUANTIZATION_BYTES
    assert bench.per_linear(found, plain, linears) <= bench.ASKED["launches"]
    # In bytes: 2.1 and 1.55 times what bf16 moved before its own glue fell.
    assert found.glue.total() <= 3.354e9


def test_products_are_those_of_bf16() -> None:
    plain, low = single("bf16"), single("fp8_tensorwise")
    flops = {16: 0, 8: 0}
    for gemm in low.gemms:
        flops[gemm.bits] += gemm.flops
    assert sum(flops.values()) == sum(g.flops for g in plain.gemms)
    assert flops[8] > 0.99 * sum(flops.values())


@pytest.mark.parametrize("recipe", NAMES)
def test_what_is_kept(recipe: str) -> None:
    """What bf16 keeps: no codes beside it, only magnitudes for each feature."""
    plain, low = single("bf16").saved, single(recipe).saved
    assert plain <= low <= plain + 4 * sum(features for _, features in SIZES) + 4 * 6 * WIDTH


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_what_codes_save_and_cost(recipe: str) -> None:
    """Of q, k, the activation's input, four times as wide, and the branch before the gate."""
    packed, plain = single(replace(RECIPES[recipe], name="packed", saved="fp8").key), single(recipe)
    elements, per_code = (1 + 1 + 4 + 1) * INPUT, 1 + 4 / 128
    assert plain.saved - packed.saved == elements * (2 - per_code)
    # Before a linear that is not quantized nothing else reads the activation's input.
    apart = 4 * INPUT if recipe == "bf16" else 0
    for op in ("fxopt::pack", "fxopt::unpack"):
        assert packed.glue.pop(op, 0) == apart * (2 + per_code), op
    # The others leave codes in the pass that has the values, and read these in place of 16 bits.
    more = (elements - apart) * (per_code - (2 - per_code))
    assert packed.glue.total() - plain.glue.total() == more


def test_weights_are_cast_once_for_all_micro_batches() -> None:
    ((_, preset),) = bench.cases("flux-dev single")
    with torch.device("meta"):
        block, inputs = preset.build(), preset.inputs()
    rewritten = rewrite_block(block, (), inputs, "fp8_tensorwise")
    further = bench.count_further(block, inputs, rewritten)
    assert not further.glue["fxopt::quantize_rows"]
    casts = ("quantize", "quantize_together", "quantize_mixed")
    gradients = sum(further.glue[f"fxopt::{op}"] for op in casts)
    assert gradients <= 1.01 * (4 * GRADIENTS + 2 * INPUT)
    assert further.glue.total() <= 2.475e9


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
