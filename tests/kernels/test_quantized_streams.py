"""Quantized linears of several streams as one node: the bits of a node for each, fewer launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.kernels import counters, streams
from fxopt.kernels.counters import FIELDS, Slot, Slots
from fxopt.kernels.gated_activation_quantized_linear import (
    gated_activation_quantized_linear,
    gated_activation_quantized_linear_streams,
)
from fxopt.kernels.in_force import Decision, decide, high_precision
from fxopt.kernels.norm_modulate_quantized_linears import (
    norm_modulate_quantized_linears,
    norm_modulate_quantized_linears_streams,
)
from fxopt.kernels.norm_modulate_segments_quantized_linears import (
    norm_modulate_segments_quantized_linears,
    norm_modulate_segments_quantized_linears_streams,
)
from fxopt.kernels.quantized_linears import quantized_linears, quantized_linears_streams
from fxopt.recipes import RECIPES
from fxopt.schedule import at_step
from tests.kernels.test_norm_modulate_quantized_linears import FPROP_ONLY, WGRAD_ONLY, leaf

K = 64
# NVFP4 rounds gradients by draws, which nodes take in the order in which autograd runs them.
NAMES = [n for n, r in RECIPES.items() if r.gemms and n != "nvfp4"]
DELAYED = replace(RECIPES["fp8_tensorwise"], name="delayed", history=2).key


class Normed:
    """Of text and image a modulated norm: with a gated residual and two linears, and with one."""

    def __init__(self) -> None:
        modulation = leaf(1, 2, 1, K), leaf(2, 2, 1, K)
        self.first = [leaf(0, 2, 5, K), None, None, None, None, *modulation, None]
        gated = leaf(4, 2, 9, K), leaf(5, 2, 1, K)
        self.second = [leaf(3, 2, 9, K), *gated, None, None, leaf(6, 2, 1, K), None, leaf(7, K)]
        self.weights = [leaf(8, 96, K), leaf(9, 48, K), leaf(10, 32, K)]
        self.biases = [leaf(11, 96), None, leaf(12, 32)]
        self.numbers = [1e-6, 1e-5], [0.0, 0.0], [1.0, 0.0]

    @property
    def leaves(self) -> list[Tensor]:
        found = (*self.first, *self.second, *self.weights, *self.biases)
        return [t for t in found if t is not None]

    def together(self, recipe: str) -> list[Tensor]:
        operands = map(list, zip(self.first, self.second, strict=True))
        dtypes, parameters = [torch.bfloat16] * 2, (self.weights, self.biases, [2, 1])
        given = (*operands, "layer", *self.numbers, *dtypes, *parameters, recipe)
        outs, hs = norm_modulate_quantized_linears_streams(*given)
        return [*outs[:2], hs[0], outs[2], hs[1]]

    def apart(self, recipe: str) -> list[Tensor]:
        found: list[Tensor] = []
        streams = (self.first, slice(0, 2)), (self.second, slice(2, 3))
        for i, (operands, own) in enumerate(streams):
            numbers, dtypes = (n[i] for n in self.numbers), [torch.bfloat16] * 2
            parameters = self.weights[own], self.biases[own], recipe
            op, more = self.alone(i)
            outs, h = op(*operands, *more, "layer", *numbers, *dtypes, *parameters)
            found += [*outs, h]
        return found

    def alone(self, i: int) -> tuple[Any, tuple[Any, ...]]:
        """The op of a stream, and what it takes behind the operands."""
        return norm_modulate_quantized_linears, ()


class NormedBySegment(Normed):
    """The same, the first stream by segment."""

    def __init__(self) -> None:
        super().__init__()
        self.first[5:7] = [leaf(1, 2, 3, K), leaf(2, 3, K)]
        self.index = torch.arange(10).view(2, 5) % 3

    def together(self, recipe: str) -> list[Tensor]:
        operands = map(list, zip(self.first, self.second, strict=True))
        dtypes, parameters = [torch.bfloat16] * 2, (self.weights, self.biases, [2, 1])
        reading = [self.index, None], [False, False]
        given = (*operands, *reading, "layer", *self.numbers, *dtypes, *parameters, recipe)
        outs, hs = norm_modulate_segments_quantized_linears_streams(*given)
        return [*outs[:2], hs[0], outs[2], hs[1]]

    def alone(self, i: int) -> tuple[Any, tuple[Any, ...]]:
        op = norm_modulate_segments_quantized_linears
        return (op, (self.index, False)) if i == 0 else super().alone(i)


class Activated:
    """gelu(gate) of one stream, [beside | gelu(gate)] of the other, and a linear on each."""

    def __init__(self) -> None:
        self.gates, self.besides = [leaf(0, 2, 5, 32), leaf(1, 2, 9, 32)], [None, leaf(2, 2, 9, 16)]
        self.weights, self.biases = [leaf(3, 48, 32), leaf(4, 16, 48)], [leaf(5, 48), None]

    @property
    def leaves(self) -> list[Tensor]:
        found = (*self.gates, *self.besides, *self.weights, *self.biases)
        return [t for t in found if t is not None]

    def together(self, recipe: str) -> list[Tensor]:
        given = self.gates, [None, None], "gelu_tanh", "none", self.besides
        return gated_activation_quantized_linear_streams(*given, self.weights, self.biases, recipe)

    def apart(self, recipe: str) -> list[Tensor]:
        fields = zip(self.gates, self.besides, self.weights, self.biases, strict=True)
        return [
            gated_activation_quantized_linear(gate, None, "gelu_tanh", "none", *others, recipe)
            for gate, *others in fields
        ]


class Attended:
    """Parts of an attention's result, and one or two linears on each."""

    def __init__(self) -> None:
        self.x = leaf(0, 1, 14, K)
        self.weights = [leaf(1, 96, K), leaf(2, 48, K), leaf(3, 32, K)]
        self.biases = [leaf(4, 96), None, leaf(5, 32)]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.weights, *(b for b in self.biases if b is not None)]

    def together(self, recipe: str) -> list[Tensor]:
        parts = list(self.x.split([5, 9], 1))
        return quantized_linears_streams(parts, self.weights, self.biases, [1, 2], recipe, True)

    def apart(self, recipe: str) -> list[Tensor]:
        first, second = self.x.split([5, 9], 1)
        one = quantized_linears(first, self.weights[:1], self.biases[:1], recipe, True)
        return [*one, *quantized_linears(second, self.weights[1:], self.biases[1:], recipe, True)]


