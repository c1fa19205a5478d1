"""quantize, scaled_matmul and the linears made of them: against the emulation, GEMM by GEMM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fxopt.kernels.formats import dequantize_matrix, quantize_matrix
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.quantize import Cast, quantize
from fxopt.kernels.quantize_group import quantize_mixed, quantize_rows
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.kernels.registration import provider
from fxopt.kernels.scaled_matmul import (
    multiply,
    native_capability,
    on_units,
    op_of,
    scaled_matmul,
)
from fxopt.recipes import RECIPES, Gemm, Operand, Recipe, gemm
from tests.numerics import relative_l2

QUANTIZED = [name for name, recipe in RECIPES.items() if recipe.gemms]
SEED = torch.tensor([11])
TOKENS, WIDTH = (2, 37), 64  # 74 tokens: no multiple of anything that is padded to


def operand(name: str, x: Tensor) -> Tensor:
    """What `x` is after quantization, [R, C padded] in fp32."""
    o = Operand.parse(name)
    return dequantize_matrix(quantize_matrix(x, o), o)


def product(a: Tensor, b: Tensor, how: Gemm | None) -> Tensor:
    """a @ b^T in fp64, of what the operands are after quantization."""
    if how is None:
        return a.double() @ b.double().T
    return operand(str(how.a), a).double() @ operand(str(how.b), b).double().T


class Case:
    """Two linears of one input; the second has no bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        self.x = draw(*TOKENS, WIDTH)
        self.weights, self.biases = [draw(96, WIDTH), draw(48, WIDTH)], [draw(96), None]
        self.grads = [draw(*TOKENS, n).detach() for n in (96, 48)]

    def run(self, recipe: str | Recipe, call: Callable[..., Any] | None = None) -> list[Tensor]:
        """Outputs, then gradients of x, weights and bias."""
        key = recipe if isinstance(recipe, str) else recipe.key
        outs = (call or quantized_linears)(self.x, self.weights, self.biases, key, False)
        leaves = [self.x, *self.weights, self.biases[0]]
        return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, self.grads))

    def exact(self, recipe: Recipe) -> list[Tensor]:
        """The same in float64, of the operands as the recipe quantizes them."""
        x = self.x.detach().reshape(-1, WIDTH)
        grads = [g.reshape(-1, g.shape[-1]) for g in self.grads]
        weights = [w.detach() for w in self.weights]
        outs = [product(x, w, recipe.fprop) for w in weights]
        outs[0] += self.biases[0].detach().double()
        dx = [product(g, w.T, recipe.dgrad) for g, w in zip(grads, weights, strict=True)]
        dw = [product(g.T, x.T, recipe.wgrad) for g in grads]
        shaped = [o.view(*TOKENS, -1) for o in outs]
        return [*shaped, (dx[0] + dx[1]).view_as(self.x), *dw, grads[0].double().sum(0)]


def to_nearest(recipe: Recipe) -> Recipe:
    """The recipe without draws, which have a test of their own."""

    def plain(g: Gemm | None) -> Gemm | None:
        return g and replace(g, a=replace(g.a, stochastic=False))

    return replace(recipe, dgrad=plain(recipe.dgrad), wgrad=plain(recipe.wgrad))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_output_and_gradients_are_those_of_the_emulation(name: str, dtype: torch.dtype) -> None:
    recipe, case = to_nearest(RECIPES[name]), Case(dtype)
    # fp32 sums of up to 128 products; the result is rounded once to the dtype, and the gradient of
    # x, a sum of two products, up to three times.
    bound = 3 * torch.finfo(dtype).eps + 1e-6
    for found, expected in zip(case.run(recipe), case.exact(recipe), strict=True):
        assert found.dtype == dtype
        assert relative_l2(found, expected) < bound


# Decibel below the result in the model's dtype: for the output, the gradients of x and of the
# weights. Two operands of n dB each give a product of n - 3; figures measured on this case, less 1.
FLOORS = {
    "fp8_tensorwise": (27, 23, 23),
    "fp8": (27, 23, 23),
    "fp8_rowwise": (27, 27, 27),
    "fp8_rowwise_gw_hp": (27, 27, 100),
    "fp8_blockwise": (27, 27, 27),
    "mxfp8": (27, 27, 27),
    "nvfp4": (15, 14, 14),
}


