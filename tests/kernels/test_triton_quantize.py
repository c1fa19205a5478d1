"""The Triton provider of quantize: bit-exact against the emulation."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fxopt.kernels import (
    magnitude_parts,
    quantize,
    quantize_group,
    quantized_producers,
    triton_quantize_group,
)
from fxopt.kernels import triton_quantize as kernels
from fxopt.kernels.counters import UNWATCHED
from fxopt.kernels.formats import FORMATS, block_amax, block_shape, quantize_matrix, scale_blocks
from fxopt.kernels.triton_quantize_kernels import code_of
from fxopt.kernels.triton_sizes import unspecialized
from fxopt.recipes import Operand

PAIRS = [
    ("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
    ("e5m2/tensor/fp32", "e5m2/tensor/fp32"),
    ("e4m3/row/pow2", "e4m3/row/pow2"),
    ("e4m3/row/pow2", "e5m2/row/fp32"),
    ("e5m2/tensor/pow2", "e4m3/row/fp32"),
    ("e4m3/row/fp32", None),
    (None, "e4m3/tensor/pow2"),
]


@triton.jit
def cast_alone(x, y, n, LARGEST: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n)
    tl.store(y + i, code_of(value, LARGEST, FORMAT), i < n)


def interpreted(values: Tensor, operand: Operand) -> Tensor:
    """Codes of scaled values by Triton's own cast: the interpreter rounds unlike the hardware."""
    settings = kernels.settings(operand, None)
    out, block = (
        torch.empty(values.shape, dtype=torch.uint8),
        triton.next_power_of_2(values.numel()),
    )
    cast_alone[(1,)](values, out, values.numel(), settings["LARGEST"], settings["FORMAT"], block)
    return out


