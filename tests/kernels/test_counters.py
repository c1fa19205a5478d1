"""What quantization counts, per provider, against counts made with numpy and ml_dtypes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxopt.kernels import gated_activation, native_norm_modulate, quantize, quantize_group
from fxopt.kernels import quantized_producers as producers
from fxopt.kernels.counters import FIELDS, MAGNITUDE
from fxopt.kernels.formats import FORMATS, block_shape
from fxopt.recipes import Operand
from tests.kernels.codes import draw, line
from tests.kernels.test_quantized_producers import (
    ACTIVATIONS,
    activation_arguments,
    norm_arguments,
)

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes, an independent oracle")
CODES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}
SPILLS = 8  # as `bench.static` allows
PAIRS = [
    ("e4m3/tensor/fp32", "e5m2/tensor/fp32"),
    ("e4m3/row/pow2", "e4m3/tensor/pow2"),
    ("e5m2/row/fp32", "e4m3/row/fp32"),
]
EMULATED = ["e4m3/1x32/e8m0", "e4m3/128x128/fp32", "e2m1/1x16/two_level"]


def read(counters: Tensor) -> dict[str, float]:
    """Counts as they are, magnitudes as numbers, infinite where they are not finite."""
    found: dict[str, float] = dict(zip(FIELDS, counters.tolist(), strict=True))
    found["least_scale"] = MAGNITUDE - found["least_scale"]
    for name in FIELDS[5:]:
        value = float(np.int32(found[name]).view(np.float32))
        found[name] = value if np.isfinite(value) else np.inf
    return found


def planted(num_rows: int = 70, num_columns: int = 150) -> Tensor:
    """Integers, of which some are far too small, zeros, a row of nothing else, one larger row.

    None lies where formats round to zero or not: Triton's interpreter rounds unlike the hardware.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-7, 8, (num_rows, num_columns), generator=generator).float()
    x[torch.rand(x.shape, generator=generator) < 0.2] *= 2.0**-40
    x[5] = 0
    x[7] *= 16
    return x


def factors(x: Any, operand: Operand) -> Iterator[tuple[Any, Any, Any]]:
    """(block of x, what it is multiplied by, what its codes are), in fp32."""
    largest = np.float32(FORMATS[operand.format].largest)
    rows, columns = block_shape(operand.block, *x.shape)
    whole = np.abs(x).max() / (largest * np.float32(448))
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], columns):
            block = x[r : r + rows, c : c + columns]
            amax = np.abs(block).max()
            if amax == 0:
                yield block, np.float32(1), np.float32(1)
                continue
            if not np.isfinite(amax):
                yield block, np.float32(np.nan), np.float32(np.nan)
                continue
            factor = largest / amax
            if operand.scale == "pow2":
                factor = np.float32(2.0) ** np.floor(np.log2(factor))
            if operand.scale == "e8m0":
                factor = np.float32(2.0) ** -np.ceil(np.log2(amax / largest))
            scale = np.float32(1) / factor
            if operand.scale == "two_level":
                stored = np.clip(amax / largest / whole, 2.0**-6, 448)
                scale = stored.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
                factor = np.float32(1) / scale
            yield block, factor, scale


def expected(x: Tensor, name: str) -> dict[str, float]:
    operand = Operand.parse(name)
    format, dtype = FORMATS[operand.format], getattr(ml_dtypes, CODES[operand.format])
    found = dict.fromkeys(FIELDS, 0.0) | {"samples": 1}
    scales = []
    for block, factor, scale in factors(x.numpy(), operand):
        scaled = block * factor
        codes = np.clip(scaled, -format.largest, format.largest).astype(dtype).astype(np.float32)
        found["nonzero"] += (block != 0).sum()
        found["underflowed"] += ((block != 0) & (codes == 0)).sum()
        # A value that rounding alone has taken beyond the largest one has lost nothing.
        found["saturated"] += (np.abs(scaled) > format.largest * (1 + 1e-6)).sum()
        found["nonfinite"] += (~np.isfinite(block)).sum()
        if (block != 0).any():
            scales.append(scale if np.isfinite(scale) else np.inf)
    amax = np.abs(x.numpy()).max()
    found["amax"] = amax if np.isfinite(amax) else np.inf
    found["least_scale"], found["largest_scale"] = min(scales), max(scales)
    return found