@pytest.mark.parametrize("name, floors", FLOORS.items())
def test_signal_to_noise_of_every_recipe(name: str, floors: tuple[int, ...]) -> None:
    case = Case()
    with high_precision():
        plain = case.run(name)
    torch.manual_seed(0)
    low = case.run(name)
    expected = [floors[0]] * 2 + [floors[1]] + [floors[2]] * 2
    for p, q, floor in zip(plain, low, expected, strict=False):
        assert relative_l2(q, p.double()) < 10 ** (-floor / 20)
        assert floor >= 100 or relative_l2(q, p.double()) > 10 ** (-(floor + 9) / 20)


def test_high_precision_is_the_plain_linear() -> None:
    case = Case()

    def linears(x: Tensor, weights: Any, biases: Any, key: str, keeps_x: bool) -> list[Tensor]:
        return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]

    with high_precision():
        found = case.run("nvfp4")
    for a, b in zip(found, case.run("nvfp4", linears), strict=True):
        torch.testing.assert_close(a, b)  # sums of products in another order


@contextmanager
def saving() -> Iterator[list[Tensor]]:
    """Collect what is saved for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


def test_what_is_kept_for_backward() -> None:
    expected = {"fp8_tensorwise": 1, "mxfp8": 1, "nvfp4": 0.5, "fp8_rowwise_gw_hp": 2}
    for name, num_bytes in expected.items():
        case = Case(torch.bfloat16)
        with saving() as kept:
            quantized_linears(case.x, case.weights, case.biases, name, False)
        parameters = {w.data_ptr() for w in case.weights}
        codes = [t for t in kept if t.data_ptr() not in parameters and t.dim() and t.numel() > 2000]
        assert sum(t.numel() * t.element_size() for t in codes) == pytest.approx(
            num_bytes * case.x.numel(), rel=0.3 if name != "fp8_rowwise_gw_hp" else 0
        )


def test_nothing_is_kept_for_frozen_weights() -> None:
    case = Case()
    frozen = [w.detach() for w in case.weights]
    with saving() as kept:
        outs = quantized_linears(case.x, frozen, [None, None], "mxfp8", False)
    assert all(t.numel() == 0 or any(t is w for w in frozen) for t in kept)
    (dx,) = torch.autograd.grad(outs, [case.x], case.grads)
    assert torch.equal(dx, case.run("mxfp8")[2])


def test_the_input_is_quantized_once_and_gradients_once_each() -> None:
    case, calls, weights, gradients = Case(), [], [], []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is quantize:
                calls.append(tuple(args[0].shape))
            if func is quantize_mixed:
                gradients.append([tuple(g.shape) for g in args[0]])
            if func is quantize_rows:
                weights.append([tuple(w.shape) for w in args[0]])
            return func(*args, **(kwargs or {}))

    with Record():
        case.run("fp8_tensorwise")
    assert calls.count((*TOKENS, WIDTH)) == 1  # rows for the products, columns for the gradients
    # All together, once each way: in backward both gradients and the weights.
    assert weights == [[(96, WIDTH), (48, WIDTH)]]
    assert gradients == [[(74, 96), (74, 48), *weights[0]]]
    assert len(calls) == 1


def test_a_missing_gradient_and_strided_operands() -> None:
    case = Case()
    reference = case.run("fp8_rowwise")
    x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weights = [w.detach().T.contiguous().T.requires_grad_() for w in case.weights]
    outs = quantized_linears(x, weights, case.biases, "fp8_rowwise", False)
    expanded = torch.ones(1, 1, 1).expand_as(outs[0])
    dx, dw, other = torch.autograd.grad(
        outs[0], [x, *weights], expanded, allow_unused=True, retain_graph=True
    )
    assert other is None and dx.isfinite().all() and dw.isfinite().all()
    found = torch.autograd.grad(outs, [x, *weights], case.grads)
    for a, b in zip(found, reference[2:5], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_tokens", [1, 3, 16])
@pytest.mark.parametrize("name", QUANTIZED)
def test_few_tokens_and_none(name: str, num_tokens: int) -> None:
    """Where others fail: the tokens are the contraction of the weight's gradient."""
    for shape in ((1, num_tokens, 48), (0, num_tokens, 48)):
        x = torch.randn(shape, requires_grad=True)
        weight = torch.randn(32, 48, requires_grad=True)
        (y,) = quantized_linears(x, [weight], [None], name, False)
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == shape
        assert weight.grad is not None and weight.grad.isfinite().all()


