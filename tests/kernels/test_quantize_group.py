"""quantize_rows and quantize_columns: each matrix of a group as quantize makes it alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import quantize
from fxopt.kernels import quantize_group as op

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


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


@pytest.mark.parametrize("rows, columns", FORMATS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_each_is_as_alone(provider: str, rows: str, columns: str | None) -> None:
    alone = getattr(quantize, provider)
    in_rows, in_columns = (getattr(op, f"{provider}_{name}") for name in ("rows", "columns"))
    expected = [alone(x, rows, columns, None, False) for x in group()]
    codes, scales, amax_t = in_rows(group(), rows, columns)
    for i, e in enumerate(expected):
        assert torch.equal(bits(codes[i]), bits(e[0])) and torch.equal(scales[i], e[1])
        assert torch.equal(amax_t[i], op.amax_for(group()[i], columns))
    if columns is not None:
        codes, scales = in_columns(group(), columns, amax_t)
        for i, e in enumerate(expected):
            assert torch.equal(bits(codes[i]), bits(e[3])) and torch.equal(scales[i], e[4])


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


@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_compile_without_a_gpu(capability: int) -> None:
    # Its own process: here Triton interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def compile_kernels(capability: int) -> None:
    """Compile for four bf16 weights of 3072 columns and look at what came out."""
    from fxopt.kernels import triton_quantize_group as kernels

    absent = None, None, "*i32"
    copy, missing = ("*u8", "*fp32"), (None, None)
    sizes = ("i32", "i32", "i32")  # how many parts
    padded = ("i32", "i32", None, None)  # and no counters
    for kernel, behind in (
        (kernels.amax_kernel, absent),
        (kernels.cast_kernel, (*sizes, *absent, *copy, *missing, "*i32", *padded)),
        (kernels.cast_kernel, (*sizes, None, "*i32", None, *missing, *copy, None, *padded)),
    ):
        ptx, spilled = compiled(kernel, behind, capability)
        assert not re.search(r"\b(red|atom)\.", ptx), "atomics"
        assert ".f64" not in ptx, "a double slipped into the arithmetic"
        assert "ld.global.v4.b32" in ptx, "narrow access"
        assert spilled == 0, "register spills"


def compiled(kernel: Any, behind: tuple[str | None, ...], capability: int) -> tuple[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fxopt.kernels import triton_quantize as launch
    from fxopt.recipes import Operand
    from tests.kernels.test_quantized_producers import spilled_bytes

    operand = Operand.parse("e4m3/row/pow2")
    constants = launch.settings(operand, operand) | {
        "BLOCK_R": launch.BLOCK_R,
        "BLOCK_C": launch.BLOCK_C,
        "CHUNK": launch.CHUNK,
    }
    matrix: tuple[str | None, ...] = ("*bf16", "i32", None, "i32", "i32", *behind)
    signature = {"matrices": (tuple(t or "constexpr" for t in matrix),) * 4}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for k in range(4):
        for j, kind in enumerate(matrix):
            if kind is None:
                constexprs[0, k, j] = 1 if j == 2 else None
            else:
                attributes[0, k, j] = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names[1:], start=1):
        signature[name], constexprs[i,] = "constexpr", constants[name]  # type: ignore[assignment]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": launch.NUM_WARPS}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return found.asm["ptx"], spilled_bytes(found.asm["cubin"])


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]))
