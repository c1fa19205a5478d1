"""`fxopt::qk_norm_rope` against its reference, eager PyTorch, and the Triton interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fxopt.kernels import native_qk_norm_rope
from fxopt.kernels.qk_norm_rope import (
    QKNormRope,
    qk_norm_rope,
    qk_norm_rope_backward,
    reference,
)

EPS = 1e-6
NUM_FIELDS = 6  # x, x_bias, weight, bias, cos, sin; the first four get gradients


@dataclasses.dataclass
class Case:
    """One call of the op: `args` in the schema's order, `grads` of its outputs.

    The queries have the heads of `shape`, the keys half as many.
    """

    norm: str = "rms"
    across_heads: bool = False
    rotation: str = "interleaved"
    tables: str = "channels"
    sections: str = "one"  # "one", "two", or "text": the second section has no tables
    dtype: torch.dtype = torch.float32
    affine: str = "weight"  # of "weight", "bias" and "x_bias", joined by "+"; or "none"
    weight_offset: float = 0.0
    shape: tuple[int, int, int, int] = (2, 3, 2, 24)
    seed: int = 0
    keys: bool = False
    joint_tables: bool = False
    rotated: float = 1.0  # the share of a head
    tokens: str = "all"  # or the "first" or "last": all but two, where there are as many

    def section(self, generator: torch.Generator, num_tokens: int, heads: int) -> list[Any]:
        batch, _, _, dim = self.shape

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        width = heads * dim if self.across_heads else dim
        affine = self.affine.split("+")
        x = randn(batch, num_tokens, heads, dim).to(self.dtype)
        x_bias = randn(heads * dim).to(self.dtype) if "x_bias" in affine else None
        weight = randn(width).to(self.dtype) if "weight" in affine else None
        bias = randn(width).to(self.dtype) if "bias" in affine else None
        return [x, x_bias, weight, bias]

    def cos_sin(self, generator: torch.Generator, num_tokens: int) -> list[Tensor]:
        dim = int(self.shape[-1] * self.rotated) // (2 if self.tables == "pairs" else 1)
        angle = torch.randn(1, num_tokens, 1, dim, generator=generator, dtype=torch.float64) * 3
        dtype = torch.promote_types(self.dtype, torch.float32)
        if self.tables == "matrices":
            matrices = angle.unflatten(-1, (-1, 2)).unsqueeze(-2).expand(*[-1] * 4, 2, 2)
            matrices = matrices + torch.tensor([[0.0, 1.0], [2.0, 3.0]])  # no rotations
            return [m.flatten(-2) for m in matrices.sin().to(dtype).unbind(-1)]
        return [angle.cos().to(dtype), angle.sin().to(dtype)]

    @property
    def args(self) -> list[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        lengths = [self.shape[1]] + [2] * (self.sections != "one")
        rows = [n if self.tokens == "all" else max(1, n - 2) for n in lengths]
        tables = [self.cos_sin(generator, n) for n in rows]
        if self.joint_tables:
            tables = [self.cos_sin(generator, sum(lengths))] * len(lengths)
        if self.sections == "text":
            tables[1] = [None, None]
        heads = [self.shape[2]] + [max(1, self.shape[2] // 2)] * self.keys
        sections = [
            [*self.section(generator, n, h), *t]
            for h in heads
            for n, t in zip(lengths, tables, strict=True)
        ]
        fields = [list(field) for field in zip(*sections, strict=True)]
        joined, eps = [len(lengths)] * len(heads), [EPS * (i + 1) for i in range(len(sections))]
        rotation = [self.rotation, self.tables, self.tokens]
        scalars = [self.weight_offset, self.across_heads, *rotation, self.dtype]
        return [*fields, joined, self.norm, eps, *scalars]

    @property
    def grads(self) -> list[Tensor]:
        outs = reference(*self.args)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
            for out in outs
        ]


def to_double(args: list[Any]) -> list[Any]:
    doubled = {torch.float16, torch.bfloat16, torch.float32}
    return tree_map(
        lambda a: a.double() if isinstance(a, Tensor) else torch.float64 if a in doubled else a,
        args,
    )


def present(args: list[Any]) -> list[bool]:
    """Which of x, x_bias, weight and bias are there: the `needs` of a full backward."""
    return [t is not None for field in args[:4] for t in field]


def results(function: Any, args: list[Any], grads: list[Tensor]) -> list[Tensor]:
    """[outputs, gradient of every x, x_bias, weight and bias that is there]."""
    leaves = [[t if t is None else t.detach().requires_grad_() for t in f] for f in args[:4]]
    outs = function(*leaves, *args[4:])
    wanted = [t for field in leaves for t in field if t is not None]
    return [*outs, *torch.autograd.grad(outs, wanted, grads)]


def fused(*args: Any) -> list[Tensor]:
    return qk_norm_rope(*args)[: len(args[NUM_FIELDS])]


def eager(*args: Any) -> list[Tensor]:
    """The op as diffusers' FLUX writes it, or, for what FLUX lacks, in the same manner."""
    joined, norm, eps, weight_offset, across_heads, rotation, form, tokens, _ = args[NUM_FIELDS:]
    parts = []
    for x, x_bias, weight, bias, cos, sin, section_eps in zip(*args[:NUM_FIELDS], eps, strict=True):
        n = x if x_bias is None else (x.flatten(2) + x_bias).view(x.shape)
        n = n.flatten(2) if across_heads else n
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
            width = cos.shape[-1] * (2 if form == "pairs" else 1)
            rows, others = cos.shape[1], n[:, :0]
            if tokens == "last":
                others, n = n.split([n.shape[1] - rows, rows], 1)
            elif tokens == "first":
                n, others = n.split([rows, n.shape[1] - rows], 1)
            turned = _eager_rotation(n[..., :width], cos, sin, rotation, form)
            n = torch.cat([turned, n[..., width:]], -1) if width < n.shape[-1] else turned
            n = (
                n
                if tokens == "all"
                else torch.cat([n, others][:: -1 if tokens == "last" else 1], 1)
            )
        parts.append(n)
    return [
        torch.cat(list(itertools.islice(iter(parts[sum(joined[:i]) :]), n)), 1)
        for i, n in enumerate(joined)
    ]


