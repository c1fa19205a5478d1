"""linear_cross_entropy: loss and gradients against fp64, for both providers and several chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxopt.kernels import linear_cross_entropy as op
from fxopt.kernels import triton_linear_cross_entropy
from fxopt.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_gradients,
    reference,
)
from tests.numerics import assert_as_accurate

T, K, V = 11, 8, 70
IGNORED = -100
PROVIDERS = {"native": op.softmax_native, "triton": triton_linear_cross_entropy.softmax}
# No bf16 for Triton: its interpreter truncates where it should round.
CASES = [
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
]


@pytest.fixture(params=[4, 2048], ids=["chunks", "whole"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", request.param)


def arguments(dtype=torch.float32, num_tokens: int = T) -> tuple[Tensor, ...]:
    """x, weight, bias and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    sizes = (num_tokens, K), (V, K), (V,)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    target = torch.randint(V, (num_tokens,), generator=generator)
    target[::5] = IGNORED
    return *tensors, target


def run(function, *args, grad: float = 0.37) -> dict[str, Tensor]:
    """The loss and, for another gradient than 1, those of x, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in args[:3]]
    loss = function(*leaves, *args[3:])
    grads = torch.autograd.grad(loss, leaves, torch.tensor(grad, dtype=loss.dtype))
    return dict(zip(("loss", "dx", "dweight", "dbias"), (loss.detach(), *grads), strict=True))


@pytest.mark.parametrize("reduction", op.REDUCTIONS)
@pytest.mark.parametrize(("provider", "dtype"), CASES)
def test_values_and_gradients(chunk, monkeypatch, provider, dtype, reduction):
    monkeypatch.setattr(op, "softmax_native", PROVIDERS[provider])

    def draw(number: int):
        x, *others, target = arguments(dtype)
        x = x.roll(number, 0)
        settings = target, IGNORED, reduction
        exact = (t.double() for t in (x, *others))
        return (
            run(linear_cross_entropy, x, *others, *settings),
            run(reference, x, *others, *settings),
            {k: v.double() for k, v in run(reference, *exact, *settings).items()},
        )

    assert_as_accurate(*draw(0), again=draw)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_tokens_that_do_not_count(chunk, provider):
    x, weight, bias, _ = arguments()
    target = torch.full((T,), IGNORED)
    args = (PROVIDERS[provider], x, weight, bias, target, IGNORED)
    mean, *grads = op.by_chunks(*args, "mean", [True] * 3)
    assert mean.isnan()  # as in PyTorch: there is none to take the mean of
    assert all(g.eq(0).all() for g in grads)
    assert op.by_chunks(*args, "sum", [True] * 3)[0] == 0


def test_a_target_that_is_no_class_is_not_silent(chunk):
    x, weight, bias, target = arguments()
    target[1] = V
    args = (x, weight, bias, target, IGNORED, "sum")
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(*args)
    loss, dx, *_ = op.by_chunks(triton_linear_cross_entropy.softmax, *args, [True] * 3)
    assert loss.isnan() and dx[1].isnan().all() and not dx[2].isnan().any()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nan_and_infinity_propagate(provider):
    x, weight, bias, target = arguments()
    for value in (float("nan"), float("inf")):
        logits = F.linear(x, weight, bias)
        logits[1, 3] = value
        expected = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED)
        found = torch.empty(T)
        PROVIDERS[provider](logits.clone(), target, torch.ones(()), IGNORED, found, False)
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (False,) * 3])
def test_gradients_that_nothing_needs_are_not_made(needs):
    *tensors, target = arguments()
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(*tensors, target, IGNORED, "mean")
    assert loss.requires_grad == any(needs)
    assert counter.get_total_flops() == 2 * T * K * V * (1 + needs[0] + needs[1])
    if any(needs):
        loss.backward()
    assert [t.grad is not None for t in tensors] == list(needs)


def test_without_gradients_nothing_is_kept():
    *tensors, target = arguments()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*(t.requires_grad_() for t in tensors), target, IGNORED, "mean")
    assert counter.get_total_flops() == 2 * T * K * V


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.num_elements = max(self.num_elements, out.numel())
        return out


def test_the_logits_of_a_chunk_are_the_largest_tensor(monkeypatch):
    monkeypatch.setattr(op, "CHUNK", 16)
    x, weight, bias, target = arguments(num_tokens=160)
    with Largest() as seen:
        op.native(x, weight, bias, target, IGNORED, "mean", [True] * 3)
    assert seen.num_elements == max(16 * V, x.numel())


def test_leading_dims_and_strides(chunk):
    _, weight, bias, target = arguments()
    wide = torch.randn(T, 2 * K, generator=torch.Generator().manual_seed(1))
    for x, labels in (
        (wide[:, ::2], target),
        (wide[:, :K].reshape(1, T, K).transpose(0, 1), target[:, None]),
        (torch.zeros(1, K).expand(T, K), target),
        (wide[:0, :K], target[:0]),
    ):
        args = (x, weight.t().contiguous().t(), bias, labels, IGNORED, "sum")
        found, expected = run(linear_cross_entropy, *args), run(reference, *args)
        # Both in fp32, in another order of at most V terms.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_opcheck():
    *tensors, target = arguments()
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(
            linear_cross_entropy_gradients, (*tensors, target, IGNORED, "mean", needs)
        )
    torch.library.opcheck(
        linear_cross_entropy,
        (*(t.requires_grad_() for t in tensors), target, IGNORED, "mean"),
        test_utils=("test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reduction": "none"}, "not by 'none'"),
        ({"target": torch.zeros(T + 1, dtype=torch.long)}, r"\[12\]"),
        ({"weight": torch.zeros(V, K + 1)}, r"\[70, 9\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    x, weight, _, target = arguments()
    named = {"weight": weight, "target": target, "reduction": "mean"} | change
    with pytest.raises(ValueError, match=says):
        linear_cross_entropy(x, named["weight"], None, named["target"], IGNORED, named["reduction"])
