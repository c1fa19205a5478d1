"""norm_modulate_segments that writes codes: bit for bit what quantize makes of its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import norm_modulate_segments as segments
from fxopt.kernels import norm_modulate_segments_quantize as op
from fxopt.kernels import quantize
from fxopt.kernels.quantize import amax_for
from fxopt.kernels.registration import LAUNCHES, REREADS
from tests.kernels.codes import FORMATS, draw, line, same

B, S, K, N = 2, 21, 40, 3


def index_of(*shape: int, high: int = N) -> Tensor:
    return torch.randint(-high, high, shape, generator=torch.Generator().manual_seed(7))


def arguments(case: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of norm_modulate_segments; widths that pad."""
    x, absent = draw(B, S, K).to(dtype), None
    tables = [draw(B, N, K, seed=1), draw(N, 2 * K, seed=2)[:, :K]]
    if case == "modulated":
        given = [x, *[absent] * 4, *tables, absent, index_of(B, S), False]
    elif case == "residual":
        gate = draw(1, N, K, seed=4)
        weights = [draw(K, seed=5), draw(K, seed=6)]
        given = [x, draw(B, S, K, seed=3).to(dtype), gate, *weights, *tables, draw(K, seed=8)]
        given += [index_of(S), False]
    elif case == "a shift per token":  # strided, two rows by a condition
        x = draw(S, B, K).to(dtype).transpose(0, 1)
        two = draw(2, K, seed=1)
        given = [x, *[absent] * 4, two, draw(B, S, K, seed=2), absent, index_of(B, S) > 0, True]
    else:  # a gate alone
        given = [x, x.flip(0), tables[0], *[absent] * 5, index_of(B, S), False]
    norm = "rms" if case == "a shift per token" else "layer"
    return [*given, norm, 1e-5, 1.0, 1.0, dtype, dtype]


# All formats of one, and of the others rows with scales of their own and one scale for all.
CASES = [("residual", *formats) for formats in FORMATS]
for case in ("modulated", "a shift per token", "a gate"):
    CASES += [(case, *FORMATS[0]), (case, *FORMATS[1])]


def of_backward(args: list[Any], found: Any, columns: str) -> tuple[Any, ...]:
    """Arguments of the transposed copy, as the backward has them."""
    _, _, amax_t, h, mean, rstd = found
    h = h if h.numel() else args[0]
    norm, eps, weight_offset, scale_offset, _, dtype = args[10:]
    settings = norm, eps, weight_offset, scale_offset, dtype
    return h, *args[3:7], *args[8:10], mean, rstd, *settings, columns, amax_t


PROVIDERS: dict[str, tuple[Any, ...]] = {
    "native": (segments.native_forward, quantize.native, op.native, op.native_columns),
    "triton": (segments._triton, quantize.triton, op.triton, op.triton_columns),
}


@pytest.mark.parametrize("case, rows, columns", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_codes(provider: str, case: str, rows: str, columns: str | None) -> None:
    normed, quantized, codes_of, columns_of = PROVIDERS[provider]
    args = arguments(case)
    y, *kept = normed(*args)
    expected = quantized(y, rows, columns, None, False)
    found = codes_of(*args, rows, columns)
    assert same(found[0], expected[0]) and same(found[1], expected[1])
    for f, k in zip(found[3:], kept, strict=True):
        assert torch.equal(f, k)
    if columns is None:
        assert not found[2].numel()
        return
    assert torch.equal(found[2], amax_for(y, columns))
    transposed = columns_of(*of_backward(args, found, columns))
    assert same(transposed[0], expected[3]) and same(transposed[1], expected[4])


def test_bfloat16() -> None:
    """What is rounded to the model's dtype first; Triton's interpreter rounds to it otherwise."""
    args, (rows, columns) = arguments("residual", torch.bfloat16), FORMATS[1]
    y = segments.native_forward(*args)[0]
    expected = quantize.native(y, rows, columns, None, False)
    found = op.native(*args, rows, columns)
    transposed = op.native_columns(*of_backward(args, found, columns))
    for f, i in ((found[0], 0), (found[1], 1), (transposed[0], 3), (transposed[1], 4)):
        assert same(f, expected[i])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_counters_and_a_scale_that_is_known(provider: str) -> None:
    normed, quantized, codes_of, columns_of = PROVIDERS[provider]
    args, name = arguments("residual"), "e4m3/tensor/fp32"
    y, lines = normed(*args)[0], [line() for _ in range(4)]
    known, seen = torch.tensor([1.3]), torch.zeros(1, dtype=torch.int32)
    expected = quantized(y, name, name, None, False, *lines[:2], known, None)
    found = codes_of(*args, name, None, lines[2], known, seen)
    transposed = columns_of(*of_backward(args, (*found[:2], known, *found[3:]), name), lines[3])
    assert same(found[0], expected[0]) and same(transposed[0], expected[3])
    assert torch.equal(lines[0], lines[2]) and torch.equal(lines[1], lines[3])
    assert seen.view(torch.float32) == y.abs().max() > 1.3


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_token_without_a_row_is_nan(provider: str) -> None:
    *_, codes_of, columns_of = PROVIDERS[provider]
    args, (rows, columns) = arguments("modulated"), FORMATS[1]
    args[8] = index_of(B, S).clone()
    args[8][1, 2], args[8][0, 3] = N, -N - 1
    found = codes_of(*args, rows, columns)
    is_nan = torch.zeros(B * S, dtype=torch.bool)
    is_nan[[S + 2, 3]] = True
    assert torch.equal(found[0][:, :K].float().isnan(), is_nan[:, None].expand(-1, K))
    codes_t, _ = columns_of(*of_backward(args, found, columns))
    assert codes_t[:, : B * S].float()[:, is_nan].isnan().all()


def test_no_tokens() -> None:
    args = arguments("modulated")
    args[0], args[8] = args[0][:, :0], args[8][:, :0]
    found = op.triton(*args, *FORMATS[1])
    assert found[0].shape[0] == 0 and found[3].shape == (0,)


@pytest.mark.parametrize("rows, columns", FORMATS[:3])
def test_opcheck_and_launches(rows: str, columns: str | None) -> None:
    # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
    checks = ("test_faketensor", "test_autograd_registration")
    args = arguments("residual")
    codes, codes_t = op.norm_modulate_segments_quantize, op.norm_modulate_segments_quantize_columns
    torch.library.opcheck(codes, (*args, rows, columns), test_utils=checks)
    found = codes(*args, rows, columns)
    if columns is not None:
        given = of_backward(args, found, columns)
        torch.library.opcheck(codes_t, given, test_utils=checks)
    name, casts_later = "fxopt::norm_modulate_segments_quantize", "tensor" in rows
    # One scale for all takes a second launch, and so do the magnitudes of columns.
    assert LAUNCHES[name](*args, rows, columns) == 1 + (columns is not None or casts_later)
    assert bool(REREADS[name]((*args, rows, columns), found)) == casts_later
