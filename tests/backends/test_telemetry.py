"""Telemetry of a tiny FLUX: planted operands against numpy, and what it costs when it is off."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.backends.telemetry import Telemetry, _Table
from fxopt.backends.timesteps import bucket_labels, bucket_of
from fxopt.errors import NoTelemetry
from fxopt.gemms import gemm
from fxopt.kernels import counters
from fxopt.recipes import Recipe
from fxopt.telemetry_report import OperandRecord, TelemetryReport, short
from tests.backends.toys import stack, tokens
from tests.families import FAMILIES, Inputs, outputs, project

ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes, an independent oracle")
FLUX = FAMILIES["flux"]
NUM_LINEARS = 34
TENSOR = "e4m3/tensor/fp32"
# The other GEMMs in the model's dtype: operands are those of the plain model, but for rounding.
WGRAD = Recipe("wgrad", wgrad=gemm(TENSOR, TENSOR))
FPROP = Recipe("fprop", fprop=gemm(TENSOR, TENSOR))
Loss = Callable[[nn.Module, Inputs], Tensor]


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    return FLUX.inputs(2, 0, dtype)


def loss(model: nn.Module, given: Inputs) -> Tensor:
    return project(outputs(model, given))


def spiked(model: nn.Module, given: Inputs) -> Tensor:
    """A loss that looks at one token a million times harder than at the others."""
    (out,) = outputs(model, given)
    weight = torch.ones(out.shape[1])
    weight[3] = 1e6
    return (out * weight[:, None]).sum()


def opened(door: str, recipe: Any = "fp8", plant: Callable[[nn.Module], None] | None = None) -> Any:
    model = FLUX.build()
    if plant is not None:
        with torch.no_grad():
            plant(model)
    model = getattr(fxopt, door)(model, recipe=recipe)
    with torch.no_grad():
        outputs(model, inputs())  # the first call captures
    return model


def recorded(model: nn.Module, of: Loss = loss) -> TelemetryReport:
    with fxopt.telemetry(model, every=1) as telemetry:
        telemetry.batch()
        of(model, inputs()).backward()
    return telemetry.report()


def operands(of: Loss) -> dict[str, dict[str, Tensor]]:
    """x and gradient of every linear of the plain model, by hooks, from float64: in fp32 its GELU
    has no gradient where the tanh has rounded to -1."""
    model, found = FLUX.build().double(), {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        kept = found.setdefault(name, {})

        def see(_: Any, given: Any, out: Tensor, kept: dict[str, Tensor] = kept) -> None:
            kept["x"] = given[0].detach().float()
            if out.requires_grad:
                out.register_hook(lambda grad: kept.__setitem__("gradient", grad.float()))

        module.register_forward_hook(see)
    of(model, inputs(torch.float64)).backward()
    return found


def lost(x: Tensor) -> tuple[int, float, float, float]:
    """Nonzero values, amax, scale and share that underflows, of one e4m3 scale for the tensor."""
    values = x.numpy()
    amax = np.abs(values).max()
    codes = (values * (np.float32(448) / amax)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    nonzero = (values != 0).sum()
    return nonzero, amax, amax / 448, ((values != 0) & (codes == 0)).sum() / nonzero


@pytest.mark.parametrize("of", [loss, spiked])
@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_inputs_and_gradients_are_those_of_the_plain_model(door: str, of: Loss) -> None:
    expected, seen = operands(of), Counter[str]()
    for record in recorded(opened(door, WGRAD), of).operands:
        assert record.gemm == "wgrad" and not record.flag
        for name in record.linears:
            seen[record.operand] += 1
            nonzero, amax, scale, underflow = lost(expected[name][record.operand])
            # The fused ops round otherwise than eager, in fp32, and gradients cancel: a few values
            # at the edge of zero fall on its other side.
            np.testing.assert_allclose(record.amax, amax, rtol=1e-3)
            np.testing.assert_allclose(record.largest_scale, scale, rtol=1e-3)
            assert record.least_scale == record.largest_scale
            assert abs(record.nonzero - nonzero) <= 2 and abs(record.underflow - underflow) < 0.01
    assert seen == {"x": NUM_LINEARS, "gradient": NUM_LINEARS}


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_a_gradient_that_underflows_is_the_worst(door: str) -> None:
    # Norms mix the features of a token but no tokens: of the last block's output projection all
    # tokens but one have a gradient a million times too small.
    worst = recorded(opened(door, WGRAD), spiked).worst()[0]
    assert worst.linears == ("single_transformer_blocks.1.proj_out",)
    assert worst.operand == "gradient"
    clean = recorded(opened(door, WGRAD)).operands
    assert max(r.underflow for r in clean) < 0.1 < 0.9 < worst.underflow


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_an_activation_that_is_not_finite_is_flagged(door: str) -> None:
    def plant(model: nn.Module) -> None:
        model.single_transformer_blocks[1].proj_mlp.bias[7] = float("inf")

    records = recorded(opened(door, FPROP, plant)).operands
    flagged = [r for r in records if r.flag]
    assert [(r.linears, r.operand) for r in flagged] == [
        (("single_transformer_blocks.1.proj_out",), "x")
    ]
    num_tokens = sum(inputs()[n].shape[1] for n in ("hidden_states", "encoder_hidden_states"))
    assert flagged[0].nonfinite == 2 * num_tokens and flagged[0].amax is None
    report = TelemetryReport(1, 1, 0, records)
    assert "NON-FINITE" in report.text().splitlines()[1]
    assert any(r["flag"] == "NON-FINITE" for r in json.loads(report.to_json())["operands"])


def test_weights() -> None:
    model = opened("optimize", "fp8_tensorwise")
    parameters, seen = dict(model.named_parameters()), set()
    for record in recorded(model).operands:
        if record.operand != "weight":
            continue
        weight = parameters[f"{record.linears[0]}.weight"].detach()
        nonzero, amax, scale, underflow = lost(weight)
        assert (record.nonzero, record.underflow) == (nonzero, underflow)
        assert record.amax == pytest.approx(amax) and record.least_scale == pytest.approx(scale)
        seen.add((record.gemm, record.linears[0]))
    assert Counter(g for g, _ in seen) == {"fprop": NUM_LINEARS, "dgrad": NUM_LINEARS}


class Ops(TorchDispatchMode):
    """Counts ops that are no views; fails on what would wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op._schema.name.removeprefix("aten::") not in self.WAITS, f"{op} waits"
        if not op.is_view:
            self.found[str(op)] += 1
        return op(*args, **kwargs or {})


