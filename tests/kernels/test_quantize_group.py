"""quantize_rows and quantize_columns: each matrix of a group as quantize makes it alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.kernels import quantize
from fxopt.kernels import quantize_group as op
from tests.kernels.codes import same

FORMATS = [
    ("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
    ("e4m3/row/pow2", "e4m3/row/pow2"),
    ("e4m3/row/fp32", "e5m2/tensor/pow2"),
    ("e4m3/row/pow2", None),
]


def group() -> list[Tensor]:
    """Of several sizes and strides; one has leading dims, one zeros."""
    torch.manual_seed(0)
    return [
        torch.randn(70, 40),
        torch.randn(260, 200).T,
        torch.randn(3, 20, 136),
        torch.zeros(5, 16),
    ]


@pytest.mark.parametrize("rows, columns", FORMATS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_each_is_as_alone(provider: str, rows: str, columns: str | None) -> None:
    alone = getattr(quantize, provider)
    in_rows, in_columns = (getattr(op, f"{provider}_{name}") for name in ("rows", "columns"))
    expected = [alone(x, rows, columns, None, False) for x in group()]
    codes, scales, amax_t = in_rows(group(), rows, columns)
    for i, e in enumerate(expected):
        assert same(codes[i], e[0]) and torch.equal(scales[i], e[1])
        assert torch.equal(amax_t[i], op.amax_for(group()[i], columns))
    if columns is not None:
        codes, scales = in_columns(group(), columns, amax_t)
        for i, e in enumerate(expected):
            assert same(codes[i], e[3]) and torch.equal(scales[i], e[4])


def test_empty_and_opcheck() -> None:
    xs = [torch.randn(4, 32), torch.zeros(0, 32)]
    found = op.triton_rows(xs, *FORMATS[1])
    assert found[0][1].shape == (0, 32)
    assert op.triton_columns(xs, "e4m3/row/pow2", found[2])[0][1].shape == (32, 0)
    # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
    checks = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.quantize_rows, (xs, *FORMATS[1]), test_utils=checks)
    args = (xs, "e4m3/row/pow2", found[2])
    torch.library.opcheck(op.quantize_columns, args, test_utils=checks)
