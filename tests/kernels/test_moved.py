"""Kernels read each input once and write each output once, with 5% to spare."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bench.calls import norm_modulate
from bench.launches import CASES
from tests.kernels.moved import launches

# Odd numbers of rows. 8 heads: their rotary tables are a quarter of x.
BATCH, TOKENS, WIDTH = 2, 9, 1024
BOUND = 1.05
# In place: logits are read to be summed, read again, and overwritten by their gradient.
PASSES = {"linear_cross_entropy": 3}


# They cast weights of [width, width] and more, in tiles that take the interpreter long.
NARROW = {"quantize_mixed": 256, "activation_with_weights": 256, "silu_linears": 256}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_move_what_they_must(case):
    torch.manual_seed(0)
    width = NARROW.get(case.name.split()[0], WIDTH)
    found = launches(lambda: case.run(BATCH, TOKENS, width))
    assert len(found) >= case.num_launches
    for launch in found:
        assert launch.worst <= BOUND * PASSES.get(case.name, 1), launch


@pytest.mark.parametrize(
    ("per_token", "kernels"),
    [("", ["forward", "backward", "reduce"]), ("gate scale shift", ["forward", "backward"])],
)
def test_what_differs_per_token_is_not_summed(per_token, kernels):
    operands = "residual gate scale shift"
    found = launches(lambda: norm_modulate(1, 3, 32, operands, per_token=per_token))
    assert [launch.kernel for launch in found] == [f"{name}_kernel" for name in kernels]


@triton.jit
def centred(x, weight, y, num_features, NUM_READS: tl.constexpr, BLOCK: tl.constexpr):
    """y = (x - mean(x)) * weight, for one row; the second read of x is what is planted."""
    cols = tl.arange(0, BLOCK)
    mask = cols < num_features
    at = x + tl.program_id(0) * num_features + cols
    value = tl.load(at, mask, other=0.0)
    mean = tl.sum(value, 0) / num_features
    if NUM_READS == 2:
        value = tl.load(at, mask, other=0.0)
    out = (value - mean) * tl.load(weight + cols, mask, other=0.0)
    tl.store(y + tl.program_id(0) * num_features + cols, out, mask)


@pytest.mark.parametrize(("num_reads", "moved"), [(1, 2), (2, 3)])
def test_a_second_read_is_counted(num_reads, moved):
    num_rows, num_features = 40, 24  # in blocks of 32: masked elements do not count
    x, weight = torch.randn(num_rows, num_features), torch.randn(num_features)
    y = torch.empty_like(x)
    (launch,) = launches(lambda: centred[(num_rows,)](x, weight, y, num_features, num_reads, 32))
    torch.testing.assert_close(y, (x - x.mean(1, keepdim=True)) * weight)
    # The weight is read by every row, but from memory once.
    assert launch.moved == moved * x.nbytes + weight.nbytes
    assert launch.required == 2 * x.nbytes + weight.nbytes
    assert (launch.worst <= BOUND) == (num_reads == 1)


@triton.jit
def copy(x, y, stride, num_features, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    at = tl.program_id(0) * stride + cols
    tl.store(y + at, tl.load(x + at, cols < num_features), cols < num_features)


def test_views_of_one_allocation_are_one_operand():
    merged = torch.randn(40, 3, 24)
    x, y = merged[:, 1], merged[:, 2].fill_(0)
    (launch,) = launches(lambda: copy[(40,)](x, y, x.stride(0), 24, 32))
    assert torch.equal(x, y) and len(launch.operands) == 1
    assert launch.moved == launch.required == 2 * 40 * 24 * 4