def test_stochastic_gradients_follow_torch_seed() -> None:
    case = Case()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(case.run("nvfp4"))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][2], runs[2][2])
    # The forward draws nothing, so that what a checkpoint computes again is the same.
    assert torch.equal(runs[0][0], runs[2][0])


def test_the_mean_of_stochastic_gradients_is_the_gradient() -> None:
    torch.manual_seed(0)
    case, num = Case(), 64
    stochastic = Operand.parse("e2m1/1x16/two_level/stochastic")
    recipe = replace(RECIPES["nvfp4"], name="mine", wgrad=None)
    assert recipe.dgrad is not None and recipe.dgrad.a == stochastic
    runs = torch.stack([case.run(recipe)[2] for _ in range(num)]).double()
    exact = replace(recipe, dgrad=replace(recipe.dgrad, a=replace(stochastic, stochastic=False)))
    x = (
        case.grads[0].reshape(-1, 96).double()
        @ operand(str(recipe.dgrad.b), case.weights[0].detach().T).double().T[:96]
    )
    x = (
        x
        + case.grads[1].reshape(-1, 48).double()
        @ operand(str(recipe.dgrad.b), case.weights[1].detach().T).double().T[:48]
    )
    spread = runs.std(0).norm() / num**0.5
    # The mean of 64 runs is off by their spread / 8; 1.2 times that over 4,736 values is beyond
    # ten standard deviations. Rounding to nearest is off by more.
    assert (runs.mean(0).reshape(-1, WIDTH) - x).norm() < 1.2 * spread
    nearest = case.run(exact)[2].double().reshape(-1, WIDTH)
    assert (nearest - x).norm() > 2 * spread


def test_checkpoint_and_autocast() -> None:
    case = Case(torch.bfloat16)
    plain = case.run("mxfp8")

    def recomputed(*args: Any) -> Any:
        return checkpoint(quantized_linears, *args, use_reentrant=False)

    assert all(map(torch.equal, plain, case.run("mxfp8", recomputed)))

    fp32 = Case()
    expected = fp32.run("mxfp8")
    with torch.autocast("cpu", torch.bfloat16):
        found = fp32.run("mxfp8")
    assert all(map(torch.equal, expected, found))


def test_copies_share_the_parameters() -> None:
    """The op keeps no state: a changed weight is seen at the next call."""
    case = Case()
    before = case.run("fp8")
    with torch.no_grad():
        case.weights[0].mul_(2)
    after = case.run("fp8")
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    copy.deepcopy(RECIPES["fp8"])


OPERANDS = sorted({str(o) for r in RECIPES.values() for _, g in r.gemms for o in (g.a, g.b)})


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("shape", [(2, 37, 64), (5, 24), (0, 16)])
def test_fakes_have_the_shapes_of_the_real(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    real = quantize(x, name, name, SEED, True)
    with FakeTensorMode() as mode:
        fake = quantize(mode.from_tensor(x), name, name, mode.from_tensor(SEED), True)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)
        assert r.stride() == f.stride() or not r.numel()


def test_opcheck() -> None:
    x = torch.randn(5, 32)
    for name in ("e4m3/row/pow2", "e2m1/1x16/two_level"):
        # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
        checks = ("test_faketensor", "test_autograd_registration")
        torch.library.opcheck(quantize, (x, name, None, None, True), test_utils=checks)
        a = Cast(x, Operand.parse(name), None).pair().rows
        args = (*a, *a, None, name, name, False, torch.float32)
        torch.library.opcheck(scaled_matmul, args, test_utils=checks)