def agree(counters: Tensor, x: Tensor, name: str) -> dict[str, float]:
    found, wanted = read(counters), expected(x, name)
    for field, value in wanted.items():
        # Counts and magnitudes are exact; a scale is one or two divisions rounded to fp32.
        rtol = 3e-7 if field.endswith("scale") else 0
        np.testing.assert_allclose(found[field], value, rtol=rtol, err_msg=field)
    return found


@pytest.mark.parametrize("rows, columns", PAIRS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_both_copies(provider: str, rows: str, columns: str) -> None:
    x, lines = planted(), (line(), line())
    getattr(quantize, provider)(x, rows, columns, None, False, *lines)
    found = agree(lines[0], x, rows)
    assert found["underflowed"] > 0 and found["saturated"] == found["nonfinite"] == 0
    agree(lines[1], x.t().contiguous(), columns)


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_blocks(name: str) -> None:
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) ** 5
    x[3, 5] = 1e4
    counters = line()
    quantize.native(x, name, None, None, False, counters)
    found = agree(counters, x, name)
    # A scale of four bits that was rounded down leaves the largest value of its block outside.
    assert (found["saturated"] > 0) == (name == "e2m1/1x16/two_level")
    assert found["underflowed"] > 0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["e4m3/tensor/fp32", "e4m3/row/pow2"])
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_what_is_not_finite(provider: str, name: str, value: float) -> None:
    x, counters = planted(), line()
    x[11, 3] = value
    getattr(quantize, provider)(x, name, None, None, False, counters)
    found = read(counters)
    assert found["nonfinite"] == 1 and found["amax"] == found["largest_scale"] == np.inf
    # Where rows have scales of their own, the others lose what they lose without it.
    others = torch.cat([x[:11], x[12:]])
    lost = expected(others, name)["underflowed"] if "row" in name else 0
    assert found["underflowed"] == lost


@pytest.mark.parametrize("provider", ["native", "triton"])
def test_zeros_and_sums(provider: str) -> None:
    run, counters = getattr(quantize, provider), line()
    run(torch.zeros(3, 40), "e4m3/tensor/fp32", None, None, False, counters)
    assert counters.tolist() == [1, *[0] * 7]  # no scale: 1 is that of nothing
    for _ in range(2):
        run(planted(), "e4m3/tensor/fp32", None, None, False, counters)
    found, once = read(counters), expected(planted(), "e4m3/tensor/fp32")
    assert found["samples"] == 3 and found["underflowed"] == 2 * once["underflowed"]
    assert found["amax"] == once["amax"]


def test_magnitudes_from_elsewhere_saturate_and_show() -> None:
    x, counters = planted(), line()
    amax_t = torch.tensor([7.0])
    quantize_group.triton_columns([x], "e4m3/tensor/fp32", [amax_t], [counters])
    assert read(counters)["saturated"] == (x.abs() > 7).sum()


