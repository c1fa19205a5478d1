"""Activations packed in 8 bits: codes, scales and what they stand for, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fxopt.kernels import saving
from fxopt.kernels.saving import pack, unpack

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes, an independent oracle")

BF16 = torch.bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def native_pack(x: Tensor, num_row_dims: int) -> list[Tensor]:
    return saving.native_pack([x], num_row_dims)


def native_unpack(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return saving.native_unpack([codes], [scales], [saving.name_of(dtype)])[0]


def triton_pack(x: Tensor, num_row_dims: int) -> list[Tensor]:
    return saving.triton_pack([x], num_row_dims)


def triton_unpack(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return saving.triton_unpack([codes], [scales], [saving.name_of(dtype)])[0]


def emulated(x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and the fp32 values that they stand for, of rows, block after block."""
    rows = x.float().numpy().reshape(-1, x.shape[-1])
    codes = np.empty(rows.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty((len(rows), -(-rows.shape[1] // 128)), np.float32)
    values = np.empty(rows.shape, np.float32)
    for i in range(len(rows)):
        for j in range(scales.shape[1]):
            block = slice(128 * j, 128 * j + 128)
            amax = np.abs(rows[i, block]).max()
            factor = np.float32(448) / amax if amax else np.float32(1)
            scales[i, j] = np.float32(1) / factor
            codes[i, block] = (rows[i, block] * factor).astype(ml_dtypes.float8_e4m3fn)
            values[i, block] = codes[i, block].astype(np.float32) * scales[i, j]
    return codes, scales, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 128, 130, 5120])
def test_codes_scales_and_values(width: int, dtype: torch.dtype) -> None:
    x = normal(2, 3, width, dtype=dtype) * torch.tensor([1e-4, 1.0, 300.0])[:, None]
    x = x.to(dtype)
    x[0, 0, :100] = 0
    codes, scales, values = emulated(x)
    found, found_scales = native_pack(x, 1)
    assert found.shape == x.shape and found_scales.shape == (2, 3, -(-width // 128))
    assert np.array_equal(found.view(torch.uint8).numpy().ravel(), codes.view(np.uint8).ravel())
    assert np.array_equal(found_scales.numpy().ravel(), scales.ravel())
    restored = native_unpack(found, found_scales, dtype)
    assert torch.equal(restored, torch.from_numpy(values).view(x.shape).to(dtype))
    # Half a step of three stored bits of mantissa, or of the block's least numbers; and the
    # rounding to the dtype, of which the least numbers have fewer bits.
    info = torch.finfo(dtype)
    step = torch.from_numpy(np.repeat(scales, 128, 1)[:, :width].copy()).view(x.shape)
    error, size = (restored.double() - x.double()).abs(), x.double().abs()
    bound = torch.maximum((2.0**-4 + info.eps) * size, 1.01 * 2.0**-10 * step.double())
    assert (error <= bound + info.tiny * info.eps).all()


@pytest.mark.parametrize("provider", [native_pack, triton_pack])
def test_blocks_of_zeros_and_what_is_not_finite(provider: Callable[..., Any]) -> None:
    x = torch.ones(4, 300)
    x[1, :128], x[2, 130], x[3, 299] = 0, float("nan"), -float("inf")
    codes, scales = provider(x, 1)
    assert scales[1, 0] == 1 and not codes[1, :128].float().any()
    restored = native_unpack(codes, scales, torch.float32)
    expected = x.clone()
    expected[2, 128:256] = expected[3, 256:] = float("nan")
    assert torch.equal(restored.isnan(), expected.isnan())
    # 1 is the largest of each block, and comes back but for the rounding of the scale.
    torch.testing.assert_close(restored, expected, equal_nan=True, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_number_does_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((1, 128), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(native_unpack(*native_pack(x, 1), dtype), x)


@pytest.mark.parametrize("shape", [(3, 50, 200), (1, 8), (70, 130), (0, 16), (33, 256)])
def test_triton(shape: tuple[int, ...]) -> None:
    # Integers up to 7 need no rounding, which the interpreter does unlike the hardware.
    x = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0)).float()
    x[..., ::64] = 7
    codes, scales = triton_pack(x, 1)
    for found, expected in zip((codes, scales), native_pack(x, 1), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found.float(), expected.float())
    assert torch.equal(triton_unpack(codes, scales, torch.float32), x)
    values = normal(*shape)
    assert torch.equal(triton_pack(values, 1)[1], native_pack(values, 1)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_reads_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN, which the interpreter does not know; scales carry it
    codes = codes.view(torch.float8_e4m3fn).repeat(2, 1)
    scales = torch.tensor([[1.0, 0.3], [2.0**-12, 77.7]])
    found, expected = (f(codes, scales, dtype) for f in (triton_unpack, native_unpack))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("provider", [native_pack, triton_pack])
def test_strides_and_rows_of_two_dims(provider: Callable[..., Any]) -> None:
    joint = torch.randint(-7, 8, (2, 5, 3, 4, 48), generator=torch.Generator().manual_seed(0))
    for x in (joint[:, :, 1].float(), joint.float()[:, :, 1], joint.float().transpose(1, 3)[:, 1]):
        x = x.clone().copy_(x).mul_(1) if x.is_contiguous() else x
        x.select(-1, 0).fill_(7)
        for num_row_dims in (1, 2):
            codes, scales = provider(x, num_row_dims)
            width = x.shape[-num_row_dims:].numel()
            assert codes.shape == x.shape and codes.is_contiguous()
            assert scales.shape == (*x.shape[:-num_row_dims], -(-width // 128))
            assert torch.equal(native_unpack(codes, scales, torch.float32), x)


@pytest.mark.parametrize("provider", [saving.native_pack, saving.triton_pack])
def test_several_at_once(provider: Callable[..., Any]) -> None:
    shapes = [(3, 40, 130), (0, 16), (1, 300), (70, 8)]
    xs = [torch.randint(-7, 8, s, generator=torch.Generator().manual_seed(0)) for s in shapes]
    xs = [x.to(dtype) for x, dtype in zip(xs, (*DTYPES, torch.float32), strict=True)]
    found = provider(xs, 1)
    for x, scales in zip(xs, found[4:], strict=True):
        assert torch.equal(scales, native_pack(x, 1)[1])
    unpack = saving.triton_unpack if provider is saving.triton_pack else saving.native_unpack
    dtypes = ["float32"] * 4  # the interpreter cuts bfloat16 off instead of rounding it
    for i, restored in enumerate(unpack(found[:4], found[4:], dtypes)):
        assert torch.equal(restored, native_unpack(found[i], found[4 + i], torch.float32))


def test_opcheck_and_fakes() -> None:
    xs = [normal(2, 3, 130, dtype=BF16), normal(4, 5, 8)]
    found = pack(xs, 2)
    arguments = found[:2], found[2:], ["bfloat16", "float32"]
    # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
    checks = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(pack, (xs, 2), test_utils=checks)
    torch.library.opcheck(unpack, arguments, test_utils=checks)
    with FakeTensorMode() as mode:
        fakes = pack([mode.from_tensor(x) for x in xs], 2)
        restored = unpack(fakes[:2], fakes[2:], arguments[2])
    for f, t in zip((*fakes, *restored), (*found, *xs), strict=True):
        assert (f.shape, f.dtype) == (t.shape, t.dtype)
