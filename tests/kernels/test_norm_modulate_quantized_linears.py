"""A fused op and quantized linears as one node: bits of the two ops, and nothing more is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.gated_activation_quantized_linear import gated_activation_quantized_linear
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_quantized_linears import norm_modulate_quantized_linears
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.norm_modulate_segments_quantized_linears import (
    norm_modulate_segments_quantized_linears,
)
from fxopt.kernels.quantized_linears import op_of, quantized_linears
from fxopt.recipes import RECIPES, Recipe, find, gemm
from tests.numerics import relative_l2

B, S, K = 2, 37, 64
QUANTIZED = [name for name, recipe in RECIPES.items() if recipe.gemms]
WGRAD_ONLY = Recipe("wgrad only", wgrad=gemm("e5m2/tensor/fp32", "e4m3/tensor/fp32")).key
FPROP_ONLY = Recipe("fprop only", fprop=gemm("e4m3/row/fp32", "e4m3/row/fp32")).key


def leaf(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


class Normed:
    """norm_modulate with a gated residual and two linears, one without a bias."""

    def __init__(self, norm: str, has_residual: bool) -> None:
        residual = (leaf(1, B, S, K), leaf(2, B, 1, K)) if has_residual else (None, None)
        modulation = leaf(3, B, 1, K), leaf(4, B, 1, K)
        self.operands = [leaf(0, B, S, K), *residual, None, None, *modulation, None]
        self.settings = (norm, 1e-6, 0.0, 1.0, torch.bfloat16, torch.bfloat16)
        self.weights, self.biases = [leaf(5, 96, K), leaf(6, 48, K)], [leaf(7, 96), None]
        self.grads = [leaf(8 + i, B, S, n).detach() for i, n in enumerate((96, 48, K))]

    @property
    def leaves(self) -> list[Tensor]:
        found = [t for t in (*self.operands, *self.weights, *self.biases) if t is not None]
        return [t for t in found if t.requires_grad]

    def fused(self, recipe: str) -> list[Tensor]:
        parameters = (self.weights, self.biases, recipe)
        outs, h = norm_modulate_quantized_linears(*self.operands, *self.settings, *parameters)
        return [*outs, h]

    def apart(self, recipe: str) -> list[Tensor]:
        y, h, _, _ = norm_modulate(*self.operands, *self.settings)
        h = h if h.numel() else self.operands[0]
        return [*quantized_linears(y, self.weights, self.biases, recipe, False), h]


class NormedBySegment(Normed):
    """The same where gate, scale and shift are rows of tables."""

    def __init__(self, norm: str, has_residual: bool, shift_per_token: bool = False) -> None:
        super().__init__(norm, has_residual)
        gate = leaf(2, B, 3, K) if has_residual else None
        shift = leaf(4, B, S, K) if shift_per_token else leaf(4, 3, K)
        self.operands[2], self.operands[5:7] = gate, [leaf(3, B, 3, K), shift]
        self.reading = torch.arange(B * S).view(B, S) % 3, shift_per_token

    def fused(self, recipe: str) -> list[Tensor]:
        parameters = (self.weights, self.biases, recipe)
        given = *self.operands, *self.reading, *self.settings, *parameters
        outs, h = norm_modulate_segments_quantized_linears(*given)
        return [*outs, h]

    def apart(self, recipe: str) -> list[Tensor]:
        y, h, _, _ = norm_modulate_segments(*self.operands, *self.reading, *self.settings)
        h = h if h.numel() else self.operands[0]
        return [*quantized_linears(y, self.weights, self.biases, recipe, False), h]


class Activated:
    """[beside | silu(gate) * up] and a linear."""

    def __init__(self, has_beside: bool = True) -> None:
        self.gate, self.up = leaf(0, B, S, 32), leaf(1, B, S, 32)
        self.beside = leaf(2, B, S, 16) if has_beside else None
        self.weight, self.bias = leaf(3, 48, 48 if has_beside else 32), leaf(4, 48)
        self.grads = [leaf(5, B, S, 48).detach()]

    @property
    def leaves(self) -> list[Tensor]:
        found = (self.gate, self.up, self.beside, self.weight, self.bias)
        return [t for t in found if t is not None]

    def fused(self, recipe: str) -> list[Tensor]:
        operands = (self.gate, self.up, "silu", "none", self.beside, self.weight, self.bias)
        return [gated_activation_quantized_linear(*operands, recipe)]

    def apart(self, recipe: str) -> list[Tensor]:
        y = gated_activation(self.gate, self.up, "silu", "none")
        y = y if self.beside is None else torch.cat([self.beside, y], -1)
        return quantized_linears(y, [self.weight], [self.bias], recipe, False)


def run(call: Any, case: Any, recipe: str) -> list[Tensor]:
    """Outputs and all gradients; draws of stochastic rounding are the same each time."""
    torch.manual_seed(0)
    outs = call(recipe)
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, case.leaves, case.grads))


CASES = {
    "layer": lambda: Normed("layer", has_residual=True),
    "rms, no residual": lambda: Normed("rms", has_residual=False),
    "by segment": lambda: NormedBySegment("layer", has_residual=True),
    "by segment, a shift per token": lambda: NormedBySegment("rms", True, shift_per_token=True),
    "by segment, no residual": lambda: NormedBySegment("rms", has_residual=False),
    "activation": Activated,
    "activation alone": lambda: Activated(has_beside=False),
}


@pytest.mark.parametrize("recipe", [*QUANTIZED, FPROP_ONLY, WGRAD_ONLY])
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_the_two_ops(name: str, recipe: str) -> None:
    case = CASES[name]()
    found, expected = run(case.fused, case, recipe), run(case.apart, case, recipe)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        if name.endswith("no residual") and i == 3:
            # x's gradient passes through the node: rounded once where the two ops round both
            # addends and the sum, by at most 2^-9 of each.
            assert relative_l2(f, e.double()) < 3 * 2**-9
        else:
            assert torch.equal(f, e), i


def kept(call: Any, case: Any, recipe: str) -> int:
    """Bytes saved for backward beside the leaves, by storage."""
    own = {t.untyped_storage().data_ptr() for t in case.leaves}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = call(recipe)
    assert outs
    return sum(found.values())


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_no_codes_are_kept(recipe: str) -> None:
    normed = Normed("layer", has_residual=True)
    # h in 16 bits, two statistics a row, and at most one magnitude for each feature.
    assert kept(normed.fused, normed, recipe) <= B * S * (2 * K + 8) + 3 * K * 4 + 300 * 4
    normed = NormedBySegment("layer", has_residual=True)
    bound = B * S * (2 * K + 8) + 3 * K * 4 + 300 * 4
    assert kept(normed.fused, normed, recipe) <= bound + B * S * 8  # the index
    activated = Activated()
    assert (
        kept(activated.fused, activated, recipe) <= (2 * 48 + 4) * 4
    )  # gate, up, beside are leaves


def test_a_branch_is_kept_for_its_gate_alone() -> None:
    case = Normed("layer", has_residual=True)
    x, _, gate, *_ = case.operands
    case.operands[0] = x.detach()
    trained = kept(case.fused, case, "fp8_tensorwise")
    case.operands[2] = gate.detach()
    assert kept(case.fused, case, "fp8_tensorwise") == trained - B * S * K * 2 + B * K * 2


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_gradients(name: str) -> None:
    """Frozen weights, frozen operands, an output that nothing was made of."""
    case = CASES[name]()
    expected = run(case.fused, case, "fp8_rowwise")[len(case.grads) :]
    leaves = case.leaves
    for i, one in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is one)
        outs = case.fused("fp8_rowwise")
        with_grad = [(o, g) for o, g in zip(outs, case.grads, strict=True) if o.requires_grad]
        outs, grads = zip(*with_grad, strict=True)
        (found,) = torch.autograd.grad(outs, [one], grads)
        assert torch.equal(found, expected[i])
        for other in leaves:
            other.requires_grad_()
    if isinstance(case, Normed):
        for i in range(3):
            (dx,) = torch.autograd.grad(
                case.fused("fp8_rowwise")[i], [case.leaves[0]], case.grads[i]
            )
            assert dx.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_high_precision_checkpoint_and_autocast(name: str) -> None:
    case = CASES[name]()
    plain = run(case.fused, case, "fp8_tensorwise")

    def recomputed(recipe: str) -> Any:
        return checkpoint(case.fused, recipe, use_reentrant=False)

    assert all(map(torch.equal, plain, run(recomputed, case, "fp8_tensorwise")))
    with high_precision():
        for f, e in zip(
            run(case.fused, case, "mxfp8"), run(case.apart, case, "mxfp8"), strict=True
        ):
            # The model's own products, summed in another order and rounded in bf16.
            torch.testing.assert_close(f, e, rtol=2e-2, atol=2e-1)


def test_the_op_behind_a_producer() -> None:
    assert op_of("norm_modulate", find("fp8_rowwise_gw_hp")) == "norm_modulate_quantize"
    assert op_of("norm_modulate", find("mxfp8")) == "norm_modulate"
    assert op_of("norm_modulate_segments", find("fp8")) == "norm_modulate_segments_quantize"


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8"])
def test_few_tokens_and_none(recipe: str) -> None:
    for num_tokens in (0, 1):
        x = torch.randn(1, num_tokens, 48, requires_grad=True)
        weight = torch.randn(32, 48, requires_grad=True)
        settings = ("layer", 1e-6, 0.0, 1.0, torch.float32, torch.float32)
        (y,), _ = norm_modulate_quantized_linears(
            x, *[None] * 7, *settings, [weight], [None], recipe
        )
        z = gated_activation_quantized_linear(
            x, None, "gelu_tanh", "none", None, weight, None, recipe
        )
        (y.sum() + z.sum()).backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert weight.grad is not None and weight.grad.isfinite().all()


class Unreached(torch.autograd.Function):
    """Like a later op whose other outputs alone reach the loss: it has no gradient to give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("name", CASES)
def test_what_no_loss_reaches_has_no_gradient(name: str) -> None:
    """A gradient of zeros would let the optimizer decay parameters that eager leaves alone."""
    case, x = CASES[name](), leaf(9, 3)
    Unreached.apply(x, case.fused("fp8_rowwise")[0]).sum().backward()
    assert x.grad is not None
    assert all(t.grad is None for t in case.leaves)