def test_flops_are_those_of_the_product() -> None:
    case = Case()
    for name in ("mxfp8", "nvfp4"):
        with FlopCounterMode(display=False) as counter:
            quantized_linears(case.x.detach(), case.weights[:1], [None], name, False)
        padded = 64
        assert counter.get_total_flops() == 2 * 74 * 96 * padded


def test_fp8_products_are_bit_identical_to_the_library() -> None:
    """PyTorch has the same product on the CPU, by another path."""
    case = Case(torch.bfloat16)
    for how in (
        gemm("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
        gemm("e5m2/row/pow2", "e4m3/row/pow2"),
    ):
        x = case.x.detach().reshape(-1, WIDTH)
        a = Cast(x, how.a, None).pair().rows
        b = Cast(case.weights[0], how.b, None).pair().rows
        ours = multiply(a, b, how, torch.float32)
        library = on_units(a.codes, a.scales, b.codes, b.scales, None, False, torch.float32)
        # Sums of 64 products of 4-bit mantissas in fp32, added in another order.
        torch.testing.assert_close(ours, library, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_scaled_by_the_units_in_bf16_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for rows of other results came with later versions, and not for all devices."""
    asked = []

    def product(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, scale_a: Tensor, **_: Any):
        asked.append((scale_a.numel() > 1, out_dtype))
        return torch.full((a.shape[0], b.shape[1]), 1e5, dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    codes = torch.empty(32, 16, dtype=torch.float8_e4m3fn)
    scales = torch.full((32, 1), 1e-3)
    y = on_units(codes, scales, codes, scales, None, False, dtype)
    by_units = dtype == torch.bfloat16
    assert asked == [(by_units, dtype if by_units else torch.float32)]
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("name", ["fp8_tensorwise", "fp8_rowwise", "fp8_rowwise_gw_hp"])
def test_a_gpu_accepts_the_layouts(name: str) -> None:
    """Fake CUDA tensors check what `torch._scaled_mm` on a GPU checks: multiples and layouts."""
    for num_tokens in (1, 74, 128):
        for how, sizes in gemms(RECIPES[name], num_tokens, 96, 64):
            with FakeTensorMode():
                m, n, k = sizes
                a = Cast(torch.empty(m, k, device="cuda"), how.a, None).pair().rows
                b = Cast(torch.empty(n, k, device="cuda"), how.b, None).pair().rows
                y = on_units(a.codes, a.scales, b.codes, b.scales, None, True, torch.bfloat16)
                assert y.shape == (m, n)


def gemms(
    recipe: Recipe, num_tokens: int, out: int, features: int
) -> Iterator[tuple[Gemm, tuple[int, int, int]]]:
    """(GEMM, (m, n, k)) of one linear."""
    sizes: dict[str, Sequence[int]] = {
        "fprop": (num_tokens, out, features),
        "dgrad": (num_tokens, features, out),
        "wgrad": (out, features, num_tokens),
    }
    for name, how in recipe.gemms:
        yield how, tuple(sizes[name])


def test_where_units_are_used() -> None:
    capabilities = {n: [native_capability(g) for _, g in RECIPES[n].gemms] for n in QUANTIZED}
    assert set(capabilities["fp8_tensorwise"]) == {(8, 9)}
    assert set(capabilities["fp8_rowwise"]) == {(9, 0)}
    for name in ("fp8_blockwise", "mxfp8", "nvfp4"):
        assert set(capabilities[name]) == {None}


@pytest.mark.parametrize(
    "recipe, capability, expected",
    [
        ("fp8_tensorwise", (8, 0), "emulation"),
        ("fp8_tensorwise", (8, 9), "library"),
        ("fp8_rowwise", (8, 9), "emulation"),
        ("fp8_rowwise", (9, 0), "library"),
        ("mxfp8", (10, 0), "emulation"),
    ],
)
def test_who_multiplies_is_who_has_the_units(
    recipe: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, device = op_of(RECIPES[recipe]), torch.device("cuda")
    assert provider(op, device, capability) == expected
    assert provider(op, torch.device("cpu")) == "emulation"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert provider(op, device) == expected
    has_casts = capability >= (8, 9)
    assert (provider("norm_modulate_quantize", device) == "triton") == has_casts