CASES: dict[str, Callable[[], Any]] = {
    "norms": Normed,
    "norms, one by segment": NormedBySegment,
    "activations": Activated,
    "attended": Attended,
}


def grads_of(outs: Sequence[Tensor]) -> list[Tensor]:
    """Like what comes back: one contiguous, one transposed in memory, one expanded."""
    found = []
    for i, out in enumerate(outs):
        g = leaf(20 + i, *out.shape).detach()
        g = g.transpose(0, 1).contiguous().transpose(0, 1) if i % 3 == 1 else g
        found.append(g[:, :1].expand(out.shape) if i % 3 == 2 else g)
    return found


def run(call: Any, case: Any, recipe: str, used: Sequence[int] | None = None) -> list[Any]:
    """Outputs and the gradients of all leaves, from those of the outputs in `used`."""
    outs = call(recipe)
    pairs = list(zip(outs, grads_of(outs), strict=True))
    pairs = pairs if used is None else [pairs[i] for i in used]
    leaves = [t for t in case.leaves if t.requires_grad]
    reached, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(reached, leaves, grads, allow_unused=True)
    return [o.detach() for o in outs] + list(found)


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f is e is None or torch.equal(f, e), i


@pytest.mark.parametrize("recipe", [*NAMES, FPROP_ONLY, WGRAD_ONLY])
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_a_node_for_each_stream(name: str, recipe: str) -> None:
    case = CASES[name]()
    assert_same(run(case.together, case, recipe), run(case.apart, case, recipe))


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_gradients(name: str) -> None:
    """Streams that no gradient reaches, and each of the tensors alone to be trained."""
    case = CASES[name]()
    num_outs = len(case.together("fp8_rowwise"))
    for used in ([0], [num_outs - 1], [0, num_outs - 1]):
        found, expected = (run(c, case, "fp8_rowwise", used) for c in (case.together, case.apart))
        assert_same(found, expected)
        assert any(t is None for t in found) or len(used) == 2
    for one in case.leaves:
        for other in case.leaves:
            other.requires_grad_(other is one)
        outs = [list(c("fp8_tensorwise")) for c in (case.together, case.apart)]
        reached = [[o for o in own if o.requires_grad] for own in outs]
        assert [o.requires_grad for o in outs[0]] == [o.requires_grad for o in outs[1]]
        grads = [
            torch.autograd.grad(own, [one], [torch.ones_like(o) for o in own])[0] for own in reached
        ]
        assert torch.equal(*grads)


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_and_cast_weights_once(name: str) -> None:
    case = CASES[name]()
    expected = run(case.apart, case, "fp8_tensorwise")

    def recomputed(recipe: str) -> Any:
        return checkpoint(case.together, recipe, use_reentrant=False)

    assert_same(run(recomputed, case, "fp8_tensorwise"), expected)
    with fxopt.cast_weights_once():
        for _ in range(2):
            assert_same(run(case.together, case, "fp8_tensorwise"), expected)
    with high_precision():
        assert_same(run(case.together, case, "mxfp8"), run(case.apart, case, "mxfp8"))