def step(model: nn.Module, given: Inputs) -> None:
    # The sum of one output: the projection of the other tests reads a dtype off the host.
    outputs(model, given)[0].sum().backward()


@pytest.mark.parametrize("recipe", ["fp8", "mxfp8"])
def test_what_is_not_sampled_costs_nothing_and_no_step_waits(recipe: str) -> None:
    model, given = opened("optimize", recipe), inputs()
    step(model, given)  # gradients exist from here on
    timesteps = torch.tensor([100.0, 300.0])
    with Ops() as off:
        step(model, given)
    with fxopt.telemetry(model, every=3, buckets=(250,)) as telemetry:
        found = []
        for _ in range(4):
            with Ops() as ops:
                telemetry.batch(timesteps)
                step(model, given)
            found.append(ops.found)
    assert found[1] == found[2] == off.found
    first, again = (sum(f.values()) - sum(off.found.values()) for f in (found[0], found[3]))
    assert first > 0 and again > 0
    with Ops() as after:
        step(model, given)
    assert after.found == off.found
    assert telemetry.report().sampled == 2


def test_on_cuda_gathering_does_not_wait() -> None:
    # Fake tensors raise where a value is asked for on the host.
    with FakeTensorMode():
        table = _Table(3, 4, torch.device("cuda"))
        for timesteps in (torch.empty(5, device="cuda"), [1.0, 2.0], 3.0):
            table.gather(bucket_of(timesteps, (2.0, 5.0)))
        with pytest.raises(DataDependentOutputException):
            table.totals.amax().item()


@pytest.mark.parametrize("door", ["optimize", "swap"])
def test_results_are_the_same_bits(door: str) -> None:
    def gradients(model: nn.Module) -> list[Tensor | None]:
        model.zero_grad()
        loss(model, inputs()).backward()
        return [p.grad for p in model.parameters()]

    model = opened(door, "fp8_rowwise")
    plain = gradients(model)
    with fxopt.telemetry(model, every=1) as telemetry:
        telemetry.batch()
        for g, p in zip(gradients(model), plain, strict=True):
            assert g is p is None or torch.equal(g, p)
    assert telemetry.report().operands


def test_buckets() -> None:
    assert bucket_labels((250, 500)) == ["t < 250", "250 <= t < 500", "t >= 500", "mixed"]
    for timesteps, bucket in (
        (0, 0),
        (250, 1),
        ([260.0, 499.0], 1),
        (torch.tensor([500, 1000]), 2),
        (torch.tensor([100.0, 260.0], dtype=torch.bfloat16), 3),
    ):
        assert bucket_of(timesteps, (250, 500)).item() == bucket
    model = opened("swap")
    with fxopt.telemetry(model, every=2, buckets=(250, 500)) as telemetry:
        for timesteps in (100, 200, 100, 300, [100.0, 300.0], 400):
            telemetry.batch(timesteps)
            loss(model, inputs()).backward()
    found: dict[str, set[int]] = {}
    for record in telemetry.report().operands:
        found.setdefault(record.timesteps, set()).add(record.samples)
    assert found == {"t < 250": {2}, "mixed": {1}}
    assert telemetry.report() == telemetry.report()


