"""sum_parts: one rounding, by both providers."""

from __future__ import annotations

import pytest
import torch

from fxopt.kernels.sum_parts import native, sum_parts, triton

# The interpreter cuts bfloat16 off instead of rounding it.
CASES = [(triton, dtype) for dtype in (torch.float32, torch.float16)]
CASES += [(native, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("provider, dtype", CASES)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_error_is_that_of_one_rounding(provider, dtype: torch.dtype, num_parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(7, 300, generator=generator).to(dtype) for _ in range(num_parts)]
    exact = sum(p.double() for p in parts)
    found = provider(parts)
    assert found.dtype == dtype
    # Half a step between values of the dtype, and the sum's own roundings in fp32.
    slack = num_parts * torch.finfo(torch.float32).eps * sum(p.double().abs() for p in parts)
    assert ((found - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all()
    assert all(found.data_ptr() != p.data_ptr() for p in parts)


def test_empty_and_opcheck() -> None:
    assert triton([torch.ones(0, 3)] * 2).shape == (0, 3)
    torch.library.opcheck(sum_parts, ([torch.ones(3, 4), torch.ones(3, 4)],))


def test_fp64_stays_fp64() -> None:
    parts = [torch.tensor([1.0], dtype=torch.float64), torch.tensor([1e-12], dtype=torch.float64)]
    assert triton(parts).item() == 1.0 + 1e-12
