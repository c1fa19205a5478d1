"""Quantization by a magnitude that is known beforehand: one pass, per provider."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import gated_activation, native_norm_modulate, quantize, quantize_group
from fxopt.kernels import quantized_producers as producers
from fxopt.kernels.counters import FIELDS
from tests.kernels.test_quantized_producers import (
    ACTIVATIONS,
    activation_arguments,
    draw,
    norm_arguments,
    same,
)

PROVIDERS = {"native": quantize.native, "triton": quantize.triton}
providers = pytest.mark.parametrize("provider", PROVIDERS)
FORMATS = ["e4m3/tensor/fp32", "e5m2/tensor/pow2"]
formats = pytest.mark.parametrize("name", FORMATS)
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def plain(x: Tensor, name: str, known: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x [R, C], its columns padded to 16, and their scale."""
    format, _, scale = name.split("/")
    factor = torch.tensor(LARGEST[format]) / known
    if scale == "pow2":
        factor = 2.0 ** factor.log2().floor()
    scaled = (x.float() * factor).clamp(-LARGEST[format], LARGEST[format])
    scaled[~x.isfinite()] = float("nan")
    padded = torch.nn.functional.pad(scaled, (0, -x.shape[-1] % 16))
    return padded.to(DTYPES[format]), (1 / factor).view(1, 1)


def codes(found: Tensor) -> Tensor:
    """Bytes, with one of those of NaN."""
    return found.view(torch.uint8).masked_fill(found.float().isnan(), 0x7F)


def agree(found: Any, x: Tensor, name: str, known: Tensor) -> bool:
    expected = plain(x, name, known)
    return same(codes(found[0]), codes(expected[0])) and torch.equal(found[1], expected[1])


def recorder() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def largest(seen: Tensor) -> float:
    return seen.view(torch.float32).item()