def test_a_checkpoint_counts_again_what_it_computes_again() -> None:
    model, x = fxopt.optimize(stack(num_blocks=1), recipe="fp8"), tokens()
    model(x).sum().backward()
    with fxopt.telemetry(model, every=1) as telemetry:
        telemetry.batch()
        checkpoint(model, x, use_reentrant=False).sum().backward()
    samples = {r.samples for r in telemetry.report().operands if r.gemm == "fprop"}
    assert samples == {2}
    assert {r.samples for r in telemetry.report().operands if r.operand == "gradient"} == {1}


def test_a_weight_that_is_cast_once_is_counted_once() -> None:
    model, x = fxopt.optimize(stack(num_blocks=1), recipe="fp8"), tokens()
    model(x).sum().backward()
    with fxopt.telemetry(model, every=1) as telemetry, fxopt.cast_weights_once():
        for _ in range(2):
            telemetry.batch()
            model(x).sum().backward()
    for record in telemetry.report().operands:
        assert record.samples == (1 if record.operand == "weight" else 2)


def test_a_weight_under_autocast_keeps_its_name() -> None:
    model, x = fxopt.optimize(stack(num_blocks=1), recipe="fp8"), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
        with fxopt.telemetry(model, every=1) as telemetry:
            telemetry.batch()
            model(x).sum().backward()
    report = telemetry.report()
    assert report.operands and not report.unnamed
    weight = dict(model.named_parameters())[f"{report.operands[-1].linears[0]}.weight"]
    amax = weight.detach().bfloat16().abs().max().item()
    assert any(r.operand == "weight" and r.amax == amax for r in report.operands)


def test_evaluation_first_and_another_model() -> None:
    model, other = opened("swap"), opened("swap")
    with fxopt.telemetry(model, every=1) as telemetry:
        telemetry.batch()
        with torch.inference_mode():
            outputs(model, inputs())
        loss(model, inputs()).backward()
        assert not telemetry.report().unnamed
        loss(other, inputs()).backward()
    report = telemetry.report()
    assert report.unnamed and {r.samples for r in report.operands} == {1, 2}
    assert "no parameters of the model" in report.text()


def test_what_cannot_be_had_is_refused() -> None:
    plain, quantized = FLUX.build(), opened("swap")
    compiled = fxopt.optimize(stack(), recipe="fp8", execution="compile")
    for model, settings, words in (
        (plain, {}, "no door has quantized"),
        (fxopt.swap(FLUX.build()), {}, "no door has quantized"),
        (compiled, {}, "torch.compile"),
        (torch.compile(quantized), {}, "torch.compile"),
        (quantized, {"every": 0}, "every is 0"),
        (quantized, {"buckets": (500, 250)}, "ascending"),
    ):
        with pytest.raises(NoTelemetry, match=words), fxopt.telemetry(model, **settings):
            pass
        assert not counters.is_recording()
    with fxopt.telemetry(quantized, buckets=(250,)) as telemetry:
        with pytest.raises(NoTelemetry, match="timesteps"):
            telemetry.batch()
        with pytest.raises(NoTelemetry, match="another one"):
            Telemetry(quantized, 1, ())
    assert "No quantized operand" in telemetry.report().text()


def test_names_of_linears_that_share_an_input() -> None:
    assert short(["a.b.q"]) == "a.b.q"
    assert short(["a.b.q", "a.b.k"]) == "a.b.{q,k}"
    assert short(["a.q", "b.c.k"]) == "{a.q,b.c.k}"


def test_the_table_shows_the_worst_and_says_what_it_leaves_out() -> None:
    def record(name: str, underflow: float, nonfinite: int = 0) -> OperandRecord:
        return OperandRecord(
            (name,), "fprop", "x", "all", 1, 9, 1.0, 0.5, 0.5, underflow, 0.0, nonfinite
        )

    records = (record("a", 0.0), record("b", 0.5), record("c", 0.1, 1))
    text = TelemetryReport(10, 1, 0, records).text(limit=2).splitlines()
    assert [line.split()[0] for line in text[1:3]] == ["c", "b"]
    assert text[3:] == ["1 batches sampled, one in 10", "1 records that lost less are not shown"]
