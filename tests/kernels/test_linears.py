"""Composite autograd nodes: a fused op and the linears behind it, against the plain composition."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.gated_activation_linear import gated_activation_linear
from fxopt.kernels.linears import linears
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears

B, S, K, N = 2, 5, 8, 12


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_equal_with_gradients(ours, plain, tensors, which=slice(None)):
    """fp64 against fp64: the same sums in another order."""
    expected, found = plain(*tensors), ours(*tensors)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    weights = [torch.randn_like(e) for e in expected][which]
    for e, f in zip(
        torch.autograd.grad(expected[which], wanted, weights, allow_unused=True),
        torch.autograd.grad(found[which], wanted, weights, allow_unused=True),
        strict=True,
    ):
        # A parameter whose outputs all have no gradient gets None or zeros.
        e, f = (torch.zeros(()) if g is None else g for g in (e, f))
        torch.testing.assert_close(f, e.expand_as(f), rtol=1e-12, atol=1e-12)


def plain_linears(x, w, b, w2, b2):
    return [*F.linear(x, w, b).split([N // 3, N - N // 3], -1), F.linear(x, w2, b2)]


def fused_linears(x, w, b, w2, b2):
    pieces = [0, 0, N // 3, 0, N // 3, N, 1, 0, K]
    return linears(x, [w, w2], [b, b2], pieces)


@pytest.mark.parametrize("which", [slice(None), slice(0, 1), slice(1, 3), slice(2, 3)])
def test_linears_and_pieces(which):
    tensors = draw(B, S, K), draw(N, K), draw(N), draw(K, K), None
    assert_equal_with_gradients(fused_linears, plain_linears, tensors, which)


def test_frozen_weight_gets_no_gradient():
    tensors = draw(B, S, K), draw(N, K), draw(N), draw(K, K), draw(K)
    tensors[1].requires_grad_(False)
    assert_equal_with_gradients(fused_linears, plain_linears, tensors)


def plain_norm(x, residual, gate, scale, shift, w, b, x_bias=None):
    x = x if x_bias is None else x + x_bias
    h = x if residual is None else residual + gate * x
    y = F.layer_norm(h, (K,), eps=1e-6) * (1 + scale) + shift
    out = F.linear(y, w, b)
    return [out, h]


def fused_norm(x, residual, gate, scale, shift, w, b, x_bias=None):
    dtypes = (torch.float64, torch.float64)
    settings = ("layer", 1e-6, 0.0, 1.0, *dtypes, [w], [b], [0, 0, N])
    operands = (x, residual, gate, None, None, scale, shift, x_bias)
    outs, h = norm_modulate_linears(*operands, *settings)
    return [*outs, h]


@pytest.mark.parametrize("gated", [False, True])
def test_norm_modulate_linears(gated):
    row = (B, 1, K)
    before = (draw(B, S, K), draw(*row)) if gated else (None, None)
    tensors = (draw(B, S, K), *before, draw(*row), draw(*row), draw(N, K), draw(N))
    if gated:
        tensors = (*tensors, draw(K))
    for which in (slice(None), slice(0, 1), slice(1, 2)):  # the last: the residual alone goes on
        assert_equal_with_gradients(fused_norm, plain_norm, tensors, which)


def test_a_full_size_shift_gets_its_gradient():
    tensors = draw(B, S, K), None, None, draw(B, 1, K), draw(B, S, K), draw(N, K), None
    assert_equal_with_gradients(fused_norm, plain_norm, tensors)


def plain_activation(gate, beside, w, b):
    y = F.gelu(gate, approximate="tanh")
    return [F.linear(y if beside is None else torch.cat([beside, y], -1), w, b)]


def fused_activation(gate, beside, w, b):
    return [gated_activation_linear(gate, None, "gelu_tanh", "none", beside, None, w, b)]


@pytest.mark.parametrize("width", [0, 4])
def test_gated_activation_linear(width):
    beside = draw(B, S, width) if width else None
    tensors = draw(B, S, K), beside, draw(N, K + width), draw(N)
    assert_equal_with_gradients(fused_activation, plain_activation, tensors)


def test_backward_under_autocast():
    gate, w = torch.randn(B, S, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    (out,) = fused_activation(gate, None, w, None)
    expected = torch.autograd.grad(out.sum(), [gate, w], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out.sum(), [gate, w])
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e, f)


def test_what_is_made_in_between_is_not_kept():
    x, w = draw(B, S, K), draw(N, K)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_norm(x, None, None, draw(B, 1, K), draw(B, 1, K), w, None)
    own = {x.data_ptr(), w.data_ptr()}
    assert not [t for t in kept if t.shape == x.shape and t.data_ptr() not in own]


def test_opcheck():
    x, w = (t.detach().float().requires_grad_() for t in (draw(B, S, K), draw(N, K)))
    # Composites have no kernel of their own to check but for schema, fakes and tracing.
    torch.library.opcheck(linears, (x, [w], [None], [0, 0, N]))
    torch.library.opcheck(gated_activation_linear, (x, None, "silu", "none", None, None, w, None))
