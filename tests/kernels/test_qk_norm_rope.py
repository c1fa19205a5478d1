"""`fxopt::qk_norm_rope` against its reference, eager PyTorch, and the Triton interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.qk_norm_rope import (
    QKNormRope,
    native,
    native_backward,
    qk_norm_rope,
    qk_norm_rope_backward,
    reference,
)

EPS = 1e-6


@dataclasses.dataclass
class Case:
    """One call of the op: `args` in the schema's order, `grad` of its output."""

    norm: str = "rms"
    across_heads: bool = False
    rotation: str = "interleaved"
    pair_tables: bool = False
    sections: str = "one"  # "one", "two", or "text": the second section has no tables
    dtype: torch.dtype = torch.float32
    affine: str = "weight"  # "weight", "weight+bias" or "none"
    weight_offset: float = 0.0
    shape: tuple[int, int, int, int] = (2, 3, 2, 24)
    seed: int = 0

    def section(self, generator: torch.Generator, num_tokens: int, tables: bool) -> list[Any]:
        batch, _, heads, dim = self.shape

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        width = heads * dim if self.across_heads else dim
        x = randn(batch, num_tokens, heads, dim).to(self.dtype)
        weight = randn(width).to(self.dtype) if "weight" in self.affine else None
        bias = randn(width).to(self.dtype) if "bias" in self.affine else None
        angle = randn(1, num_tokens, 1, dim // 2 if self.pair_tables else dim) * 3
        table_dtype = torch.promote_types(self.dtype, torch.float32)
        cos, sin = (t.to(table_dtype) if tables else None for t in (angle.cos(), angle.sin()))
        return [x, weight, bias, cos, sin]

    @property
    def args(self) -> list[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        first = self.section(generator, self.shape[1], True)
        second = (
            [None] * 5
            if self.sections == "one"
            else self.section(generator, 2, self.sections == "two")
        )
        scalars = [self.norm, EPS, 3 * EPS, self.weight_offset, self.across_heads, self.rotation]
        return [*first, *second, *scalars, self.dtype]

    @property
    def grad(self) -> Tensor:
        out = reference(*self.args)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def to_double(args: list[Any]) -> list[Any]:
    return [
        a.double() if isinstance(a, Tensor) else torch.float64 if isinstance(a, torch.dtype) else a
        for a in args
    ]


def results(function: Any, args: list[Any], grad: Tensor) -> list[Tensor]:
    """[output, gradient of every x, weight and bias that is there]."""
    leaves = [
        t.detach().requires_grad_() if i % 5 < 3 and t is not None else t
        for i, t in enumerate(args[:10])
    ]
    out = function(*leaves, *args[10:])
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, grad)]


def fused(*args: Any) -> Tensor:
    return qk_norm_rope(*args)[0]


def eager(*args: Any) -> Tensor:
    """The op as diffusers' FLUX writes it, or, for what FLUX lacks, in the same manner."""
    from diffusers.models.embeddings import apply_rotary_emb

    norm, eps, eps2, weight_offset, across_heads, rotation, _ = args[10:]
    parts = []
    for (x, weight, bias, cos, sin), section_eps in ((args[:5], eps), (args[5:10], eps2)):
        if x is None:
            continue
        n = x.flatten(2) if across_heads else x
        if weight is not None and weight_offset:
            weight = weight_offset + weight
        if norm == "layer":
            n = F.layer_norm(n, n.shape[-1:], weight, bias, section_eps)
        else:
            n = _diffusers_rms_norm(n, weight, bias, section_eps) if norm == "rms" else n
            if norm == "none" and weight is not None:
                n = n * weight
            if norm == "none" and bias is not None:
                n = n + bias
        n = n.view(x.shape)
        if rotation != "none" and cos is not None:
            if cos.shape[-1] < x.shape[-1]:
                cos, sin = (
                    t.repeat_interleave(2, -1)
                    if rotation == "interleaved"
                    else torch.cat([t, t], -1)
                    for t in (cos, sin)
                )
            unbind_dim = -1 if rotation == "interleaved" else -2
            tables = (cos[0, :, 0], sin[0, :, 0])
            n = apply_rotary_emb(n, tables, use_real_unbind_dim=unbind_dim, sequence_dim=1)
        parts.append(n)
    return torch.cat(parts, 1)


def _diffusers_rms_norm(x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    from diffusers.models.normalization import RMSNorm

    module = RMSNorm(x.shape[-1], eps, elementwise_affine=weight is not None, bias=bias is not None)
    # Plain attributes in place of the parameters, so that autograd reaches the caller's leaves.
    for name, value in (("weight", weight), ("bias", bias)):
        module._parameters.pop(name, None)
        setattr(module, name, value)
    return module(x)


def rms_error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).square().mean().sqrt().item()


