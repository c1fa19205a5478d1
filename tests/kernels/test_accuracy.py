"""The Triton kernels over pairwise combinations of all options, against float64.

At most twice the error of PyTorch's own ops in the same dtype (`tests/numerics.py`). No bf16: the
interpreter truncates where it should round. Outputs are NaN before they are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.diagnose.numerics import poisoned_allocations
from fxopt.kernels import gated_activation, norm_modulate, qk_norm_rope, triton_norm_modulate
from tests.kernels import test_gated_activation as gated
from tests.kernels import test_norm_modulate as norms
from tests.kernels import test_qk_norm_rope as heads
from tests.kernels.interpreted import LAYOUTS, VALUES, Interpreted, laid_out, valued
from tests.numerics import assert_as_accurate
from tests.pairwise import pairwise

pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide")

DTYPES = (torch.float32, torch.float16)
ROWS = ((1, 1), (3, 5), (1, 9), (3, 1))  # batch, tokens
GRADS = ("contiguous", "transposed", "expanded")
Leaves = dict[str, Tensor]
Function = Callable[[Leaves], list[Tensor]]


def name(case: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in case.items())


def judge(case: Any, ours: Function, eager: Function, exact: Function, leaves: Leaves) -> None:
    """Outputs and gradients of all leaves, in the leaves' dtype and in float64."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    doubles = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    generator = torch.Generator().manual_seed(1)
    like = exact(doubles)
    dtype = next(iter(leaves.values())).dtype
    grads = [torch.randn(t.shape, generator=generator).to(dtype) for t in like]
    if case["grads"] == "expanded":  # over all rows: a layer norm maps a single value to zero
        grads = [grad[:1, :1].expand(grad.shape) for grad in grads]
    else:
        grads = [laid_out(grad, case["grads"]) for grad in grads]
    truth = results(lambda _: like, doubles, [grad.double() for grad in grads])
    with Interpreted(), poisoned_allocations():
        found = results(ours, leaves, grads)
    assert_as_accurate(found, results(eager, leaves, grads), truth, what=str(case))


def results(function: Function, leaves: Leaves, grads: list[Tensor]) -> Leaves:
    outs = function(leaves)
    found = torch.autograd.grad(outs, [*leaves.values()], grads, allow_unused=True)
    named = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return named | {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}


NORM_MODULATE = pairwise(
    norm=("layer", "rms"),
    gate=("no residual", None, "sample", "token", "scalar per token"),
    affine=((False, False), (True, False), (False, True), (True, True)),
    scale=norms.MODULATION,
    shift=norms.MODULATION,
    offset=(0.0, 1.0),
    biased=(False, True),
    used=("y", "h", "y and h"),
    num_features=(8, 24, 100, 1536, 5120),
    rows=ROWS,
    layout=LAYOUTS,
    grads=GRADS,
    values=VALUES,
    dtype=DTYPES,
)


