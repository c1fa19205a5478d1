"""Linears whose output is in pieces: all as if it were one, and no gradient is joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.kernels import quantize
from fxopt.kernels.counters import FIELDS
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.kernels.saving import saving
from fxopt.recipes import RECIPES, Recipe
from tests.kernels.test_quantized_linears import QUANTIZED, Case, to_nearest
from tests.kernels.test_triton_quantize import PAIRS
from tests.numerics import relative_l2


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("rows, columns", PAIRS)
@pytest.mark.parametrize("widths", [(128, 256, 40), (24, 300, 5, 1), (130,)])
def test_pieces_are_cast_as_the_whole(
    rows: str | None, columns: str | None, widths: tuple[int, ...]
) -> None:
    """Bit for bit, wherever a tile meets the next piece, and whatever lies between rows."""
    joint = torch.randn(2, 35, sum(widths) + 3, generator=torch.Generator().manual_seed(0))
    joint[0, 0, :2] = -0.0
    pieces = joint[..., : sum(widths)].split(widths, -1)
    whole = torch.cat(pieces, -1)
    for run, alone in (
        (quantize.triton_pieces, quantize.triton),
        (quantize.native_pieces, quantize.native),
    ):
        found = run(pieces, rows, columns, None, True)
        for f, e in zip(found, alone(whole, rows, columns, None, True), strict=True):
            assert f.dtype == e.dtype and torch.equal(*map(bits, (f, e)))


def test_pieces_by_a_known_magnitude_count_and_are_seen_once() -> None:
    pieces = [torch.randn(70, n, generator=torch.Generator().manual_seed(n)) for n in (40, 150)]
    formats, given = ("e5m2/tensor/fp32", "e5m2/tensor/fp32", None, True), []
    for xs in (pieces, [torch.cat(pieces, -1)]):
        lines = [torch.zeros(len(FIELDS), dtype=torch.int64) for _ in range(2)]
        known, seen = torch.tensor([2.0]), torch.zeros(1, dtype=torch.int32)
        found = quantize.triton_pieces(xs, *formats, *lines, known, seen)
        given.append([*found, *lines, seen])
    for f, e in zip(*given, strict=True):
        assert torch.equal(*map(bits, (f, e)))
    assert given[0][-1].view(torch.float32) == max(x.abs().max() for x in pieces)


def test_pieces_that_triton_does_not_take() -> None:
    xs = [torch.randn(8, 64), torch.randn(8, 32)]
    for operand, given in (("e4m3/1x32/e8m0", xs), ("e4m3/row/fp32", [xs[0], xs[1][:, :0]])):
        found = quantize.triton_pieces(given, operand, None, None, True)
        for f, e in zip(
            found, quantize.native_pieces(given, operand, None, None, True), strict=True
        ):
            assert torch.equal(*map(bits, (f, e)))


PIECES = [0, 0, 16, 0, 16, 96, 1, 0, 48]


def run_in_pieces(case: Case, recipe: Recipe, saved: str = "model") -> list[Tensor]:
    """`Case.run` with the first output, and its gradient, in two pieces."""
    with saving(saved):
        outs = quantized_linears(case.x, case.weights, case.biases, recipe.key, False, PIECES)
    grads = [*case.grads[0].split([16, 80], -1), case.grads[1]]
    leaves = [case.x, *case.weights, case.biases[0]]
    found = torch.autograd.grad(outs, leaves, grads)
    return [torch.cat(outs[:2], -1).detach(), outs[2].detach(), *found]


@pytest.mark.parametrize("saved", ["model", "fp8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_an_output_in_pieces_is_that_of_the_whole(name: str, saved: str) -> None:
    recipe, case = to_nearest(RECIPES[name]), Case(torch.bfloat16)
    for f, e in zip(run_in_pieces(case, recipe, saved), case.run(recipe), strict=True):
        if saved == "model":
            assert torch.equal(f, e)
        # Products of other sizes add up in another order.
        assert relative_l2(f, e) <= torch.finfo(torch.bfloat16).eps


def test_pieces_without_a_gradient_count_as_zero() -> None:
    case, recipe = Case(), RECIPES["fp8"]
    whole = [torch.zeros_like(case.grads[0]), torch.zeros_like(case.grads[1])]
    whole[0][..., 16:] = case.grads[0][..., 16:]
    case.grads[1] = None
    outs = quantized_linears(case.x, case.weights, case.biases, "fp8", False, PIECES)
    leaves = [case.x, case.weights[0], case.biases[0]]
    found = torch.autograd.grad(outs[1], leaves, whole[0][..., 16:])
    outs = quantized_linears(case.x, case.weights[:1], case.biases[:1], recipe.key, False)
    for f, e in zip(found, torch.autograd.grad(outs, leaves, whole[:1]), strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_pieces_of_what_is_frozen(needed: str) -> None:
    case = Case()
    (weight, _), (bias, _) = case.weights, case.biases
    leaves = {"x": case.x, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == needed)
    given = case.x, [weight], [bias], "fp8", False
    (whole,) = quantized_linears(*given)
    (expected,) = torch.autograd.grad(whole, leaves[needed], case.grads[0])
    outs = quantized_linears(*given, PIECES[:6])
    (found,) = torch.autograd.grad(outs, leaves[needed], case.grads[0].split([16, 80], -1))
    assert torch.equal(found, expected)


def test_pieces_have_memory_of_their_own_where_they_are_packed() -> None:
    case = Case()
    for saved, num_storages in (("model", 1), ("fp8", 2)):
        with saving(saved):
            outs = quantized_linears(case.x, case.weights, case.biases, "fp8", False, PIECES)
        assert len({out.untyped_storage()._cdata for out in outs[:2]}) == num_storages