def numbers(*shape: int) -> Tensor:
    """Multiples of 1/8 that every factor here takes to values of both formats, whose rounding in
    the interpreter differs from the hardware's."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-7, 8, shape, generator=generator) / 4.0


# A power of two: scaled by one as well. Some of the numbers lie above it.
KNOWN = torch.tensor([1.0])


@formats
@pytest.mark.parametrize("wants_sum", [False, True])
@pytest.mark.parametrize("copies", ["both", "rows", "columns"])
@providers
def test_quantize(provider: str, copies: str, wants_sum: bool, name: str) -> None:
    x = numbers(70, 150).t()  # strided, several tiles, no multiples of 16
    known, seen = KNOWN * (448 / 512 if name.startswith("e4m3") else 57344 / 65536), recorder()
    rows, columns = (name if copies in ("both", c) else None for c in ("rows", "columns"))
    found = PROVIDERS[provider](x, rows, columns, None, wants_sum, None, None, known, seen)
    if rows:
        assert agree(found[:2], x, name, known)
    if columns:
        assert agree(found[3:5], x.t(), name, known)
    assert largest(seen) == x.abs().max() == 1.75
    if wants_sum:
        assert torch.equal(found[6], x.sum(0))  # exact in fp32
    assert found[6].numel() == (x.shape[1] if wants_sum else 0)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
@providers
def test_what_is_not_finite_is_nan_by_itself(provider: str, value: float) -> None:
    x, seen = numbers(20, 40), recorder()
    x[3, 5] = value
    found = PROVIDERS[provider](x, *FORMATS, None, False, None, None, KNOWN * 448 / 512, seen)
    for copy, place in ((found[0], (3, 5)), (found[3], (5, 3))):
        assert copy.float()[place].isnan() and copy.float().isnan().sum() == 1
    assert found[1].isfinite().all() and not seen.view(torch.float32).isfinite().any()


@providers
def test_what_is_far_too_large_saturates(provider: str) -> None:
    """And what is beyond fp32 when it is scaled is NaN, as if it were Inf."""
    x = torch.tensor([[3e5, -3e5, 1e-30, 3e38] + [0.0] * 12])
    known = torch.tensor([1e-30])
    found = PROVIDERS[provider](x, FORMATS[0], None, None, False, None, None, known, None)
    assert found[0].float()[0, :3].tolist() == [448.0, -448.0, 448.0]
    assert found[0].float()[0].isnan().nonzero().tolist() == [[3]]


@providers
def test_what_is_seen_is_the_largest_of_all_calls(provider: str) -> None:
    seen = recorder()
    for size, expected in ((2.0, 3.5), (1.0, 3.5), (4.0, 7.0)):
        x = numbers(20, 40) * size
        PROVIDERS[provider](x, FORMATS[0], None, None, False, None, None, None, seen)
        assert largest(seen) == expected


@providers
def test_counters_count_by_the_scale_that_is_used(provider: str) -> None:
    x, line = numbers(20, 40), torch.zeros(len(FIELDS), dtype=torch.int64)
    known = KNOWN * 448 / 512
    PROVIDERS[provider](x, FORMATS[0], None, None, False, line, None, known, None)
    found = dict(zip(FIELDS, line.tolist(), strict=True))
    assert found["saturated"] == (x.abs() > known).sum() > 0
    assert torch.tensor(found["amax"], dtype=torch.int32).view(torch.float32) == 1.75
    scale = torch.tensor(found["largest_scale"], dtype=torch.int32).view(torch.float32)
    assert scale == 1 / 512


@pytest.mark.parametrize("provider", ["native", "triton"])
def test_several_matrices(provider: str) -> None:
    xs = [numbers(70, 150), numbers(33, 40) * 2]
    knowns, seens = [KNOWN * 448 / 512, KNOWN * 448 / 256], [recorder(), recorder()]
    op = getattr(quantize_group, f"{provider}_rows")
    found = op(xs, FORMATS[0], None, None, knowns, seens)
    for x, known, seen, *copy in zip(xs, knowns, seens, found[0], found[1], strict=True):
        assert agree(copy, x, FORMATS[0], known) and largest(seen) == x.abs().max()
    columns = getattr(quantize_group, f"{provider}_columns")(xs, FORMATS[0], knowns)
    for x, known, *copy in zip(xs, knowns, *columns, strict=True):
        assert agree(copy, x.t(), FORMATS[0], known)


@formats
@pytest.mark.parametrize("case", ["modulated", "residual", "tokens"])
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_a_norm(provider: str, case: str, name: str) -> None:
    args = norm_arguments(case)
    if provider == "native":
        y, *kept = native_norm_modulate.forward(*args)
    else:
        from fxopt.kernels import triton_norm_modulate

        y, *kept = triton_norm_modulate.forward(*args)
    quantized, known, seen = PROVIDERS[provider], torch.tensor([1.3]), recorder()
    expected = quantized(y, name, name, None, False, None, None, known, None)
    found = getattr(producers, f"{provider}_norm")(*args, name, None, None, known, seen)
    assert same(found[0], expected[0]) and same(found[1], expected[1]) and not found[2].numel()
    assert all(torch.equal(f, k) for f, k in zip(found[3:], kept, strict=True))
    assert largest(seen) == y.abs().max() > 1.3
    h = found[3] if found[3].numel() else args[0]
    backward = (h, *args[3:7], *found[4:], *args[8:12], args[13], name, known)
    transposed = getattr(producers, f"{provider}_norm_columns")(*backward)
    assert same(transposed[0], expected[3]) and same(transposed[1], expected[4])


@formats
@pytest.mark.parametrize("case", ACTIVATIONS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_an_activation(provider: str, case: Any, name: str) -> None:
    args = activation_arguments(*case)
    gate, up, beside, *names = args
    forward = "native" if provider == "native" else "triton_forward"
    y = getattr(gated_activation, forward)(gate, up, *names)
    y = y if beside is None else torch.cat([beside, y], -1)
    known, seen = torch.tensor([1.3]), recorder()
    expected = PROVIDERS[provider](y, name, name, None, False, None, None, known, None)
    op = getattr(producers, f"{provider}_activation")
    found = op(*args, name, None, None, known, seen)
    assert same(found[0], expected[0]) and same(found[1], expected[1]) and not found[2].numel()
    assert largest(seen) == y.abs().max() > 1.3
    width = y.shape[-1] - (0 if beside is None else beside.shape[-1])
    grad = draw(3, 15, width, seed=3)
    backward = getattr(producers, f"{provider}_activation_backward")
    *_, codes_t, scales_t = backward(grad, *args, name, known)
    assert same(codes_t, expected[3]) and same(scales_t, expected[4])


@pytest.mark.parametrize("provider", ["native", "triton"])
def test_a_producer_makes_nan_of_what_is_not_finite(provider: str) -> None:
    args = activation_arguments("relu", "none", False, False)
    args[0][1, 2, 3] = float("inf")
    op = getattr(producers, f"{provider}_activation")
    found = op(*args, FORMATS[0], None, None, KNOWN, recorder())
    assert found[0].float().isnan().nonzero().tolist() == [[17, 3]]
    norm = norm_arguments("modulated")
    norm[0][1, 2, 3] = float("inf")
    op = getattr(producers, f"{provider}_norm")
    found = op(*norm, FORMATS[0], None, None, KNOWN, recorder())
    assert found[0].float()[23, :40].isnan().all() and found[0].float().isnan().sum() == 40


def test_opcheck() -> None:
    # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    x = numbers(20, 40)
    name, ops = FORMATS[0], torch.ops.fxopt
    of_input = (None, KNOWN, recorder(), None, None, None, None)
    norm, activation = norm_arguments("residual"), activation_arguments(*ACTIVATIONS[1])
    calls = [
        (ops.quantize_counting, (x, name, name, None, True, None, None, KNOWN, recorder())),
        (ops.quantize_rows_counting, ([x, x], name, None, None, [KNOWN] * 2, [recorder()] * 2)),
        (ops.norm_modulate_quantize_counting, (*norm, name, None, *of_input)),
        (ops.gated_activation_quantize_counting, (*activation, name, None, *of_input)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=checks[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@formats
def test_on_a_gpu(name: str) -> None:
    x, known, seen = draw(700, 1500), torch.tensor([1.3]), recorder().cuda()
    args = x.cuda(), name, name, None, True, None, None, known.cuda(), seen
    found = [t.cpu() for t in quantize.triton(*args)]
    assert agree(found[:2], x, name, known) and agree(found[3:5], x.t(), name, known)
    assert largest(seen.cpu()) == x.abs().max()
    # fp32 sums of 700 numbers of size one.
    torch.testing.assert_close(found[6], x.sum(0), rtol=1e-5, atol=1e-3)