@pytest.mark.parametrize("case", NORM_MODULATE, ids=name)
def test_norm_modulate(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter takes its time by the program, of which 5,120 features would have 160.
    monkeypatch.setattr(triton_norm_modulate, "REDUCE_D", 512)
    dtype, gate, norm, offset = (case[name] for name in ("dtype", "gate", "norm", "offset"))
    shape = (*case["rows"], case["num_features"])
    used = ["y"] if gate == "no residual" else case["used"].split(" and ")
    inputs = norms.operands(
        gate, case["affine"], case["scale"], case["shift"], torch.float32, shape, case["biased"]
    )
    names = [n for n, t in zip(norms.OPERANDS, inputs, strict=True) if t is not None]
    leaves = dict(zip(names, (t for t in inputs if t is not None), strict=True))
    leaves = {n: t.to(dtype) for n, t in leaves.items()}
    for name in ("x", "residual"):
        if name in leaves:
            leaves[name] = laid_out(
                valued(leaves[name].float(), case["values"], dtype), case["layout"]
            )

    def listed(t: Leaves) -> list[Tensor | None]:
        return [t.get(name) for name in norms.OPERANDS]

    def outputs(y: Tensor, h: Tensor, *_: Tensor) -> list[Tensor]:
        return [{"y": y, "h": h}[name] for name in used]

    constants = norm, norms.EPS, offset, 1.0
    judge(
        case,
        lambda t: outputs(*norm_modulate.norm_modulate(*listed(t), *constants, dtype, dtype)),
        lambda t: outputs(*norms.eager(listed(t), norm, offset)),
        lambda t: outputs(
            *norm_modulate.reference(*listed(t), *constants, torch.float64, torch.float64)
        ),
        leaves,
    )


@pytest.mark.parametrize("gate", [None, "sample", "token"])
@pytest.mark.parametrize("biased", [False, True])
def test_residual_alone(gate: str | None, biased: bool) -> None:
    case = {"grads": "transposed", "gate": gate, "biased": biased}
    inputs = norms.operands(gate, (False, False), None, None, torch.float16, (3, 5, 100), biased)
    leaves = {n: t for n, t in zip(norms.OPERANDS, inputs, strict=True) if t is not None}

    def op(function: Any, t: Leaves, dtype: torch.dtype) -> list[Tensor]:
        given = [t.get(name) for name in norms.OPERANDS]
        return [function(*given, "none", 0.0, 0.0, 0.0, dtype, dtype)[1]]

    def eager(t: Leaves) -> list[Tensor]:
        x, residual, gate, *_, x_bias = (t.get(name) for name in norms.OPERANDS)
        x = x if x_bias is None else x + x_bias
        return [residual + (x if gate is None else gate * x)]

    judge(
        case,
        lambda t: op(norm_modulate.norm_modulate, t, torch.float16),
        eager,
        lambda t: op(norm_modulate.reference, t, torch.float64),
        leaves,
    )


QK_NORM_ROPE = pairwise(
    norm=heads.NORMS,
    across_heads=(False, True),
    rotation=heads.ROTATIONS,
    tables=("channels", "pairs", "matrices"),
    rotated=(1.0, 0.5),
    tokens=("all", "first", "last"),
    sections=heads.SECTIONS,
    affine=("none", "weight", "weight+bias", "x_bias+weight", "x_bias+weight+bias"),
    weight_offset=(0.0, 1.0),
    keys=(False, True),
    heads=((1, 8), (5, 24), (3, 96), (24, 64), (40, 128)),  # number and dim
    rows=ROWS,
    layout=LAYOUTS,
    grads=GRADS,
    values=VALUES,
    dtype=DTYPES,
)


@pytest.mark.parametrize("case", QK_NORM_ROPE, ids=name)
def test_qk_norm_rope(case: dict[str, Any]) -> None:
    shape = (*case["rows"], *case["heads"])
    options = {
        k: v for k, v in case.items() if k not in ("heads", "rows", "layout", "grads", "values")
    }
    args = heads.Case(**options, shape=shape).args
    args[0] = [laid_out(valued(x, case["values"], case["dtype"]), case["layout"]) for x in args[0]]
    leaves = {
        f"{field} {i}": t
        for field, listed in zip(("x", "x_bias", "weight", "bias"), args, strict=False)
        for i, t in enumerate(listed)
        if t is not None
    }

    def call(function: Any, args: list[Any]) -> Function:
        def run(t: Leaves) -> list[Tensor]:
            fields = [
                [t.get(f"{field} {i}") for i in range(len(args[0]))]
                for field in ("x", "x_bias", "weight", "bias")
            ]
            return function(*fields, *args[4:])

        return run

    exact = call(qk_norm_rope.reference, heads.to_double(args))
    judge(case, call(heads.fused, args), call(heads.eager, args), exact, leaves)


GATED_ACTIVATION = pairwise(
    activation=[*gated.ACTIVATIONS],
    form=gated.FORMS,
    num_features=(8, 40, 1100, 5120),
    rows=ROWS,
    layout=LAYOUTS,
    grads=GRADS,
    values=VALUES,
    dtype=DTYPES,
)


@pytest.mark.parametrize("case", GATED_ACTIVATION, ids=name)
def test_gated_activation(case: dict[str, Any]) -> None:
    dtype, activation = case["dtype"], case["activation"]
    gate, up, packing = gated.arguments(
        case["form"], torch.float32, (*case["rows"], case["num_features"])
    )
    if case["values"] == "huge":
        gate = gate.clamp(-1, 1)  # at 1e15 a cube is infinite; 1e4 is in the extreme values below
    leaves = {"gate": valued(gate, case["values"], dtype)}
    if up is not None:
        leaves["up"] = up.to(dtype)
    leaves = {n: laid_out(t, case["layout"]) for n, t in leaves.items()}

    def call(function: Any) -> Function:
        return lambda t: [function(t["gate"], t.get("up"), activation, packing)]

    ours, reference = gated_activation.gated_activation, gated_activation.reference
    judge(case, call(ours), call(gated.eager), call(reference), leaves)


def row_of(bad: float, x: Tensor) -> Tensor:
    """`x` [B, S, ...] with one such element in its first sample's second token."""
    x = x.clone()
    x[0, 1].flatten()[3:4].fill_(bad)
    return x


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_what_is_not_finite_stays_in_its_row(norm: str, bad: float) -> None:
    """Outputs and gradients are NaN and infinite where PyTorch's own are."""
    inputs = norms.operands("sample", (True, True), "sample", "sample", torch.float32, (2, 4, 24))
    constants = norm, norms.EPS, 0.0, 1.0, torch.float32, torch.float32

    def fused_norm(t: list[Tensor]) -> list[Tensor]:
        return list(norm_modulate.norm_modulate(*t, None, *constants)[:2])

    def eager_norm(t: list[Tensor]) -> list[Tensor]:
        return list(norms.eager([*t, None], norm, 0.0))

    x, *operands = (t for t in inputs if t is not None)
    assert_same_kind(fused_norm, eager_norm, [row_of(bad, x), *operands])
    args = heads.Case(norm, shape=(2, 4, 2, 24)).args
    (x,), _, (weight,), *_ = args

    def call(function: Any) -> Any:
        return lambda t: function([t[0]], [None], [t[1]], *args[3:])

    assert_same_kind(call(heads.fused), call(heads.eager), [row_of(bad, x), weight])


def assert_same_kind(ours: Any, eager: Any, tensors: list[Tensor]) -> None:
    found = []
    for function in (ours, eager):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with Interpreted(), poisoned_allocations():
            outs = function(leaves)
            found.append([*outs, *torch.autograd.grad(outs, leaves, [o.detach() for o in outs])])
    for ours, theirs in zip(*found, strict=True):
        # fp32 sums of up to 8 rows, in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    out = found[0][0].isfinite()
    assert out.any() and not out.all()