class Called(TorchDispatchMode):
    """Counts the ops of fxopt that are called, and those that prepare a transposed copy."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_transposed = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fxopt":
            self.counts[op._schema.name.removeprefix("fxopt::")] += 1
            given = dict(zip((a.name for a in op._schema.arguments), args, strict=False))
            self.num_transposed += given.get("columns") is not None
        return op(*args, **(kwargs or {}))


LAUNCHED = {
    "norms": {
        "norm_modulate_quantize_together": 1,
        "quantize_rows": 1,
        "norm_modulate_streams_backward": 1,
        "norm_modulate_quantize_columns_together": 1,
        "sum_parts": 1,  # of the stream with two linears
    },
    "norms, one by segment": {
        "quantize_rows": 1,
        "norm_modulate_segments_quantize_together": 1,
        "norm_modulate_segments_streams_backward": 1,
        "norm_modulate_segments_quantize_columns_together": 1,
        "sum_parts": 1,
    },
    "activations": {
        "gated_activation_quantize_with_weights": 1,
        "gated_activation_quantize_backward_together": 1,
    },
    # What is attended with the weights, each way.
    "attended": {"quantize_rows": 1, "sum_parts": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_ops_run_once_for_all_streams(name: str) -> None:
    case = CASES[name]()
    with Called() as mode:
        run(case.together, case, "fp8_tensorwise")
    products = mode.counts.pop("scaled_matmul")
    num_linears = len(case.weights)
    assert products == 3 * num_linears
    common = {"quantize_mixed": 1}  # gradients with the weights
    assert mode.counts == common | LAUNCHED[name]


@pytest.mark.parametrize("name", CASES)
def test_without_gradients_nothing_is_cast_for_them(name: str) -> None:
    case = CASES[name]()
    with Called() as mode:
        expected = case.apart("fp8_rowwise")
    assert mode.num_transposed
    for call in (case.together, case.apart):
        with torch.no_grad(), Called() as mode:
            assert_same(call("fp8_rowwise"), expected)
        assert mode.counts["scaled_matmul"] == len(case.weights)
        assert not mode.num_transposed


@pytest.mark.parametrize("name", ["norms", "activations"])
def test_nothing_is_computed_for_a_stream_that_is_frozen(name: str) -> None:
    case = CASES[name]()
    inputs = case.first if name == "norms" else [case.gates[0]]
    weights = case.weights[:2] if name == "norms" else case.weights[:1]
    for t in (*inputs, *weights, case.biases[0]):
        if t is not None:
            t.requires_grad_(False)
    num_trained = len(case.weights) - len(weights)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs = case.together("fp8_rowwise")
    trained = [out for out in outs if out.requires_grad]
    assert len(trained) < len(outs)
    assert not {id(weight) for weight in weights} & {id(t) for t in kept}
    with Called() as mode:
        torch.autograd.backward(trained, grads_of(trained))
    assert mode.counts["scaled_matmul"] == 2 * num_trained


@pytest.mark.parametrize("name", CASES)
def test_delayed_scaling(name: str) -> None:
    """Over steps, and where some of what is cast in one launch has no past yet."""
    one, other = CASES[name](), CASES[name]()
    for step in range(4):
        with at_step(step):
            used = [0] if step == 0 else None  # of the first stream only
            expected = run(other.apart, other, DELAYED, used)
            assert_same(run(one.together, one, DELAYED, used), expected)
        for case in (one, other):
            for w in case.weights:
                w.data *= 1.5


@pytest.mark.parametrize("name", CASES)
def test_counters(name: str) -> None:
    """What telemetry counts of each copy, and a stream of which nothing is counted."""

    class Recorder:
        def __init__(self, weights: Sequence[Tensor]) -> None:
            self.lines = {id(w): torch.zeros(9, len(FIELDS), dtype=torch.int64) for w in weights}

        def slots(self, weights: Sequence[Tensor]) -> Slots | None:
            each = [self.lines[id(w)].unbind() for w in weights if id(w) in self.lines]
            if len(each) < len(weights):
                return None
            slots = [[Slot(line[i], line[i + 1]) for line in each] for i in (0, 2, 4)]
            return Slots(slots[0][0], slots[1], slots[2])

        def demoted(self, weights: Sequence[Tensor]) -> set[str]:
            return set()

    case = CASES[name]()
    for watched in (case.weights, case.weights[:1]):
        recorders = [Recorder(watched) for _ in range(2)]
        for recorder, call in zip(recorders, (case.together, case.apart), strict=True):
            counters.record_to(recorder)
            try:
                run(call, case, "fp8_tensorwise")
            finally:
                counters.record_to(None)
        first, second = recorders
        for key, lines in first.lines.items():
            assert torch.equal(lines, second.lines[key])
        assert any(lines.any() for lines in first.lines.values()) or len(watched) == 1


@pytest.mark.parametrize("name", CASES)
def test_streams_that_decide_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GEMM of one stream is demoted; then all of them."""
    case = CASES[name]()
    last = case.weights[-1]

    def decided(changes: dict[str, None]) -> Callable[..., Decision | None]:
        def run(recipe: str, weights: Sequence[Tensor]) -> Decision | None:
            found = decide(recipe, weights)
            if found is None or not any(w is last for w in weights):
                return found
            low = replace(found.recipe, **changes)
            return found._replace(recipe=low) if low.gemms else None

        return run

    for changes in (dict.fromkeys(["dgrad"]), dict.fromkeys(["fprop", "dgrad", "wgrad"])):
        monkeypatch.setattr(streams, "decide", decided(changes))
        found, expected = (run(c, case, "fp8_rowwise") for c in (case.together, case.apart))
        assert_same(found, expected)