@pytest.mark.parametrize("rows, columns", PAIRS)
@pytest.mark.parametrize("shape", [(3, 50, 200), (1, 1, 17), (130, 24)])
def test_codes_and_scales(rows: str | None, columns: str | None, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[0] = 0  # rows that have no magnitude
    found = quantize.triton(x, rows, columns, None, False)
    expected = quantize.native(x, rows, columns, None, False)
    x_RC = x.reshape(-1, x.shape[-1])
    for name, matrix, f, e in (
        (rows, x_RC, found[:3], expected[:3]),
        (columns, x_RC.T, found[3:6], expected[3:6]),
    ):
        assert [(t.shape, t.dtype) for t in f] == [(t.shape, t.dtype) for t in e]
        if name is None:
            continue
        assert torch.equal(f[1], e[1])  # scales, bit for bit
        operand = Operand.parse(name)
        pad = f[0].shape[1] - matrix.shape[1]
        assert not f[0].float()[:, matrix.shape[1] :].any()
        amax = block_amax(matrix, *block_shape(operand.block, *matrix.shape))
        _, factor, _ = scale_blocks(amax, operand.scale, FORMATS[operand.format])
        scaled = torch.nn.functional.pad(matrix * factor, (0, pad))
        assert torch.equal(f[0].view(torch.uint8), interpreted(scaled.contiguous(), operand))


@pytest.mark.parametrize("rows, columns", PAIRS)
def test_what_needs_no_rounding_is_bit_identical(rows: str | None, columns: str | None) -> None:
    # Integers up to 7 times a power of two are values of both formats.
    x = torch.randint(-7, 8, (70, 150), generator=torch.Generator().manual_seed(0)).float()
    x[:, 3] = x[5] = 7
    found = quantize.triton(x, rows, columns, None, True)
    for f, e in zip(found, quantize.native(x, rows, columns, None, True), strict=True):
        assert f.dtype == e.dtype and torch.equal(f.float(), e.float())


@pytest.mark.parametrize("rows, columns", PAIRS)
def test_parts_that_are_reduced_first(
    rows: str | None, columns: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(130, 260, generator=torch.Generator().manual_seed(0))  # 3 x 3 tiles
    x[128, 258] = 50.0
    expected = quantize.triton(x, rows, columns, None, True)
    monkeypatch.setattr(magnitude_parts, "MOST_LINES", 1)
    monkeypatch.setattr(magnitude_parts, "MOST_TILES", 1)
    for f, e in zip(quantize.triton(x, rows, columns, None, True), expected, strict=True):
        assert torch.equal(f.view(torch.uint8), e.view(torch.uint8))


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "counts"), [(4608, 6144, 3456), (75_600, 13_824, 1)]
)
def test_parts_that_every_program_reads_are_bounded(
    num_rows: int, num_columns: int, counts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Casting:
        def __getitem__(self, grid: Any) -> Any:
            return lambda parts, **_: read.extend(parts[0].counts)

    monkeypatch.setattr(triton_quantize_group, "amax_kernel", MagicMock())
    monkeypatch.setattr(triton_quantize_group, "cast_kernel", Casting())
    x, operand = torch.empty(num_rows, num_columns, device="meta"), Operand.parse(PAIRS[0][0])
    triton_quantize_group.quantize([[x]], [(operand, operand)], [False], [UNWATCHED])
    assert read == [unspecialized(n) for n in (0, 0, counts)]


def test_strided_and_expanded_inputs() -> None:
    x = torch.randn(40, 96).T[:, ::2]
    for y in (x, torch.randn(1, 64).expand(50, 64), torch.randn(50, 1).expand(50, 64)):
        found = quantize.triton(y, "e4m3/row/pow2", "e4m3/tensor/fp32", None, False)
        expected = quantize.triton(y.contiguous(), "e4m3/row/pow2", "e4m3/tensor/fp32", None, False)
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(found[:6], expected[:6], strict=True)
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_becomes_nan(bad: float) -> None:
    x = torch.ones(20, 40)
    x[3, 5] = bad
    codes, scales, _, codes_t, scales_t, *_ = quantize.triton(
        x, "e4m3/row/pow2", "e4m3/tensor/fp32", None, False
    )
    assert codes.float()[3].isnan().all() and scales[3].isnan().all()
    assert not codes.float()[:3].isnan().any()
    assert codes_t.float()[:, :20].isnan().all() and scales_t.isnan().all()


def test_zeros_have_scale_one() -> None:
    found = quantize.triton(torch.zeros(20, 40), "e4m3/row/pow2", "e4m3/tensor/fp32", None, False)
    assert not found[0].float().any() and (found[1] == 1).all() and (found[4] == 1).all()


def test_other_blocks_are_emulated() -> None:
    x = torch.randn(8, 64)
    for name in ("e4m3/1x32/e8m0", "e2m1/1x16/two_level"):
        codes, scales, _ = quantize.triton(x, name, None, None, False)[:3]
        expected = quantize_matrix(x, Operand.parse(name))
        assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(scales.float(), expected.scales.float())


def test_a_gpu_without_fp8_casts_emulates(monkeypatch) -> None:
    # An A100 multiplies by emulation; its quantize raised Triton's CompilationError.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(quantize, "native", lambda *args: "emulated")
    with FakeTensorMode():
        x = torch.empty(16, 32, device="cuda")
        assert quantize.triton(x, "e4m3/row/fp32", None, None, False) == "emulated"


@pytest.mark.parametrize(
    "name", ["rows", "columns", "norm", "norm_columns", "activation", "activation_backward"]
)
def test_all_that_casts_emulates_on_a_gpu_without_fp8_casts(name: str, monkeypatch) -> None:
    """Weights, and producers that cast what they make."""
    module = quantize_group if name in ("rows", "columns") else quantized_producers
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(module, f"native_{name}", lambda *args: "emulated")
    with FakeTensorMode():
        x = torch.empty(16, 32, device="cuda")
        first = [x] if module is quantize_group else x
        num_others = {"rows": 2, "columns": 2, "activation_backward": 7}.get(name, 6)
        others = [x] * num_others
        if name == "norm":
            others = [x] * 11 + [torch.float32] * 2
        assert getattr(module, f"triton_{name}")(first, *others) == "emulated"