@pytest.mark.parametrize("rows, columns", PAIRS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_groups(provider: str, rows: str, columns: str) -> None:
    xs = [planted(), planted(17, 200) * 3, planted(9, 16)]
    by_row, by_column = (
        getattr(quantize_group, f"{provider}_{name}") for name in ("rows", "columns")
    )
    lines, lines_t = [line() for _ in xs], [line() for _ in xs]
    amax_t = by_row(xs, rows, columns, lines)[2]
    by_column(xs, columns, amax_t, lines_t)
    for x, counters, counters_t in zip(xs, lines, lines_t, strict=True):
        agree(counters, x, rows)
        agree(counters_t, x.t().contiguous(), columns)


@pytest.mark.parametrize("rows, columns", PAIRS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_producers_count_what_quantize_counts_of_their_result(
    provider: str, rows: str, columns: str
) -> None:
    alone = getattr(quantize, provider)
    run = {
        name: getattr(producers, f"{provider}_{name}")
        for name in ("norm", "norm_columns", "activation", "activation_backward")
    }
    args, found, wanted = norm_arguments("modulated"), (line(), line()), (line(), line())
    amax_t, _, mean, rstd = run["norm"](*args, rows, columns, found[0])[2:]
    if provider == "triton":
        from fxopt.kernels import triton_norm_modulate

        y = triton_norm_modulate.forward(*args)[0]
    else:
        y = native_norm_modulate.forward(*args)[0]
    after = (args[0], *args[3:7], mean, rstd, *args[8:12], args[13], columns, amax_t)
    run["norm_columns"](*after, found[1])
    alone(y, rows, columns, None, False, *wanted)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])

    case, found, wanted = activation_arguments(*ACTIVATIONS[1]), (line(), line()), (line(), line())
    gate, up, beside, *names = case
    make = gated_activation.triton_forward if provider == "triton" else gated_activation.native
    y = torch.cat([beside, make(gate, up, *names)], -1)
    amax_t = run["activation"](*case, rows, columns, found[0])[2]
    run["activation_backward"](draw(3, 15, 24, seed=3), *case, columns, amax_t, found[1])
    alone(y, rows, columns, None, False, *wanted)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_kernels_that_count_compile_to_integer_atomics() -> None:
    # Those that do not count are in `bench.static`, and have none.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def compile_kernels() -> None:
    """Compile the kernels that cast as for a GPU and look at their atomics."""
    from bench.calls import randn
    from bench.launches import Case
    from bench.static import compiled, resources

    name, norm = "e4m3/row/pow2", ("layer", 1e-6, 0.0, 1.0, torch.bfloat16)

    def run(batch: int, num_tokens: int, width: int) -> None:
        x, row = randn(batch, num_tokens, width), randn(batch, 1, width)
        quantize.triton(x, name, "e4m3/tensor/fp32", None, False, line(), line())
        quantize_group.triton_rows([row, row], name, name, [line(), line()])
        given = x, None, None, None, None, row, row, None, *norm, torch.bfloat16
        *_, mean, rstd = producers.triton_norm(*given, name, None, line())
        amax_t = randn(1).float()
        after = (x, None, None, row, row, mean, rstd, *norm[:4], torch.bfloat16)
        producers.triton_norm_columns(*after, "e4m3/tensor/fp32", amax_t, line())
        case = x, None, None, "silu", "none"
        producers.triton_activation(*case, name, None, line())
        producers.triton_activation_backward(x, *case, "e4m3/tensor/fp32", amax_t, line())

    found = compiled(Case("counters", run, (3072,)), 3072, 90)
    casts = {"cast_kernel", "rows_kernel", "tiles_kernel", "backward_kernel"}
    assert casts <= {launch.split()[0] for launch in found}
    for launch, binaries in found.items():
        kernel = launch.split()[0]  # behind it a number, where there are several
        for binary in binaries.values():
            atomics = set(re.findall(r"\b(?:red|atom)\.\S*\.(\w+) ", binary.asm["ptx"]))
            assert atomics == ({"u64", "s64"} if kernel in casts else set()), (kernel, atomics)
            assert ".f64" not in binary.asm["ptx"], "a double slipped into the arithmetic"
            assert resources(binary.asm["cubin"])[1] <= SPILLS, kernel


def test_codes_are_the_same_and_the_schema_says_what_is_written() -> None:
    x, op = planted(), torch.ops.fxopt.quantize_counting.default
    plain = torch.ops.fxopt.quantize(x, *PAIRS[1], None, True)
    counted = op(x, *PAIRS[1], None, True, line(), line(), None, None)
    for p, c in zip(plain, counted, strict=True):
        assert torch.equal(p.view(torch.uint8), c.view(torch.uint8))
    written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["counters", "counters_t", "seen"]
    assert not torch.ops.fxopt.quantize.default._schema.is_mutable  # for compilers
    for name, args in (
        ("quantize_counting", (x, *PAIRS[0], None, True, line(), line(), None, None)),
        ("quantize_rows_counting", ([x, x], *PAIRS[0], [line(), line()], None, None)),
    ):
        # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
        checks = ("test_faketensor", "test_autograd_registration")
        torch.library.opcheck(getattr(torch.ops.fxopt, name), args, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows, columns", PAIRS)
def test_on_a_gpu(rows: str, columns: str) -> None:
    x, lines = planted(700, 1500), (line().cuda(), line().cuda())
    quantize.triton(x.cuda(), rows, columns, None, False, *lines)
    agree(lines[0].cpu(), x, rows)
    agree(lines[1].cpu(), x.t().contiguous(), columns)


if __name__ == "__main__":
    compile_kernels()
