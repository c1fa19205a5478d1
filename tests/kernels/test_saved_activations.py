"""What fused ops keep under `saved="fp8"`: gradients of what the codes stand for, bit for bit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.gated_activation_linear import (
    gated_activation_linear,
    gated_activation_linear_streams,
)
from fxopt.kernels.gated_activation_quantized_linear import (
    gated_activation_quantized_linear,
    gated_activation_quantized_linear_streams,
)
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_linears import (
    norm_modulate_linears,
    norm_modulate_linears_streams,
)
from fxopt.kernels.norm_modulate_quantized_linears import (
    norm_modulate_quantized_linears,
    norm_modulate_quantized_linears_streams,
)
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.norm_modulate_segments_linears import norm_modulate_segments_linears
from fxopt.kernels.norm_modulate_segments_quantized_linears import (
    norm_modulate_segments_quantized_linears,
)
from fxopt.kernels.qk_norm_rope import qk_norm_rope
from fxopt.kernels.saving import name_of, native_pack, native_unpack, pack, saving, unpack

BF16 = torch.bfloat16


def leaf(seed: int, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


class Case:
    """A call of an op. `activations`: the inputs and outputs that it alone keeps, by shape, at most
    one of each."""

    def __init__(self, call: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        self.call, self.shapes = call, {torch.Size(shape) for shape in shapes}
        self.leaves: list[Tensor] = []

    def leaf(self, *shape: int) -> Tensor:
        self.leaves.append(leaf(len(self.leaves), *shape))
        return self.leaves[-1]

    def run(self) -> list[Tensor]:
        """Outputs, then all gradients."""
        self.leaves = []
        given = self.call(self)
        given = [given] if isinstance(given, Tensor) else given
        outs = [o for o in given if isinstance(o, Tensor) and o.requires_grad]
        grads = [leaf(100 + i, *o.shape).detach().to(o.dtype) for i, o in enumerate(outs)]
        found = torch.autograd.grad(outs, self.leaves, grads, allow_unused=True)
        return [o.detach() for o in outs] + [g for g in found if g is not None]


B, S, K = 2, 5, 96
TOKENS, HEADS = (B, S, K), (B, S, 3, 32)
SETTINGS = ("layer", 1e-6, 0.0, 1.0, BF16, BF16)


def own(c: Case, *shape: int) -> Tensor:
    """An activation in memory of its own, as a product leaves it."""
    return c.leaf(*shape) * 1


def operands(c: Case) -> tuple[Any, ...]:
    """Of a norm on a gated residual. The residual is kept by nobody, and is another shape here by
    its dtype alone."""
    modulation = c.leaf(B, 1, K), c.leaf(B, 1, K)
    return own(c, *TOKENS), own(c, *TOKENS), c.leaf(B, 1, K), None, None, *modulation, None


def linear(c: Case, features: int = K) -> tuple[list[Tensor], list[Tensor]]:
    return [c.leaf(32, features)], [c.leaf(32)]


def streams(c: Case) -> list[list[Any]]:
    return [list(given) for given in zip(operands(c), operands(c), strict=True)]


def segments(c: Case) -> tuple[Any, ...]:
    tables = c.leaf(2, K), None, None, c.leaf(2, K), c.leaf(2, K), None
    index = torch.tensor([0, 1, 1, 0, 1])
    return own(c, *TOKENS), own(c, *TOKENS), *tables, index, False, *SETTINGS


def heads(c: Case) -> list[Tensor]:
    xs = [own(c, *HEADS) for _ in range(4)]
    tables = [torch.rand(S, 1, 32) for _ in range(4)]
    parameters = [None] * 4, [c.leaf(32) for _ in xs], [None] * 4, tables, tables
    settings = [2, 2], "rms", [1e-6] * 4, 0.0, False, "interleaved", "channels", "all", BF16
    return qk_norm_rope(xs, *parameters, *settings)[:2]


def activated(recipe: str) -> Callable[[Case], Any]:
    def call(c: Case) -> Any:
        given = own(c, *TOKENS), own(c, *TOKENS), "silu", "none", c.leaf(B, S, 16)
        parameters = c.leaf(32, K + 16), c.leaf(32)
        if recipe == "bf16":
            return gated_activation_linear(*given, None, *parameters)
        return gated_activation_quantized_linear(*given, *parameters, recipe)

    return call


def normed(recipe: str) -> Callable[[Case], Any]:
    def call(c: Case) -> Any:
        given = *operands(c), *SETTINGS, *linear(c)
        if recipe == "bf16":
            outs, h = norm_modulate_linears(*given, [0, 0, 32])
        else:
            outs, h = norm_modulate_quantized_linears(*given, recipe)
        return [*outs, h]

    return call


def activation_streams(c: Case) -> Any:
    gates, weights = [own(c, B, S, 2 * K) for _ in "ab"], [c.leaf(32, K) for _ in "ab"]
    return gated_activation_linear_streams(
        gates, [None] * 2, "gelu_tanh", "gate_up", [None] * 2, [None] * 2, weights, [None] * 2
    )


def quantized_activation_streams(c: Case) -> Any:
    gates, ups = ([own(c, *TOKENS) for _ in "ab"] for _ in "gu")
    parameters = [None] * 2, [c.leaf(32, K) for _ in "ab"], [c.leaf(32), None]
    return gated_activation_quantized_linear_streams(gates, ups, "silu", "none", *parameters, "fp8")


def norm_streams(c: Case) -> Any:
    weights, biases = zip(*(linear(c) for _ in "ab"), strict=True)
    settings = "rms", [1e-6] * 2, [0.0] * 2, [1.0] * 2, BF16, BF16
    parameters = [w for (w,) in weights], [b for (b,) in biases]
    outs, hs = norm_modulate_linears_streams(
        *streams(c), *settings, *parameters, [1, 1], [0, 0, 32] * 2, [1, 1]
    )
    return [*outs, *hs]


def quantized_norm_streams(c: Case) -> Any:
    weights, biases = zip(*(linear(c) for _ in "ab"), strict=True)
    settings = "rms", [1e-6] * 2, [0.0] * 2, [1.0] * 2, BF16, BF16
    parameters = [w for (w,) in weights], [b for (b,) in biases], [1, 1]
    given = *streams(c), *settings, *parameters, "fp8"
    outs, hs = norm_modulate_quantized_linears_streams(*given)
    return [*outs, *hs]


def sandwich(c: Case) -> Any:
    given = own(c, *TOKENS), None, None, c.leaf(K), None, c.leaf(B, 1, K), own(c, *TOKENS), None
    return norm_modulate(*given, "rms", *SETTINGS[1:])[0]


def segment_linears(c: Case) -> Any:
    outs, h = norm_modulate_segments_linears(*segments(c), *linear(c), [0, 0, 32])
    return [*outs, h]


def quantized_segment_linears(c: Case) -> Any:
    outs, h = norm_modulate_segments_quantized_linears(*segments(c), *linear(c), "fp8")
    return [*outs, h]


CASES = {
    "gelu": Case(lambda c: gated_activation(own(c, *TOKENS), None, "gelu_tanh", "none"), TOKENS),
    "silu, bias": Case(
        lambda c: gated_activation(own(c, B, S, 2 * K), None, "silu", "gate_up", c.leaf(2 * K)),
        (B, S, 2 * K),
    ),
    "silu, up, linear": Case(activated("bf16"), TOKENS),
    "silu, up, fp8 linear": Case(activated("fp8"), TOKENS),
    "silu, up, mxfp8 linear": Case(activated("mxfp8"), TOKENS),
    "activation streams": Case(activation_streams, (B, S, 2 * K)),
    "activation streams, fp8 linears": Case(quantized_activation_streams, TOKENS),
    "norm": Case(lambda c: norm_modulate(*operands(c), *SETTINGS)[:2], TOKENS),
    "norm, linear": Case(normed("bf16"), TOKENS),
    "norm, fp8 linear": Case(normed("fp8"), TOKENS),
    "norm, nvfp4 linear": Case(normed("nvfp4"), TOKENS),
    "norm streams": Case(norm_streams, TOKENS),
    "norm streams, fp8 linears": Case(quantized_norm_streams, TOKENS),
    "sandwich": Case(sandwich, TOKENS),
    "segments": Case(lambda c: norm_modulate_segments(*segments(c))[:2], TOKENS),
    "segments, linear": Case(segment_linears, TOKENS),
    "segments, fp8 linear": Case(quantized_segment_linears, TOKENS),
    "heads": Case(heads, HEADS),
}


def saved_dtypes(run: Callable[[], Any]) -> list[torch.dtype]:
    """Of all tensors that are kept for backward."""
    found: list[torch.dtype] = []

    def note(t: Tensor) -> Tensor:
        found.append(t.dtype)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_what_the_codes_stand_for(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    plain = case.run()

    def rounded(t: Tensor) -> Tensor:
        if t.shape not in case.shapes:
            return t
        codes, scales = native_pack([t], 2 if name == "heads" else 1)
        return native_unpack([codes], [scales], [name_of(t.dtype)])[0]

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(rounded, lambda t: t):
        expected = case.run()
    torch.manual_seed(0)
    with saving("fp8"):
        found = case.run()
        dtypes = saved_dtypes(case.run)
    num_gradients = len(case.leaves)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(f, e), i
    num_outs = len(found) - num_gradients
    assert all(torch.equal(f, p) for f, p in zip(found[:num_outs], plain[:num_outs], strict=True))
    assert any(not torch.equal(f, p) for f, p in zip(found, plain, strict=True))
    assert torch.float8_e4m3fn in dtypes


@pytest.mark.parametrize("name", CASES)
def test_gradients_stay_near(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    plain = case.run()
    torch.manual_seed(0)
    with saving("fp8"):
        found = case.run()
    for i, (f, p) in enumerate(zip(found, plain, strict=True)):
        noise = (f.double() - p.double()).norm() / p.double().norm()
        # e4m3 of normal values is 31.5 dB, a ratio of 0.027, away; a gradient that is the product
        # of two or three such factors is up to twice that. A recipe's own rounding of what is made
        # again may tip over, by half a value in 4 bits.
        assert noise < (0.1 if "nvfp4" in name else 0.06), (i, noise)


def test_nan_and_inf_reach_the_gradient() -> None:
    for value in (float("nan"), float("inf")):
        gate = leaf(0, 4, 256).detach()
        gate[1, 7] = value
        gate.requires_grad_()
        with saving("fp8"):
            y = gated_activation(gate * 1, None, "gelu_tanh", "none")
        (grad,) = torch.autograd.grad(y, gate, torch.ones_like(y))
        expected = torch.zeros_like(gate, dtype=torch.bool)
        expected[1, :128] = True  # its block
        assert torch.equal(grad.isnan(), expected)


def num_packed(run: Callable[[], Any], saved: str = "fp8") -> int:
    """How many activations are kept as codes."""
    with saving(saved):
        return saved_dtypes(run).count(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "run, expected",
    [
        (activation_streams, 1),
        (quantized_activation_streams, 0),
        (quantized_norm_streams, 0),
        (norm_streams, 0),
    ],
)
def test_passes_that_streams_take_for_codes_alone(
    run: Callable[[Case], Any], expected: int
) -> None:
    called: Counter[Any] = Counter()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called[func] += 1
            return func(*args, **(kwargs or {}))

    with Calls(), saving("fp8"):
        sum(t.sum() for t in run(Case(run))).backward()
    assert called[pack] == called[unpack] == expected


def activation(gate: Tensor) -> Callable[[], Tensor]:
    return lambda: gated_activation(gate, None, "gelu_tanh", "none")


def test_what_is_not_packed() -> None:
    run = activation(leaf(0, 4, 64) * 1)
    assert num_packed(run) == 1 and num_packed(run, "model") == 0
    with torch.no_grad():
        assert num_packed(run) == 0
    with high_precision():  # what compares a rewrite with the module's own forward
        assert num_packed(run) == 0
    assert num_packed(activation(leaf(0, 4, 64, dtype=torch.float64) * 1)) == 0
    assert num_packed(activation(leaf(0, 0, 64) * 1)) == 0
    assert num_packed(activation(leaf(0, 1, 64) * 1)) == 1
    # What fewer bytes stand for than its elements have.
    assert num_packed(activation((leaf(0, 1, 64) * 1).expand(4, 64))) == 0


def parts(num_parts: int) -> Iterator[Tensor]:
    """Heads of one projection."""
    joint = leaf(0, B, S, 3 * num_parts, 32) * 1
    yield from joint.unflatten(2, (num_parts, 3)).unbind(2)


@pytest.mark.parametrize("num_parts, expected", [(2, 2), (3, 0)])
def test_parts_of_a_projection_are_packed_if_nobody_keeps_the_rest(
    num_parts: int, expected: int
) -> None:
    q, k, *_ = parts(num_parts)
    norm = [None] * 2, [leaf(1, 32)] * 2, [None] * 2, [None] * 2, [None] * 2
    settings = [1, 1], "rms", [1e-6] * 2, 0.0, False, "none", "channels", "all", BF16
    assert num_packed(lambda: qk_norm_rope([q, k], *norm, *settings)) == expected


def test_a_stream_that_is_added_to_elsewhere_stays() -> None:
    x = leaf(0, B, S, K) * 1
    given = x, None, None, None, None, leaf(1, B, 1, K), leaf(2, B, 1, K), None
    assert num_packed(lambda: norm_modulate(*given, *SETTINGS)) == 0


def test_a_thread_has_its_own() -> None:
    run, counts = activation(leaf(0, 4, 64) * 1), []
    other = threading.Thread(target=lambda: counts.append(num_packed(run, "model")))
    with saving("fp8"):
        other.start()
        other.join()
        assert num_packed(run) == 1
    assert counts == [0]
