"""The roofline, the FP8 break-even and the named targets."""

import pytest
import sympy

from fxopt import cost, errors, hardware
from fxopt.cost import Product, Work
from fxopt.hardware import TARGETS, Achievable, Target, lookup

# Round figures: 1 TB/s, 100 TFLOPS in BF16, 200 in FP8, everything achievable.
IDEAL = Target("ideal", (9, 0), 1e12, 1e14, 2e14, 0, 10**9, "", Achievable(1.0, 1.0, 1.0))


def test_every_product_is_bound_on_its_own():
    compute_bound = Product(flops=10**14, num_bytes=1)
    memory_bound = Product(flops=1, num_bytes=10**12)
    found = cost.roofline(Work(gemms=(compute_bound, memory_bound)), IDEAL)
    assert found.gemm_s == pytest.approx(2.0)  # exact up to the rounding of two divisions
    assert found.attention_s == found.glue_s == 0


def test_attention_and_glue_have_their_own_ceilings():
    work = Work(attentions=(Product(10**14, 1),), glue_bytes=10**12, num_launches=3, saved_bytes=7)
    found = cost.roofline(work, IDEAL)
    assert (found.attention_s, found.glue_s, found.total_s) == (1.0, 1.0, 2.0)
    assert (found.num_launches, found.saved_bytes) == (3, 7)


def test_works_add():
    gemm = Product(2, 3, (1, 1, 1))
    both = Work((gemm,), (), 5, 1, 7) + Work((gemm,), (gemm,), 11, 2, 0)
    assert both == Work((gemm, gemm), (gemm,), 16, 3, 7)


def test_fp8_threshold_is_the_closed_form():
    h100 = lookup("h100")
    expected = 3 * 0.92 * 3.35e12 / (6 * 0.78 * 989e12)
    # FP8 on the data sheet is 1,979, not exactly twice 989.
    assert cost.fp8_threshold(h100) == pytest.approx(expected, rel=1e-3)
    assert cost.fp8_threshold(h100, quantization_bytes=4) == pytest.approx(1.5 * expected, rel=1e-3)
    assert cost.fp8_threshold(lookup("a100")) == 0


def test_fp8_pays_exactly_where_its_gain_covers_its_traffic():
    theta = cost.fp8_threshold(IDEAL)
    for m, n, k in [(100, 3072, 3072), (400, 3072, 3072), (4096, 512, 512), (10**6, 64, 3072)]:
        products = 3 * 2 * m * n * k
        gain = products / IDEAL.bf16 - products / IDEAL.fp8
        traffic = cost.QUANTIZATION_BYTES * (m * k + k * n + m * n) / IDEAL.bandwidth
        assert bool(cost.fp8_pays(m, n, k, theta)) == (gain > traffic)


def test_products_of_fewer_bits_run_on_their_own_units():
    work = {bits: Work(gemms=(Product(10**14, 1, None, bits),)) for bits in (16, 8, 4)}
    assert cost.roofline(work[16], IDEAL).gemm_s == 1.0
    assert cost.roofline(work[8], IDEAL).gemm_s == 0.5
    assert cost.roofline(work[4], IDEAL).gemm_s == 1.0  # it has no such units


def test_fp8_break_even_is_the_first_size_that_pays():
    theta = cost.fp8_threshold(lookup("h100"))
    tokens = cost.fp8_from_tokens(3072, 12288, theta)
    assert type(tokens) is int  # a sympy integer would not go into JSON
    assert cost.fp8_pays(tokens, 3072, 12288, theta)
    assert not cost.fp8_pays(tokens - 1, 3072, 12288, theta)
    assert cost.fp8_from_tokens(64, 3072, theta) is None


def test_fp8_stays_symbolic_in_a_symbolic_size():
    tokens = sympy.Symbol("M", positive=True)
    relation = cost.fp8_pays(tokens, 3072, 3072, 0.002)
    assert relation.free_symbols == {tokens}
    assert relation.subs(tokens, 4096) == sympy.true


def test_targets_are_complete_and_ordered_by_precision():
    for target in TARGETS.values():
        assert target.source.startswith("https://")
        assert target.bandwidth > 1e11
        assert target.memory > 10**10
        assert not target.fp8 or target.fp8 == pytest.approx(2 * target.bf16, rel=0.02)  # as sold
        assert not target.fp4 or target.fp4 > target.fp8
        assert 0 < target.achievable.attention < target.achievable.gemm < 1
    assert lookup("H100").device == "cuda:sm_90"


def test_unknown_target_names_the_nearest():
    with pytest.raises(errors.UnknownTarget, match="did you mean 'h200'"):
        hardware.lookup("hh200")
