"""norm_modulate_segments: values and gradients against fp64, for both providers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.diagnose.numerics import poisoned_allocations
from fxopt.kernels import triton_norm_modulate
from fxopt.kernels.norm_modulate_segments import (
    norm_modulate_segments,
    norm_modulate_segments_backward,
    reference,
)
from fxopt.kernels.norm_modulate_segments_linears import norm_modulate_segments_linears
from fxopt.kernels.registration import LAUNCHES
from tests.kernels.interpreted import LAYOUTS, Interpreted, laid_out
from tests.kernels.moved import launches
from tests.kernels.test_norm_modulate import EPS, OPERANDS, eager
from tests.numerics import assert_as_accurate
from tests.pairwise import pairwise

pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide")

N = 4  # rows of a table; 2 where the index is a condition
FORMS = (None, "table", "shared", "flat", "row", "feature")
INDICES = ("random", "alternating", "one segment", "one unused", "negative", "shared", "condition")
# Triton without bf16: the interpreter truncates where it should round.
DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16),
}
CASES = [
    {"provider": provider, **row}
    for provider, dtypes in DTYPES.items()
    for row in pairwise(
        norm=("layer", "rms", "none"),
        gate=("no residual", *FORMS),
        affine=((False, False), (True, False), (False, True), (True, True)),
        scale=FORMS,
        shift=(*FORMS, "token"),
        offset=(0.0, 1.0),
        biased=(False, True),
        index=INDICES,
        rows=((1, 1), (3, 5), (1, 9), (3, 1), (2, N)),  # batch, tokens
        num_features=(8, 24, 100),
        layout=LAYOUTS,
        grads=("contiguous", "transposed", "expanded"),
        dtype=dtypes,
    )
    # Some table is there, and used.
    if {"table", "shared", "flat"}
    & ({row["gate"]} if row["norm"] == "none" else {row["gate"], row["scale"], row["shift"]})
]


def operands(
    case: dict[str, Any], shape: tuple[int, int, int], num_segments: int = N, seed: int = 0
) -> list[Tensor | None]:
    """x, residual, gate, weight, bias, scale, shift and x's bias, of the forms named."""
    generator = torch.Generator().manual_seed(seed)
    B, S, D = shape
    shapes = {
        "token": (B, S, D),
        "table": (B, num_segments, D),
        "shared": (1, num_segments, D),
        "flat": (num_segments, D),
        "row": (B, 1, D),
        "feature": (D,),
    }
    gate, residual = case["gate"], None if case["gate"] == "no residual" else "token"
    weight, bias = ("feature" if present else None for present in case["affine"])
    scale, shift = case["scale"], case["shift"]
    if case["norm"] == "none":
        weight = bias = scale = shift = None
    x_bias = "feature" if case["biased"] and residual else None
    forms = ("token", residual, gate, weight, bias, scale, shift, x_bias)
    return [
        torch.randn(shapes[form], generator=generator) if form in shapes else None for form in forms
    ]


