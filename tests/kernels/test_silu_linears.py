"""Linears on the SiLU of one row per sample: both providers against plain PyTorch, by fp64."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.silu_linears import silu_linears, silu_products, silu_products_backward
from fxopt.traffic import _Counting
from tests.kernels.interpreted import Interpreted

K = 40
SIZES = (30, 30, 30), (70,)  # of the outputs of each linear
PIECES = [0, 0, 30, 0, 30, 60, 0, 60, 90, 1, 0, 70]
# The interpreter's products of bfloat16 are wrong.
CASES = [("triton", torch.float32), ("triton", torch.float16)]
CASES += [("native", torch.float32), ("native", torch.bfloat16)]


def draw(num_rows, dtype, scale=1.0):
    torch.manual_seed(num_rows)
    shapes = (num_rows, K), (90, K), (70, K), (90,), (70,)
    return [(scale * torch.randn(s)).to(dtype).requires_grad_() for s in shapes]


def fused(x, w, w2, b, b2):
    return silu_linears(x, [w, w2], [b, b2], PIECES)


def plain(x, *parameters):
    y = F.silu(x)
    outs = [F.linear(y, w, b) for w, b in zip(parameters[:2], parameters[2:], strict=True)]
    return [part for out, sizes in zip(outs, SIZES, strict=True) for part in out.split(sizes, -1)]


def run(function, tensors, which=slice(None), is_interpreted=False):
    """Outputs, and gradients of those tensors that require one, by the outputs `which`."""
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with Interpreted(is_interpreted):
        outs = function(*tensors)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]
        grads = torch.autograd.grad(outs[which], wanted, weights[which], allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))
    return [*outs, *zeros]


def assert_as_good(tensors, which=slice(None), is_interpreted=False):
    exact = [t if t is None else t.detach().double() for t in tensors]
    for e, t in zip(exact, tensors, strict=True):
        if t is not None:
            e.requires_grad_(t.requires_grad)
    expected, own = run(plain, exact, which), run(plain, tensors, which)
    found = run(fused, tensors, which, is_interpreted)
    for e, o, f in zip(expected, own, found, strict=True):
        assert (f.shape, f.dtype) == (o.shape, o.dtype)
        error, bound = ((t.double() - e).norm() for t in (f, o))
        # Twice eager's own error, and roundings of fp32 where that is smaller by chance.
        assert error <= 2 * bound + 4 * torch.finfo(torch.float32).eps * e.norm()


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17])
@pytest.mark.parametrize("provider, dtype", CASES)
def test_errors_are_those_of_the_separate_ops(provider, dtype, num_rows):
    assert_as_good(draw(num_rows, dtype), is_interpreted=provider == "triton")


@pytest.mark.parametrize("provider", ["triton", "native"])
@pytest.mark.parametrize(
    "frozen, which",
    [
        ((), slice(1, 2)),  # outputs without a gradient, and a linear without one
        ((), slice(3, 4)),
        ((0,), slice(None)),
        ((1,), slice(None)),
        ((1, 2), slice(None)),
        ((3, 4), slice(None)),
        ((0, 2, 4), slice(0, 3)),
        ((0, 1, 2, 3), slice(3, 4)),
    ],
)
def test_what_has_or_needs_no_gradient(provider, frozen, which):
    tensors = draw(2, torch.float32)
    for i in frozen:
        tensors[i].requires_grad_(False)
    assert_as_good(tensors, which, is_interpreted=provider == "triton")


@pytest.mark.parametrize("provider", ["triton", "native"])
@pytest.mark.parametrize("which, unused", [(slice(1, 2), (2, 4)), (slice(3, 4), (1, 3))])
def test_a_linear_that_is_not_used_gets_no_gradient(provider, which, unused):
    """Not zeros, by which an optimizer would decay its weights."""
    tensors = draw(2, torch.float32)
    with Interpreted(provider == "triton"):
        sum(out.sum() for out in fused(*tensors)[which]).backward()
    assert tuple(i for i, t in enumerate(tensors) if t.grad is None) == unused


@pytest.mark.parametrize("provider", ["triton", "native"])
def test_without_a_bias(provider):
    x, w, w2, _, b2 = draw(2, torch.float32)
    assert_as_good([x, w, w2, None, b2], is_interpreted=provider == "triton")


def test_large_values_stay_finite():
    tensors = draw(2, torch.float32)
    with torch.no_grad():
        tensors[0].mul_(1e4)
    assert_as_good(tensors, is_interpreted=True)


def test_many_shares_of_a_weight():
    """More rows than a program takes, and columns that no tile divides."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 200, requires_grad=True), torch.randn(1100, 200, requires_grad=True)

    def product(x, w):
        return silu_linears(x, [w], [None], [0, 0, 500, 0, 500, 1100])

    def separate(x, w):
        return F.linear(F.silu(x), w).split([500, 600], -1)

    with torch.no_grad():
        doubles = [t.double() for t in (x, w)]
    exact = run(separate, [t.requires_grad_() for t in doubles])
    for e, o, f in zip(
        exact, run(separate, [x, w]), run(product, [x, w], is_interpreted=True), strict=True
    ):
        error, bound = ((t.double() - e).norm() for t in (f, o))
        assert error <= 2 * bound + 4 * torch.finfo(torch.float32).eps * e.norm()


def test_gradients_in_other_memory():
    x, w, w2, _, _ = draw(2, torch.float32)
    grads = [torch.randn(2, 1, 30)[:, 0].expand(2, 30) for _ in range(2)]
    grads += [torch.randn(30, 2).t(), torch.randn(()).expand(2, 70)]
    needs = [True] * 5
    expected = silu_products_backward(grads, PIECES, x, [w, w2], needs)
    with Interpreted(), torch.no_grad():
        found = silu_products_backward(grads, PIECES, x, [w, w2], needs)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)  # sums of at most 90 terms in fp32


def test_no_rows():
    tensors = draw(0, torch.float32)
    for provider in (False, True):
        outs = run(fused, tensors, is_interpreted=provider)
        assert [out.shape for out in outs[:4]] == [(0, 30)] * 3 + [(0, 70)]
        assert not any(g.any() for g in outs[4:])


@pytest.mark.parametrize("num_rows, forward, backward", [(16, 1, 2), (17, 3, 9)])
def test_launches(num_rows, forward, backward):
    """As many as the ops of the other provider, where the kernel for rows does not run."""
    tensors = draw(num_rows, torch.float32)
    ones = [torch.ones(num_rows, size) for sizes in SIZES for size in sizes]
    with _Counting() as counting:
        outs = fused(*tensors)
        assert counting.traffic.launches.total() == forward
        torch.autograd.grad(outs, tensors, ones)
    assert counting.traffic.launches.total() == forward + backward
    assert not counting.traffic.glue
    flops = 2 * num_rows * K * 160
    assert [product.flops for product in counting.traffic.gemms] == [flops, 2 * flops]


def test_silu_is_not_kept():
    tensors = draw(2, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(*tensors)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in tensors}


def test_opcheck():
    x, w, w2, b, _ = draw(2, torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(silu_products, (x, [w, w2], [b, None]), test_utils=checks)
    grads = [torch.ones(2, 30), None, torch.ones(2, 30), torch.ones(2, 70)]
    args = grads, PIECES, x, [w, w2], [True, True, False, True, False]
    torch.library.opcheck(silu_products_backward, args, test_utils=checks)