NORMS = ["rms", "layer", "none"]
ROTATIONS = ["interleaved", "half", "none"]
SECTIONS = ["one", "two", "text"]
ACROSS = pytest.mark.parametrize("across_heads", [False, True], ids=["per_head", "across_heads"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("affine", ["none", "weight", "weight+bias"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@ACROSS
@pytest.mark.parametrize("norm", NORMS)
def test_error_is_at_most_twice_that_of_eager(norm, across_heads, rotation, affine, dtype):
    for pair_tables, sections in itertools.product([False, True], SECTIONS):
        case = Case(norm, across_heads, rotation, pair_tables, sections, dtype, affine)
        # Enough rows for the error of a gradient sum to be a mean and not one draw.
        case.shape = (2, 32, 4, 24)
        args, grad = case.args, case.grad
        exact = results(reference, to_double(args), grad.double())
        ours = results(fused, args, grad)
        theirs = results(eager, args, grad)
        for o, t, e in zip(ours, theirs, exact, strict=True):
            assert o.dtype == dtype and o.shape == e.shape
            # The project's rule is 2x. Where eager's few operations are exact by luck (a sum of
            # two, a product with 1), half an ulp of the result's size is allowed.
            half_ulp = torch.finfo(dtype).eps / 2 * e.square().mean().sqrt().item()
            assert rms_error(o, e) <= 2 * max(rms_error(t, e), half_ulp)


@pytest.mark.parametrize("sections", SECTIONS)
@pytest.mark.parametrize("pair_tables", [False, True], ids=["full_tables", "pair_tables"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@ACROSS
@pytest.mark.parametrize("norm", NORMS)
def test_fp64_agrees_with_the_reference(norm, across_heads, rotation, pair_tables, sections):
    for offset, affine in ((0.0, "none"), (1.0, "weight"), (0.0, "weight+bias")):
        case = Case(
            norm, across_heads, rotation, pair_tables, sections, torch.float64, affine, offset
        )
        ours = results(fused, case.args, case.grad)
        # assert_close's own fp64 tolerance: any step in fp32 would be 1e-8 off.
        torch.testing.assert_close(
            ours, results(reference, case.args, case.grad), rtol=1e-11, atol=1e-11
        )
        assert all(t.dtype == torch.float64 for t in ours)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rotation", ["interleaved", "half"])
def test_gradcheck(norm, rotation):
    args = Case(norm, False, rotation, False, "text", torch.float64, "weight+bias").args
    x, weight, bias, x2, weight2, bias2 = (args[i].requires_grad_() for i in (0, 1, 2, 5, 6, 7))

    def out(x, weight, bias, x2, weight2, bias2):
        return fused(x, weight, bias, *args[3:5], x2, weight2, bias2, *args[8:])

    assert torch.autograd.gradcheck(out, (x, weight, bias, x2, weight2, bias2), fast_mode=True)


def triton_results(args: list[Any], grad: Tensor, needs: list[bool]) -> Any:
    """(Triton's outputs and gradients, native's), the gradients from the same statistics."""
    from fxopt.kernels import triton_qk_norm_rope

    out, mean, rstd = triton_qk_norm_rope.forward(*args)
    rest = (*args[:10], mean, rstd, *args[10:], needs)
    ours = [out, mean, rstd, *triton_qk_norm_rope.backward(grad, *rest)]
    return ours, [*native(*args), *native_backward(grad, *rest)]


def assert_triton_matches_native(case: Case, args: list[Any] | None = None, grad: Any = None):
    args = case.args if args is None else args
    grad = case.grad if grad is None else grad
    needs = [t is not None for t in (*args[:3], *args[5:8])]
    ours, expected = triton_results(args, grad, needs)
    for o, e in zip(ours, expected, strict=True):
        assert o.shape == e.shape and o.dtype == e.dtype
        # fp32 sums in another order: a few ulp of values up to 10; fp16: one ulp of rounding.
        tolerance = 2e-5 if o.dtype == torch.float32 else 2 * torch.finfo(o.dtype).eps
        torch.testing.assert_close(o, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rotation", ROTATIONS)
@ACROSS
@pytest.mark.parametrize("norm", NORMS)
def test_triton_agrees_with_native(norm, across_heads, rotation):
    # Over these six every pair of (table width, sections, affine, dtype) occurs.
    for pair_tables, sections, affine, dtype in (
        (False, "one", "weight", torch.float32),
        (False, "two", "weight+bias", torch.float16),
        (False, "text", "none", torch.float32),
        (True, "one", "weight+bias", torch.float16),
        (True, "two", "none", torch.float32),
        (True, "text", "weight", torch.float16),
    ):
        assert_triton_matches_native(
            Case(norm, across_heads, rotation, pair_tables, sections, dtype, affine, 1.0)
        )


@pytest.mark.parametrize("dim", [16, 24, 64, 96, 128])
@pytest.mark.parametrize("batch, tokens, heads", [(1, 1, 1), (3, 2, 5), (1, 9, 24)])
def test_head_dims_and_small_shapes(dim, batch, tokens, heads):
    for rotation, across_heads in (("interleaved", False), ("half", True)):
        case = Case(rotation=rotation, across_heads=across_heads, shape=(batch, tokens, heads, dim))
        assert_triton_matches_native(case)
        ours = results(fused, case.args, case.grad)
        # fp32 against fp64: 100 ulp of gradients that sum up to 9 tokens and 24 heads.
        exact = results(reference, to_double(case.args), case.grad.double())
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


def strided_args(layout: str) -> list[Any]:
    """`Case().args` with other memory: same values seen through a view."""
    args = Case(pair_tables=layout == "complex_tables", sections="two").args
    x, weight, _, cos, sin = args[:5]
    batch, tokens, heads, dim = x.shape
    if layout == "merged_projection":
        merged = torch.randn(batch, tokens, 3, heads, dim)
        merged[:, :, 1] = x
        args[0] = merged[:, :, 1]
    elif layout == "heads_first":
        args[0] = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "last_dim_strided":
        args[0] = x.transpose(1, 3).contiguous().transpose(1, 3)
        args[1] = torch.stack([weight, weight], -1)[:, 0]
    elif layout == "expanded":
        args[0] = x[:1, :1].expand(x.shape)
    elif layout == "complex_tables":
        args[3], args[4] = torch.view_as_real(torch.complex(cos, sin)).unbind(-1)
    elif layout == "tables_per_head":
        args[3], args[4] = (t * torch.randn(batch, 1, heads, 1) for t in (cos, sin))
    elif layout == "tables_without_batch":
        args[3], args[4] = cos[0].expand(tokens, heads, dim), sin[0]
    return args


LAYOUTS = [
    "merged_projection",
    "heads_first",
    "last_dim_strided",
    "expanded",
    "complex_tables",
    "tables_per_head",
    "tables_without_batch",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout):
    args = strided_args(layout)
    case = Case(sections="two")
    assert_triton_matches_native(case, args)
    ours = results(fused, args, case.grad)
    assert ours[0].is_contiguous() and ours[1].is_contiguous()
    # fp32 against fp64: a few ulp of values up to 10.
    exact = results(reference, to_double(args), case.grad.double())
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("norm", NORMS)
@ACROSS
@pytest.mark.parametrize("layout", ["sdpa", "expanded"])
def test_strided_gradients(norm, across_heads, layout):
    case = Case(norm, across_heads, sections="two")
    grad = case.grad
    if layout == "sdpa":
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        grad = torch.ones(()).expand(grad.shape)
    assert_triton_matches_native(case, grad=grad)
    exact = results(reference, to_double(case.args), grad.double())
    # fp32 against fp64: a few ulp of values up to 10.
    torch.testing.assert_close(
        results(fused, case.args, grad), exact, rtol=1e-5, atol=1e-5, check_dtype=False
    )


def test_triton_keeps_fp64():
    from fxopt.kernels import triton_qk_norm_rope

    args = Case("layer", dtype=torch.float64, sections="text", affine="weight+bias").args
    out, _, _ = triton_qk_norm_rope.forward(*args)
    # fp64 has 16 digits; any step in fp32 would be 1e-8 off.
    torch.testing.assert_close(out, reference(*args), rtol=1e-12, atol=1e-12)


def test_triton_offsets_pass_int32():
    from fxopt.kernels import triton_qk_norm_rope

    # Three tokens 2^30 elements apart; the untouched pages between them are never allocated.
    args = Case(dtype=torch.float16, shape=(1, 3, 1, 16)).args
    storage = torch.empty(2**31 + 16, dtype=torch.float16)
    far = storage.as_strided(args[0].shape, (0, 2**30, 16, 1))
    far.copy_(args[0])
    near = triton_qk_norm_rope.forward(*args)
    assert torch.equal(triton_qk_norm_rope.forward(far, *args[1:])[0], near[0])
    rest = (*args[1:10], *near[1:], *args[10:], [True, True, False] * 2)
    grad = torch.ones_like(near[0])
    for a, b in zip(
        triton_qk_norm_rope.backward(grad, far, *rest),
        triton_qk_norm_rope.backward(grad, args[0], *rest),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_no_tokens():
    for norm in NORMS:
        case = Case(norm, sections="two", shape=(2, 0, 2, 24))
        args = case.args
        args[5] = args[5][:, :0]
        args[8:10] = (t[:, :0] for t in args[8:10])
        out, dx, dweight, _, _ = results(fused, args, torch.empty(2, 0, 2, 24))
        assert out.shape == dx.shape == (2, 0, 2, 24)
        assert torch.equal(dweight, torch.zeros(24))


def test_a_second_backward_is_refused():
    args = Case().args
    x = args[0].requires_grad_()
    out = fused(*args)
    grad = torch.ones_like(out).requires_grad_()
    (dx,) = torch.autograd.grad(out, x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_needed_gradients_are_computed(norm):
    case = Case(norm, sections="two", affine="weight+bias", shape=(1, 2, 1, 16))
    args, grad = case.args, case.grad
    everything = triton_results(args, grad, [True] * 6)
    for wanted in range(6):
        needs = [i == wanted for i in range(6)]
        for some, all_of_them in zip(triton_results(args, grad, needs), everything, strict=True):
            assert [g.numel() > 0 for g in some[3:]] == needs
            assert torch.equal(some[3 + wanted], all_of_them[3 + wanted])


def test_mixed_dtypes():
    case = Case(dtype=torch.bfloat16, sections="two")
    args = case.args
    args[1], args[3] = args[1].float(), args[3].bfloat16()
    args[-1] = torch.float16
    grad = case.grad.half()
    ours = results(fused, args, grad)
    assert [t.dtype for t in ours] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    for o, e in zip(ours, results(reference, to_double(args), grad.double()), strict=True):
        # One rounding to the result's own dtype, of a value that fp32 has right to 1e-6.
        torch.testing.assert_close(o.double(), e, rtol=torch.finfo(o.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("norm, rotation", zip(NORMS, ROTATIONS, strict=True))
def test_opcheck(norm, rotation):
    for sections, across_heads, affine in (("one", False, "none"), ("text", True, "weight+bias")):
        case = Case(norm, across_heads, rotation, sections=sections, affine=affine)
        args = case.args
        _, mean, rstd = native(*args)
        needs = [t is not None for t in (*args[:3], *args[5:8])]
        rest = (*args[:10], mean, rstd, *args[10:], needs)
        torch.library.opcheck(qk_norm_rope_backward, (case.grad, *rest))
        for i in (0, 1, 2, 5, 6, 7):
            args[i] = None if args[i] is None else args[i].requires_grad_()
        torch.library.opcheck(qk_norm_rope, tuple(args))


def test_saves_its_inputs_and_statistics_only():
    args = Case(dtype=torch.bfloat16).args
    leaves = [args[0].requires_grad_(), args[1].requires_grad_(), *args[3:5]]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, _, rstd = QKNormRope.apply(*args)
    inputs = {t.data_ptr() for t in (*leaves, rstd)}
    assert {t.data_ptr() for t in saved if t.numel()} == inputs


def test_a_table_that_requires_grad_is_refused():
    args = Case().args
    args[3].requires_grad_()
    with pytest.raises(ValueError, match="detach the tables"):
        qk_norm_rope(*args)


def test_triton_compiles_without_a_gpu():
    """sm_80 and sm_90: no spills, no float atomics, no fp64, one binary for all row counts."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


class Target:
    """Stands in for Triton's CUDA driver, so that a launch specialises and compiles as on a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """A kernel whose launch only compiles, and keeps what it compiled."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.binaries = kernel, {}

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            binary = self.kernel.run(*args, grid=grid, warmup=True, **options)
            self.binaries[binary.hash] = binary

        return launch


def register_spills(ptx: str, capability: int) -> int:
    import re
    import tempfile

    import triton

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", file.name]
        log = subprocess.run(
            [*command, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    return sum(map(int, re.findall(r"(\d+) bytes spill", log.stderr)))


def compile_for(capability: int) -> None:
    import re

    import triton

    from fxopt.kernels import triton_qk_norm_rope as provider

    triton.runtime.driver.set_active(Target(capability))
    jitted = provider._forward, provider._backward
    for norm, across_heads, rotation, heads in (
        ("rms", False, "interleaved", 24),
        ("rms", True, "interleaved", 40),
        ("layer", False, "half", 40),
        ("layer", True, "half", 24),
    ):
        provider._forward, provider._backward = kernels = [CompileOnly(k) for k in jitted]
        for batch, tokens in ((1, 64), (2, 63), (3, 1)):
            case = Case(norm, across_heads, rotation, False, "text", torch.bfloat16)
            case.shape = (batch, tokens, heads, 128)
            triton_results(case.args, case.grad, [True, True, False] * 2)
        for kernel in kernels:
            (binary,) = kernel.binaries.values()
            ptx = binary.asm["ptx"]
            assert not re.search(r"\b(red|atom)\.|\.f64", ptx)
            assert register_spills(ptx, capability) == 0
    provider._forward, provider._backward = jitted


if __name__ == "__main__":
    for sm in (80, 90):
        compile_for(sm)