def _eager_rotation(n: Tensor, cos: Tensor, sin: Tensor, rotation: str, form: str) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    if form == "matrices":  # one product and one sum in fp32, as FLUX was first published
        split = (-1, 2) if rotation == "interleaved" else (2, -1)
        p, q = n.float().unflatten(-1, split).unbind(-1 if rotation == "interleaved" else -2)
        (pp, qp), (pq, qq) = (t.unflatten(-1, (-1, 2)).unbind(-1) for t in (cos, sin))
        members = [p * pp + q * pq, p * qp + q * qq]
        joined = torch.stack(members, -1) if rotation == "interleaved" else torch.cat(members, -1)
        return joined.view(n.shape).to(n.dtype)
    if form == "pairs":
        cos, sin = (
            t.repeat_interleave(2, -1) if rotation == "interleaved" else torch.cat([t, t], -1)
            for t in (cos, sin)
        )
    unbind_dim = -1 if rotation == "interleaved" else -2
    tables = (cos[0, :, 0], sin[0, :, 0])
    return apply_rotary_emb(n, tables, use_real_unbind_dim=unbind_dim, sequence_dim=1)


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
@pytest.mark.parametrize("affine", ["none", "weight", "weight+bias", "x_bias+weight"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@ACROSS
@pytest.mark.parametrize("norm", NORMS)
def test_error_is_at_most_twice_that_of_eager(norm, across_heads, rotation, affine, dtype):
    for tables, sections in itertools.product(["channels", "pairs"], SECTIONS):
        case = Case(norm, across_heads, rotation, tables, sections, dtype, affine)
        # Enough rows for the error of a gradient sum to be a mean and not one draw.
        case.shape, case.keys = (2, 32, 4, 24), tables == "pairs"
        assert_as_accurate_as_eager(case)


def assert_as_accurate_as_eager(case: Case) -> None:
    args, grads = case.args, case.grads
    exact = results(reference, to_double(args), [g.double() for g in grads])
    ours = results(fused, args, grads)
    theirs = results(eager, args, grads)
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert o.dtype == case.dtype and o.shape == e.shape
        # The project's rule is 2x. Where eager's few operations are exact by luck (a sum of
        # two, a product with 1), half an ulp of the result's size is allowed.
        half_ulp = torch.finfo(case.dtype).eps / 2 * e.square().mean().sqrt().item()
        assert rms_error(o, e) <= 2 * max(rms_error(t, e), half_ulp)


# What kernels and loops are compiled for, and others; all of a head rotated, or a part.
@pytest.mark.parametrize("rotated", [1.0, 0.5])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize("tables", ["channels", "pairs", "matrices"])
@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@ACROSS
def test_head_dims(across_heads, rotation, tables, head_dim, rotated):
    for norm, affine in (("rms", "weight"), ("layer", "weight+bias+x_bias"), ("none", "x_bias")):
        case = Case(norm, across_heads, rotation, tables, "two", torch.float32, affine)
        case.shape, case.rotated = (2, 32, 4, head_dim), rotated
        assert_as_accurate_as_eager(case)


@pytest.mark.parametrize("sections", SECTIONS)
@pytest.mark.parametrize("tables", ["channels", "pairs"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@ACROSS
@pytest.mark.parametrize("norm", NORMS)
def test_fp64_agrees_with_the_reference(norm, across_heads, rotation, tables, sections):
    for offset, affine in ((0.0, "none"), (1.0, "weight"), (0.0, "x_bias+weight+bias")):
        case = Case(norm, across_heads, rotation, tables, sections, torch.float64, affine, offset)
        case.keys = case.joint_tables = affine != "none"
        ours = results(fused, case.args, case.grads)
        # assert_close's own fp64 tolerance: any step in fp32 would be 1e-8 off.
        torch.testing.assert_close(
            ours, results(reference, case.args, case.grads), rtol=1e-11, atol=1e-11
        )
        assert all(t.dtype == torch.float64 for t in ours)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rotation", ["interleaved", "half"])
def test_gradcheck(norm, rotation):
    case = Case(norm, False, rotation, "channels", "text", torch.float64, "x_bias+weight+bias")
    case.keys = True
    args = case.args
    leaves = [t.requires_grad_() for field in args[:4] for t in field]

    def outs(*leaves):
        fields = [leaves[i : i + 4] for i in range(0, len(leaves), 4)]
        return tuple(fused(*fields, *args[4:]))

    assert torch.autograd.gradcheck(outs, leaves, fast_mode=True)


def triton_results(args: list[Any], grads: list[Tensor], needs: list[bool]) -> Any:
    """(Triton's outputs and gradients, native's), the gradients from the same statistics."""
    from fxopt.kernels import triton_qk_norm_rope

    found = triton_qk_norm_rope.forward(*args)
    rest = (*args[:NUM_FIELDS], *found[-2:], *args[NUM_FIELDS:], needs)
    ours = [*found, *triton_qk_norm_rope.backward(grads, *rest)]
    return ours, [*native_qk_norm_rope.forward(*args), *native_qk_norm_rope.backward(grads, *rest)]


def assert_triton_matches_native(case: Case, args: list[Any] | None = None, grads: Any = None):
    args = case.args if args is None else args
    grads = case.grads if grads is None else grads
    ours, expected = triton_results(args, grads, present(args))
    for o, e in zip(ours, expected, strict=True):
        assert o.shape == e.shape and o.dtype == e.dtype
        # fp32 sums in another order: a few ulp of values up to 10; fp16: one ulp of rounding.
        tolerance = 2e-5 if o.dtype == torch.float32 else 2 * torch.finfo(o.dtype).eps
        torch.testing.assert_close(o, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rotation", ROTATIONS)
@ACROSS
@pytest.mark.parametrize("norm", NORMS)
def test_triton_agrees_with_native(norm, across_heads, rotation):
    # Over these six every pair of (tables, sections, affine, dtype) occurs; the calls with one
    # table entry per pair have keys.
    calls = [
        ("channels", "one", "weight", torch.float32),
        ("channels", "two", "x_bias+weight+bias", torch.float16),
        ("channels", "text", "x_bias", torch.float32),
        ("pairs", "one", "x_bias+weight+bias", torch.float16),
        ("pairs", "two", "none", torch.float32),
        ("pairs", "text", "weight", torch.float16),
    ]
    # Two of them for each parameter set, and all for each value of a parameter.
    first = (NORMS.index(norm) + ROTATIONS.index(rotation) + across_heads) % 3
    for tables, sections, affine, dtype in calls[first::3]:
        case = Case(norm, across_heads, rotation, tables, sections, dtype, affine, 1.0)
        case.keys, case.joint_tables = tables == "pairs", affine == "none"
        assert_triton_matches_native(case)


@pytest.mark.parametrize("dim", [16, 24, 64, 96, 128])
@pytest.mark.parametrize("batch, tokens, heads", [(1, 1, 1), (3, 2, 5), (1, 9, 24)])
def test_head_dims_and_small_shapes(dim, batch, tokens, heads):
    for rotation, across_heads in (("interleaved", False), ("half", True)):
        case = Case(rotation=rotation, across_heads=across_heads, shape=(batch, tokens, heads, dim))
        case.affine, case.keys = "x_bias+weight", heads == 5
        assert_triton_matches_native(case)
        ours = results(fused, case.args, case.grads)
        # fp32 against fp64: 100 ulp of gradients that sum up to 9 tokens and 24 heads.
        exact = results(reference, to_double(case.args), [g.double() for g in case.grads])
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


def strided_args(layout: str) -> list[Any]:
    """`Case().args` with other memory: same values seen through a view."""
    tables = "pairs" if layout == "complex_tables" else "channels"
    args = Case(tables=tables, sections="two", affine="x_bias+weight").args
    x, weight, cos, sin = (args[i][0] for i in (0, 2, 4, 5))
    batch, tokens, heads, dim = x.shape
    if layout == "merged_projection":
        merged = torch.randn(batch, tokens, 3, heads, dim)
        merged[:, :, 1] = x
        args[0][0] = merged[:, :, 1]
    elif layout == "heads_first":
        args[0][0] = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "last_dim_strided":
        args[0][0] = x.transpose(1, 3).contiguous().transpose(1, 3)
        args[2][0] = torch.stack([weight, weight], -1)[:, 0]
        args[1][0] = args[1][0].repeat(2).view(2, -1).t().contiguous()[:, 0]
    elif layout == "expanded":
        args[0][0] = x[:1, :1].expand(x.shape)
    elif layout == "complex_tables":
        args[4][0], args[5][0] = torch.view_as_real(torch.complex(cos, sin)).unbind(-1)
    elif layout == "tables_per_head":
        args[4][0], args[5][0] = (t * torch.randn(batch, 1, heads, 1) for t in (cos, sin))
    elif layout == "tables_without_batch":
        args[4][0], args[5][0] = cos[0].expand(tokens, heads, dim), sin[0]
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
    ours = results(fused, args, case.grads)
    assert ours[0].is_contiguous() and ours[1].is_contiguous()
    # fp32 against fp64: a few ulp of values up to 10.
    exact = results(reference, to_double(args), [g.double() for g in case.grads])
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("norm", NORMS)
@ACROSS
@pytest.mark.parametrize("layout", ["sdpa", "expanded"])
def test_strided_gradients(norm, across_heads, layout):
    case = Case(norm, across_heads, sections="two", keys=True)
    if layout == "sdpa":
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in case.grads]
    else:
        grads = [torch.ones(()).expand(g.shape) for g in case.grads]
    assert_triton_matches_native(case, grads=grads)
    exact = results(reference, to_double(case.args), [g.double() for g in grads])
    # fp32 against fp64: a few ulp of values up to 10.
    torch.testing.assert_close(
        results(fused, case.args, grads), exact, rtol=1e-5, atol=1e-5, check_dtype=False
    )


def test_keys_of_other_tokens():
    """Cross-attention: the keys have their own batch, tokens and tables."""
    q, k = Case(shape=(2, 5, 4, 24)).args, Case("rms", shape=(1, 3, 2, 24), seed=1).args
    args = [[*q[i], *k[i]] for i in range(NUM_FIELDS)] + [[1, 1], "rms", [EPS, EPS], *q[9:]]
    grads = [torch.randn(x.shape) for x in args[0]]
    assert_triton_matches_native(Case(), args, grads)
    exact = results(reference, to_double(args), [g.double() for g in grads])
    # fp32 against fp64: a few ulp of values up to 10.
    torch.testing.assert_close(
        results(fused, args, grads), exact, rtol=1e-5, atol=1e-5, check_dtype=False
    )


def test_an_output_that_is_not_used():
    case = Case(sections="two", keys=True, affine="x_bias+weight")
    args = case.args
    leaves = [
        [t.requires_grad_() for t in field] if field[0] is not None else field for field in args[:4]
    ]
    wanted = [t for field in leaves for t in field if t is not None]
    out = qk_norm_rope(*args)[1]
    found = torch.autograd.grad(out, wanted, case.grads[1])
    none = torch.zeros_like(case.grads[0])
    expected = torch.autograd.grad(reference(*args), wanted, [none, case.grads[1]])
    # fp32 against fp32 in another order: a few ulp of values up to 10.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any(g.any() for g in found[:2])


def test_triton_keeps_fp64():
    from fxopt.kernels import triton_qk_norm_rope

    args = Case("layer", dtype=torch.float64, sections="text", affine="x_bias+weight+bias").args
    # fp64 has 16 digits; any step in fp32 would be 1e-8 off.
    torch.testing.assert_close(
        triton_qk_norm_rope.forward(*args)[:1], reference(*args), rtol=1e-12, atol=1e-12
    )


def test_triton_offsets_pass_int32():
    from fxopt.kernels import triton_qk_norm_rope

    # Three tokens 2^30 elements apart; the untouched pages between them are never allocated.
    args = Case(dtype=torch.float16, shape=(1, 3, 1, 16)).args
    storage = torch.empty(2**31 + 16, dtype=torch.float16)
    far = storage.as_strided(args[0][0].shape, (0, 2**30, 16, 1))
    far.copy_(args[0][0])
    near = triton_qk_norm_rope.forward(*args)
    assert torch.equal(triton_qk_norm_rope.forward([far], *args[1:])[0], near[0])
    rest = (*args[1:NUM_FIELDS], *near[1:], *args[NUM_FIELDS:], [True, False, True, False])
    grads = [torch.ones_like(near[0])]
    for a, b in zip(
        triton_qk_norm_rope.backward(grads, [far], *rest),
        triton_qk_norm_rope.backward(grads, args[0], *rest),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_no_tokens(norm):
    case = Case(norm, sections="two", shape=(2, 0, 2, 24), affine="x_bias+weight")
    args = case.args
    for field in (0, 4, 5):
        args[field][1] = args[field][1][:, :0]
    grads = [torch.empty(2, 0, 2, 24)]
    assert_triton_matches_native(case, args, grads)
    out, dx, _, dx_bias, _, dweight, _ = results(fused, args, grads)
    assert out.shape == dx.shape == (2, 0, 2, 24)
    assert torch.equal(dweight, torch.zeros(24)) and torch.equal(dx_bias, torch.zeros(48))


def test_a_second_backward_is_refused():
    args = Case().args
    x = args[0][0].requires_grad_()
    (out,) = fused(*args)
    grad = torch.ones_like(out).requires_grad_()
    (dx,) = torch.autograd.grad(out, x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_needed_gradients_are_computed(norm):
    case = Case(norm, sections="two", affine="x_bias+weight+bias", shape=(1, 2, 1, 16))
    args, grads = case.args, case.grads
    everything = triton_results(args, grads, [True] * 8)
    for wanted in range(8):
        needs = [i == wanted for i in range(8)]
        for some, all_of_them in zip(triton_results(args, grads, needs), everything, strict=True):
            assert [g.numel() > 0 for g in some[3:]] == needs
            assert torch.equal(some[3 + wanted], all_of_them[3 + wanted])


def test_mixed_dtypes():
    case = Case(dtype=torch.bfloat16, sections="two")
    args = case.args
    args[2][0], args[4][0] = args[2][0].float(), args[4][0].bfloat16()
    args[-1] = torch.float16
    grads = [g.half() for g in case.grads]
    ours = results(fused, args, grads)
    assert [t.dtype for t in ours] == [
        torch.float16,
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]
    exact = results(reference, to_double(args), [g.double() for g in grads])
    for o, e in zip(ours, exact, strict=True):
        # One rounding to the result's own dtype, of a value that fp32 has right to 1e-6.
        torch.testing.assert_close(o.double(), e, rtol=torch.finfo(o.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("norm, rotation", zip(NORMS, ROTATIONS, strict=True))
def test_opcheck(norm, rotation):
    for sections, across_heads, affine in (
        ("one", False, "none"),
        ("text", True, "x_bias+weight+bias"),
    ):
        case = Case(norm, across_heads, rotation, sections=sections, affine=affine)
        case.keys = across_heads
        args = case.args
        *_, mean, rstd = native_qk_norm_rope.forward(*args)
        rest = (*args[:NUM_FIELDS], mean, rstd, *args[NUM_FIELDS:], present(args))
        torch.library.opcheck(qk_norm_rope_backward, (case.grads, *rest))
        for t in (t for field in args[:4] for t in field if t is not None):
            t.requires_grad_()
        torch.library.opcheck(qk_norm_rope, tuple(args))


def test_saves_its_inputs_and_statistics_only():
    args = Case(dtype=torch.bfloat16, affine="x_bias+weight").args
    leaves = [t for field in args[:NUM_FIELDS] for t in field if t is not None]
    for t in leaves[:3]:
        t.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, _, rstd = QKNormRope.apply(*args)
    inputs = {t.data_ptr() for t in (*leaves, rstd)}
    assert {t.data_ptr() for t in saved if t.numel()} == inputs


@pytest.mark.parametrize("affine", ["none", "x_bias"])
def test_a_rotation_alone_keeps_no_input(affine: str):
    args = Case(norm="none", affine=affine).args
    xs = [x.requires_grad_() for x in args[0]]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outs = fused(*args)
    assert not {t.data_ptr() for t in xs} & {t.data_ptr() for t in saved}
    assert sum(t.untyped_storage().nbytes() for t in saved[: len(xs)]) < xs[0].nbytes
    torch.autograd.grad(outs, xs, [torch.ones_like(o) for o in outs])


def test_a_table_that_requires_grad_is_refused():
    args = Case().args
    args[0][0].requires_grad_()
    args[4][0].requires_grad_()
    with pytest.raises(ValueError, match="detach the tables"):
        qk_norm_rope(*args)


def test_backward_under_autocast():
    case = Case(sections="two", affine="x_bias+weight")
    expected = results(fused, case.args, case.grads)
    leaves = [[t if t is None else t.detach().requires_grad_() for t in f] for f in case.args[:4]]
    outs = fused(*leaves, *case.args[4:])
    wanted = [t for field in leaves for t in field if t is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(outs, wanted, case.grads)
    for e, f in zip(expected[len(outs) :], found, strict=True):
        assert torch.equal(e, f)
