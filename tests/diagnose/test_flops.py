"""FLOPs of fxopt's own ops, and of models that are rewritten to them, next to eager's."""

import pkgutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fxopt.kernels
from fxopt.diagnose import roofline
from fxopt.diagnose.case import quantized_dtypes
from fxopt.diagnose.roofline import FP8, Flops
from fxopt.diagnose.subjects import Subject
from tests.diagnose.small_block import HEAD_DIM, HEADS, cases

B, TOKENS, D = 2, 8 + 4, HEADS * HEAD_DIM


def registered() -> list[str]:
    """Every op of fxopt that is a kernel; what is a composition is counted by the ops inside it."""
    for module in pkgutil.iter_modules(fxopt.kernels.__path__):
        if not module.name.startswith("triton_"):
            __import__(f"fxopt.kernels.{module.name}")
    names = torch._C._dispatch_get_all_op_names()
    kernels = [n for n in names if n.startswith("fxopt::") and not _is_composite(n)]
    return sorted(kernels)


def _is_composite(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def test_every_op_has_a_formula():
    names = registered()
    assert {"fxopt::norm_modulate", "fxopt::scaled_matmul", "fxopt::quantize"} <= set(names)
    for name in names:
        assert getattr(torch.ops.fxopt, name.removeprefix("fxopt::")) in flop_registry, name


def counted(subject: Subject) -> int:
    with FlopCounterMode(display=False) as counter:
        subject()
    return counter.get_total_flops()


@pytest.mark.parametrize("door", ["swap", "optimize"])
@pytest.mark.parametrize("ac", ["none", "full"])
def test_a_rewritten_block_has_the_flops_of_eager(small, door, ac):
    (case,) = cases("small-block", in_float64=False, door=[door], ac=[ac], batch=[B])
    baseline, candidate = case.baseline(), case.candidate()
    baseline(), candidate()  # a capture at the first call runs the block as well
    assert counted(candidate) == counted(baseline)
    assert roofline.count(candidate) == roofline.count(baseline)


def test_attention_counts_on_a_cpu():
    q, k, v = (torch.randn(B, HEADS, TOKENS, HEAD_DIM, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    product = 2 * B * HEADS * TOKENS * TOKENS * HEAD_DIM
    # Scores and values; backward their four gradients and the scores once more.
    found = roofline.count(Subject("attention", lambda: attend(q, k, v).sum().backward()))
    assert found == Flops({"float32": (2 + 5) * product}, {})


def test_quantized_products_count_as_their_own_dtype(small):
    options = {"recipe": ["fp8"], "door": ["swap"], "batch": [B], "dtype": "bfloat16"}
    (case,) = cases("small-block", in_float64=False, **options)
    baseline, candidate = case.baseline(), case.candidate()
    before, after = roofline.count(baseline).trained, roofline.count(candidate).trained
    assert before.keys() == {"bfloat16"}
    assert after.keys() == {"bfloat16", FP8}
    # q, k, v, the MLP's two linears and the output's two parts. The gradient of a weight contracts
    # over tokens, which are padded to a multiple of 32.
    tokens, padded = B * TOKENS, 32
    assert after[FP8] == 2 * (tokens + tokens + padded) * D * (3 * D + 4 * D + 5 * D)
    assert before["bfloat16"] - after["bfloat16"] == 3 * 2 * tokens * D * 12 * D


def test_work_that_moved_to_a_faster_dtype_may_take_less_time():
    flops, peaks = Flops({"bfloat16": 100}, {}), roofline.Peaks({"bfloat16": 10, FP8: 20}, 1)
    assert roofline.floor_seconds(flops, peaks) == 10 / roofline.ALLOWANCE
    assert roofline.floor_seconds(flops, peaks, dtypes=[FP8]) == 5 / roofline.ALLOWANCE
    assert roofline.floor_seconds(flops, peaks, dtypes=["int8"]) == 10 / roofline.ALLOWANCE


def test_a_recipe_tells_what_compiled_code_does_not_show():
    assert quantized_dtypes({"recipe": "mxfp8"}) == {FP8}
    assert not quantized_dtypes({"recipe": "bf16"})
    assert not quantized_dtypes(None)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32, torch.bfloat16, torch.bfloat16), "bfloat16"),  # a bias that is wider
        ((torch.bfloat16, torch.bfloat16, torch.float32, torch.int64), "bfloat16"),  # a statistic
        ((torch.float8_e4m3fn, torch.float32), FP8),
        ((torch.complex64, torch.complex64), "complex64"),
        ((torch.int8, torch.int32), "int8"),
        ((torch.uint8, torch.float8_e4m3fn, torch.float32), "float4_e2m1fn_x2"),
    ],
)
def test_the_narrowest_operand_names_the_product(dtypes, expected):
    operands = tuple(torch.zeros(1).to(dtype) for dtype in dtypes)
    assert roofline.operand_dtype(operands) == expected
