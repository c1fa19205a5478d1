"""The loops in C++ of native providers: when they run, and what runs where they cannot.

How accurate they are the tests of each op say, whose native provider they are for fp32. Without a
C++ compiler these tests fail: loops that do not compile would otherwise be tested by none.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.kernels import cpp, native_gated_activation, native_norm_modulate, native_qk_norm_rope
from tests.backends.toys import stack, tokens
from tests.kernels import test_gated_activation as gated
from tests.kernels import test_norm_modulate as norms
from tests.kernels import test_qk_norm_rope as heads

F32 = torch.float32


@pytest.fixture
def in_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(cpp, "compiled", lambda: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the loops that run."""
    found: list[str] = []
    run = cpp.Loop.__call__

    def record(loop: cpp.Loop, *arguments: Any) -> None:
        found.append(loop.name)
        run(loop, *arguments)

    monkeypatch.setattr(cpp.Loop, "__call__", record)
    yield found


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is compiled yet, nor in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpp._compiled.cache_clear()
    yield
    cpp._compiled.cache_clear()


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def norm(gate: Tensor, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    """Outputs of norm_modulate, and of its backward."""
    x, residual = normal(2, 300, 96, dtype=dtype), normal(2, 300, 96, dtype=dtype)
    scale, shift = (t.to(dtype) for t in normal(2, 1, 192).chunk(2, -1))
    operands = (gate, None, None, scale, shift, None)
    constants = ("layer", 1e-6, 0.0, 1.0, dtype, dtype)
    y, h, mean, rstd = native_norm_modulate.forward(x, residual, *operands, *constants)
    saved = (h, x, *operands, mean, rstd, "layer", 0.0, 1.0, dtype)
    return y, h, *native_norm_modulate.backward(y, h, *saved, [True] * 8, True)


def activation(dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    gate, bias = normal(2, 300, 96, dtype=dtype), normal(96, dtype=dtype)
    settings = "gelu_tanh", "none"
    y = native_gated_activation.native(gate, None, *settings, bias)
    return y, *native_gated_activation.native_backward(y, gate, None, *settings, True, bias, True)


def queries(dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    x, weight, bias = normal(2, 300, 4, 32, dtype=dtype), normal(32).to(dtype), normal(128)
    tables = normal(300, 1, 32), normal(300, 1, 32)
    inputs = [x], [bias.to(dtype)], [weight], [None], *([t] for t in tables)
    settings = [1], "rms", [1e-6], 0.0, False, "half", "channels", "all", dtype
    out, mean, rstd = native_qk_norm_rope.forward(*inputs, *settings)
    needs = [True, True, True, False]
    return out, *native_qk_norm_rope.backward([out], *inputs, mean, rstd, *settings, needs)


GATE = normal(2, 1, 96)
OPS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "norm_modulate": functools.partial(norm, GATE),
    "gated_activation": activation,
    "qk_norm_rope": queries,
}


@pytest.mark.parametrize("name", OPS)
def test_fp32_on_a_cpu_goes_through_a_loop(name: str, calls: list[str]) -> None:
    OPS[name]()
    assert calls == [name, f"{name}_backward"]


@pytest.mark.parametrize(
    "run",
    [
        functools.partial(norm, GATE.bfloat16(), torch.bfloat16),
        functools.partial(norm, GATE.double(), torch.float64),
        functools.partial(norm, normal(2, 300, 96)),  # a gate per token
        functools.partial(queries, torch.float16),
    ],
)
def test_what_no_loop_is_for(run: Callable[[], Any], calls: list[str]) -> None:
    run()
    assert calls == []


@pytest.mark.parametrize("name", OPS)
def test_results_do_not_depend_on_threads(name: str) -> None:
    found, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(OPS[name]())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_threads_are_those_of_pytorch() -> None:
    """A second OpenMP runtime would have threads of its own. Alone: scikit-learn brings one."""
    code = """
from pathlib import Path
from fxopt.kernels import cpp
assert cpp.compiled() is not None
maps = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "1"


@pytest.mark.usefixtures("in_aten")
class TestInAten:
    """The same ops without a compiler, by the tests of each."""

    @pytest.mark.parametrize("name", OPS)
    def test_no_loop_runs(self, name: str, calls: list[str]) -> None:
        OPS[name]()
        assert calls == []

    def test_norm_modulate(self) -> None:
        norms.test_native_is_as_accurate_as_eager(F32)
        norms.test_long_reductions_are_as_accurate_as_eager(F32)
        norms.test_any_strides("native")

    @pytest.mark.parametrize("form", gated.FORMS)
    @pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
    def test_gated_activation(self, activation: str, form: str) -> None:
        gated.test_error_is_within_twice_that_of_eager("native", activation, form, F32)
        gated.test_recomputed_output_is_the_forward_bit_for_bit("native", activation, form, F32)

    @pytest.mark.parametrize("rotation", ["interleaved", "half", "none"])
    @pytest.mark.parametrize("norm", ["rms", "layer", "none"])
    def test_qk_norm_rope(self, norm: str, rotation: str) -> None:
        for across_heads in (False, True):
            check = heads.test_error_is_at_most_twice_that_of_eager
            check(norm, across_heads, rotation, "x_bias+weight", F32)


@pytest.mark.usefixtures("uncompiled")
def test_without_a_compiler_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = fxopt.optimize(stack())
    model(tokens(2)).sum().backward()
    assert "no C++ compiler" in str(cpp.why_not())
    assert str(cpp.why_not()) in " ".join(str(fxopt.report(model)).split())


@pytest.mark.usefixtures("uncompiled")
def test_a_compiler_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    activation()
    assert "does not compile the loops" in str(cpp.why_not())


@pytest.mark.usefixtures("uncompiled")
def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = cpp._built(cpp.compiler())
    monkeypatch.setattr(cpp, "_run", lambda *command: pytest.fail(f"{command} ran"))
    assert cpp._built(cpp.compiler()) == first
    assert isinstance(cpp.compiled(), ctypes.CDLL) and cpp.why_not() is None


def test_what_has_no_values_of_its_own_is_not_read(calls: list[str]) -> None:
    """A tensor that PyTorch negates where it is read, as the imaginary part of a conjugate."""
    negated = torch.complex(GATE, GATE).conj().imag
    assert negated.is_neg()
    for found, expected in zip(norm(negated), norm(-GATE), strict=True):
        torch.testing.assert_close(found, expected)
    assert calls == ["norm_modulate", "norm_modulate_backward"]  # of the second alone


def test_sizes_that_do_not_fit_are_errors_of_aten() -> None:
    """No loop reads past the end of what is too small."""
    gate, settings = normal(2, 5, 8), ("gelu_tanh", "none")
    with pytest.raises(RuntimeError, match="size"):
        native_gated_activation.native(gate, None, *settings, normal(7))
    constants = "rms", 1e-6, 0.0, 1.0, F32, F32
    with pytest.raises(RuntimeError, match="size"):
        native_norm_modulate.forward(gate, normal(2, 4, 8), *[None] * 6, *constants)
    with pytest.raises(RuntimeError, match="size"):
        native_norm_modulate.forward(gate, None, None, normal(7), *[None] * 4, *constants)
    tables = [normal(4, 1, 8)]
    inputs = [normal(2, 5, 1, 8)], *([None] for _ in range(3)), tables, tables
    with pytest.raises(RuntimeError, match="size"):
        native_qk_norm_rope.forward(
            *inputs, [1], "rms", [1e-6], 0.0, False, "half", "channels", "all", F32
        )