def indices(name: str, B: int, S: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    random = torch.randint(0, N, (B, S), generator=generator)
    return {
        "random": random,
        "alternating": torch.arange(B * S, dtype=torch.int32).view(B, S) % N,
        "one segment": torch.full((B, 1), N - 1).expand(B, S),
        "one unused": random.where(random != 1, 2).to(torch.uint8),
        "negative": (random - N).t().contiguous().t(),
        "shared": random[0],
        "condition": random[:, :, None].eq(0)[..., 0],
    }[name]


def written_out(
    tables: list[Tensor | None], index: Tensor, shift: str | None = None
) -> list[Tensor | None]:
    """The inputs as models look them up: by a `where` for each row of a table."""
    found = list(tables)
    for at in (2, 5) if shift == "token" else (2, 5, 6):
        table = found[at]
        if table is None or table.dim() == 1 or table.shape[-2] == 1:
            continue
        row = index.long().unsqueeze(-1) % table.shape[-2]
        found[at] = table[..., :1, :]
        for i in range(1, table.shape[-2]):
            found[at] = torch.where(row == i, table[..., i : i + 1, :], found[at])
    return found


def eager_outputs(inputs: list[Tensor | None], norm: str, offset: float) -> tuple[Tensor, ...]:
    """y and h as `eager` computes them, without a norm h alone."""
    if norm == "none":
        x, residual, gate, *_, x_bias = inputs
        x = x if x_bias is None else x + x_bias
        h = residual + (x if gate is None else gate * x)
        return h, h
    return eager(inputs, norm, offset)


@pytest.mark.parametrize("case", CASES, ids=lambda c: ", ".join(f"{k} {v}" for k, v in c.items()))
def test_values_and_gradients(case: dict[str, Any]) -> None:
    draw = partial(drawn, case)
    assert_as_accurate(*draw(0), what=str(case), again=draw)


def drawn(case: dict[str, Any], number: int) -> tuple[dict[str, Tensor], ...]:
    """Outputs and gradients of the op, of what models write, and in fp64."""
    dtype, norm, offset = case["dtype"], case["norm"], case["offset"]
    B, S = case["rows"]
    shape = (B, S, case["num_features"])
    inputs = operands(case, shape, 2 if case["index"] == "condition" else N, number)
    index = indices(case["index"], B, S)
    leaves = {n: t.to(dtype) for n, t in zip(OPERANDS, inputs, strict=True) if t is not None}
    leaves = {n: laid_out(t, case["layout"]) for n, t in leaves.items()}
    used = {"none": (1,)}.get(norm, (0, 1) if "residual" in leaves else (0,))

    def run(function: Any, leaves: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        outs = function([leaves.get(n) for n in OPERANDS])
        outs = [outs[i] for i in used]
        found = torch.autograd.grad(outs, [*leaves.values()], grads, allow_unused=True)
        named = {f"output {i}": out.detach() for i, out in zip(used, outs, strict=True)}
        return named | {f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}

    generator = torch.Generator().manual_seed(100 + number)
    grads = [torch.randn(shape, generator=generator).to(dtype) for _ in used]
    if case["grads"] == "expanded":  # over all rows: a layer norm maps a single value to zero
        grads = [grad[:1, :1].expand(grad.shape) for grad in grads]
    else:
        grads = [laid_out(grad, case["grads"]) for grad in grads]
    constants = case["shift"] == "token", norm, EPS, offset, 1.0
    exact = run(
        lambda t: reference(*t, index, *constants, torch.float64, torch.float64),
        {n: t.double() for n, t in leaves.items()},
        [grad.double() for grad in grads],
    )
    theirs = run(
        lambda t: eager_outputs(written_out(t, index, case["shift"]), norm, offset), leaves, grads
    )
    with Interpreted(case["provider"] == "triton"), poisoned_allocations():
        found = run(
            lambda t: norm_modulate_segments(*t, index, *constants, dtype, dtype), leaves, grads
        )
    return found, theirs, exact


def test_the_reference_is_what_models_write() -> None:
    case = {"norm": "layer", "gate": "table", "scale": "shared", "shift": "flat"}
    inputs = operands({**case, "affine": (True, True), "biased": True}, (3, 5, 8))
    inputs = [t.double() for t in inputs if t is not None]
    for name in INDICES[:-1]:
        index = indices(name, 3, 5)
        y, h = reference(
            *inputs, index, False, "layer", EPS, 0.0, 1.0, torch.float64, torch.float64
        )
        expected = eager(written_out(inputs, index), "layer", 0.0)
        # fp64, in another order.
        torch.testing.assert_close((y, h), expected, rtol=1e-12, atol=1e-12)


LONG = {
    "norm": "layer", "gate": "table", "affine": (True, True), "scale": "table", "shift": "shared",
    "biased": True,
}  # fmt: skip


def called(
    provider: str, shape: tuple[int, int, int], index: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """All outputs of forward and backward of LONG, whatever their memory held before."""
    inputs = [None if t is None else t.to(dtype) for t in operands(LONG, shape)]
    grads = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with Interpreted(provider == "triton"), poisoned_allocations():
        outs = norm_modulate_segments(*inputs, index, False, "layer", EPS, 0.0, 1.0, dtype, dtype)
        _, h, mean, rstd = outs
        saved = (h, inputs[0], *inputs[2:], index, False, mean, rstd)
        constants = "layer", 0.0, 1.0, dtype, [True] * 8, True
        return *outs, *norm_modulate_segments_backward(*grads, *saved, *constants)


@pytest.mark.parametrize("provider", DTYPES)
def test_runs_are_bit_equal(provider: str) -> None:
    index = indices("random", 2, 17)
    first, second = (called(provider, (2, 17, 24), index) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("num_programs", (1, 3, 100))
def test_sums_do_not_depend_on_what_a_program_gets(
    num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may get one token or all, of one segment or of many; partial sums stay few."""
    allocated: list[int] = []
    new_empty = Tensor.new_empty

    def noted(t: Tensor, *size: Any, **options: Any) -> Tensor:
        allocated.extend(size[1:2] if len(size) == 3 and size[0] == 4 else ())
        return new_empty(t, *size, **options)

    monkeypatch.setattr(triton_norm_modulate, "num_sms", lambda _: num_programs)
    row = {"programs": 1, "num_warps": 1, "pieces": 1}
    monkeypatch.setattr(triton_norm_modulate.triton_tables, "parameters", lambda *_: row)
    monkeypatch.setattr(Tensor, "new_empty", noted)
    for name in ("random", "one segment", "one unused"):
        index = indices(name, 2, 17)
        found = called("triton", (2, 17, 24), index)
        # fp32 sums of 34 terms of size 1 to 10 in another order.
        torch.testing.assert_close(
            found, called("native", (2, 17, 24), index), rtol=1e-5, atol=2e-4
        )
    assert allocated and max(allocated) <= num_programs + 2 * N - 1


@pytest.mark.parametrize("provider", DTYPES)
def test_a_row_that_no_token_has_gets_no_gradient(provider: str) -> None:
    *_, dgate, _, _, dscale, dshift, _, _ = called(provider, (2, 9, 24), torch.full((2, 9), 2))
    for grad in (dgate, dscale, dshift):
        others = torch.arange(N) != 2
        assert torch.equal(grad[:, others], torch.zeros_like(grad[:, others]))
        assert grad[:, 2].abs().min() > 0


@pytest.mark.parametrize("provider", DTYPES)
@pytest.mark.parametrize("num_features", (4104, 5120))
def test_rows_in_two_pieces(
    provider: str, num_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter takes its time by the program, of which 5,120 features would have 160.
    monkeypatch.setattr(triton_norm_modulate, "REDUCE_D", 512)
    index = indices("random", 1, 3)
    found = called(provider, (1, 3, num_features), index)
    exact = called("native", (1, 3, num_features), index, torch.float64)
    # fp32 sums of thousands of terms; values reach some tens.
    torch.testing.assert_close(
        [t.double() for t in found], [*map(Tensor.double, exact)], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("provider", DTYPES)
def test_no_rows(provider: str) -> None:
    for shape in ((2, 0, 24), (0, 3, 24)):
        index = torch.zeros(shape[:2], dtype=torch.int64)
        y, h, mean, rstd, dh, dx, *grads, again = called(provider, shape, index)
        assert {t.shape for t in (y, h, dh, dx, again)} == {torch.Size(shape)}
        assert mean.shape == rstd.shape == shape[:2]
        for grad, operand in zip(grads, operands(LONG, shape)[2:], strict=True):
            assert torch.equal(grad, torch.zeros_like(operand))


@pytest.mark.parametrize("provider", DTYPES)
def test_an_index_outside_the_table(provider: str) -> None:
    """Its token is NaN; the others are as without it, and nothing outside the table is read."""
    index = torch.tensor([[0, N, 1, -N - 1, 2**40]])
    found = called(provider, (1, 5, 24), index)
    expected = called(provider, (1, 5, 24), torch.tensor([[0, 0, 1, 0, 0]]))
    for i in (0, 1, 4, 5):  # y, h and their gradients
        assert torch.equal(found[i][:, [0, 2]], expected[i][:, [0, 2]])
        assert found[i][:, [1, 3, 4]].isnan().all()


def test_launches() -> None:
    found = launches(lambda: called("triton", (2, 9, 24), indices("random", 2, 9)))
    names = [launch.kernel for launch in found]
    assert names == ["forward_kernel", "order_kernel", "backward_kernel", "reduce_kernel"]
    count = LAUNCHES["fxopt::norm_modulate_segments_backward"]
    inputs = [None if t is None else t for t in operands(LONG, (2, 9, 24))]
    saved = (inputs[0], inputs[0], *inputs[2:], indices("random", 2, 9), False, None, None)
    assert count(None, inputs[0], *saved, "layer", 0.0, 1.0, None, [True] * 8, True) == 3
    assert count(None, inputs[0], *saved, "layer", 0.0, 1.0, None, [False] * 8, True) == 2


@pytest.mark.parametrize("norm", ("layer", "rms", "none"))
def test_opcheck(norm: str) -> None:
    inputs = operands({**LONG, "norm": norm}, (2, 3, 8))
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    index = indices("random", 2, 3)
    constants = (False, norm, EPS, 1.0, 1.0, torch.float32, torch.float32)
    torch.library.opcheck(norm_modulate_segments, (*leaves, index, *constants))
    with torch.no_grad():
        _, h, mean, rstd = norm_modulate_segments(*leaves, index, *constants)
    grad_y = torch.randn_like(h) if norm != "none" else None
    saved = [None if t is None else t.detach() for t in (h, inputs[0], *inputs[2:])]
    rest = (index, False, mean, rstd, norm, 1.0, 1.0, torch.float32, [True] * 8, norm != "none")
    torch.library.opcheck(
        norm_modulate_segments_backward, (grad_y, torch.randn_like(h), *saved, *rest)
    )


def test_saves_no_table_per_token() -> None:
    inputs = operands({**LONG, "gate": "no residual"}, (2, 20, 24))
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_modulate_segments(
            *leaves, indices("random", 2, 20), False, "layer", EPS, 0.0, 1.0, *[torch.float32] * 2
        )
    large = {t.data_ptr() for t in saved if t.numel() == leaves[0].numel()}
    assert large == {leaves[0].data_ptr()}


@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_gradcheck(norm: str) -> None:
    leaves = [t.double().requires_grad_() for t in operands(LONG, (2, 3, 8)) if t is not None]
    index, constants = indices("random", 2, 3), (False, norm, EPS, 1.0, 1.0, *[torch.float64] * 2)
    assert torch.autograd.gradcheck(
        lambda *t: norm_modulate_segments(*t, index, *constants)[:2], leaves
    )


def composite(seed: int, dtype: torch.dtype, **forms: Any) -> tuple[list[Any], list[Any]]:
    """Leaves (operands, weights, biases), and the other arguments of the composite."""
    operands_of = operands({**LONG, **forms}, (2, 5, 8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(12, 8, generator=generator) for _ in range(2)]
    leaves = [*operands_of, *weights, torch.randn(12, generator=generator)]
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in leaves]
    settings = [forms.get("shift") == "token", "layer", EPS, 0.0, 1.0, dtype, dtype]
    return leaves, [indices("random", 2, 5), *settings]


def separate(leaves: list[Any], rest: list[Any]) -> list[Tensor]:
    y, h, *_ = norm_modulate_segments(*leaves[:8], *rest)
    outs = F.linear(y, leaves[8]), F.linear(y, leaves[9], leaves[10])
    return [outs[0], *outs[1].split([5, 7], -1), leaves[0] if leaves[1] is None else h]


def as_one(leaves: list[Any], rest: list[Any]) -> list[Tensor]:
    pieces = [0, 0, 12, 1, 0, 5, 1, 5, 12]
    linears = leaves[8:10], [None, leaves[10]], pieces
    outs, h = norm_modulate_segments_linears(*leaves[:8], *rest, *linears)
    return [*outs, h]


@pytest.mark.parametrize("forms", ({}, {"gate": "no residual"}, {"shift": "token"}), ids=str)
def test_linears_behind_it(forms: dict[str, str]) -> None:
    leaves, rest = composite(0, torch.float64, **forms)
    present = [t for t in leaves if t is not None]
    for used in ([0, 1, 2, 3], [1], [3], [0, 3]):
        found, expected = ([run(leaves, rest)[i] for i in used] for run in (as_one, separate))
        # The same products in fp64, added up in another order.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        grads = [torch.randn_like(t) for t in expected]
        torch.testing.assert_close(
            torch.autograd.grad(found, present, grads, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(
                expected, present, grads, allow_unused=True, materialize_grads=True
            ),
            rtol=1e-10,
            atol=1e-10,
        )


def test_linears_keep_no_normed_tensor() -> None:
    leaves, rest = composite(0, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        *_, h = as_one(leaves, rest)
    large = {t.data_ptr() for t in kept if t.shape == h.shape}
    assert large == {h.data_ptr(), leaves[0].data_ptr()}  # and x for the gradient of the gate


def test_linears_behind_it_under_a_tracer() -> None:
    leaves, rest = composite(0, torch.float32)
    arguments = (*leaves[:8], *rest, leaves[8:10], [None, leaves[10]], [0, 0, 12, 1, 0, 12])
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(norm_modulate_segments_linears, arguments, test_utils=checks)
