"""A step on a CUDA device: autograd's own threads, side streams, waits of the host, large tensors.

These run first of the tests for a GPU, as all else there rests on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.kernels import gated_activation, norm_modulate
from fxopt.kernels.attention import attention
from fxopt.kernels.attention_backends import BACKENDS, replaced
from fxopt.kernels.registration import PROVIDERS
from fxopt.kernels.sum_parts import sum_parts
from fxopt.recipe_errors import AttentionRefused
from fxopt.recipes import RECIPES, Recipe
from tests.backends import toys
from tests.numerics import relative_l2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LOW = [
    replace(RECIPES["fp8_tensorwise"], profit="always"),
    replace(RECIPES["fp8_rowwise"], profit="always"),
    replace(RECIPES["fp8_tensorwise"], profit="always", name="fp8_delayed", history=4),
]
STEPS = [
    RECIPES["bf16"],
    *LOW,
    *(replace(r, name=f"{r.name} saved", saved="fp8") for r in (RECIPES["bf16"], LOW[0])),
]
recipes = pytest.mark.parametrize("recipe", STEPS, ids=lambda recipe: recipe.name)


def test_triton_runs_here():
    """Before all others: a failure here is the machine's, or of a Triton that is not known yet."""
    assert PROVIDERS["sum_parts"] == ("triton", "native"), "Triton is not installed"
    x = torch.ones(1000, device="cuda", dtype=torch.bfloat16)
    assert sum_parts([x, x]).eq(2).all()


def toy(recipe: Recipe) -> tuple[nn.Module, Tensor]:
    model = toys.stack().to("cuda", torch.bfloat16)
    fxopt.optimize(model, recipe=recipe)
    return model, toys.tokens(2, 37, torch.bfloat16).cuda().requires_grad_()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The backwards of other attentions add up in any order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def gradients(
    model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = plainly
) -> list[Tensor]:
    y = x
    for block in model.blocks:
        y = call(block, y)
    leaves = [x, *model.parameters()]
    return list(torch.autograd.grad(y.float().square().sum(), leaves))


@recipes
def test_a_checkpoint_computes_the_same_on_a_thread_of_autograd(recipe):
    model, x = toy(recipe)
    with deterministic(), fxopt.at_step(0):
        gradients(model, x)  # captures, and tries the graphs
        expected = gradients(model, x)
        for once in (contextlib.nullcontext(), fxopt.cast_weights_once()):
            with once:
                found = gradients(model, x, lambda b, y: checkpoint(b, y, use_reentrant=False))
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("recipe", LOW, ids=lambda recipe: recipe.name)
def test_telemetry_counts_what_backward_casts(recipe):
    model, x = toy(recipe)
    with fxopt.telemetry(model, every=1, buckets=(500.0,)) as telemetry:
        for step in range(2):
            with fxopt.at_step(step):
                telemetry.batch(torch.tensor([100.0, 200.0], device="cuda"))
                gradients(model, x, lambda b, y: checkpoint(b, y, use_reentrant=False))
        found = telemetry.report()
    assert {r.operand for r in found.operands} == {"x", "weight", "gradient"}
    assert {r.timesteps for r in found.operands} == {"t < 500"}


@recipes
def test_the_host_waits_for_nothing_in_a_step(recipe):
    model, x = toy(recipe)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            with fxopt.at_step(step):
                gradients(model, x)

    steps(0, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(4, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@recipes
def test_a_side_stream_computes_the_same(recipe):
    model, x = toy(recipe)
    with deterministic(), fxopt.at_step(0):
        gradients(model, x)
        expected = gradients(model, x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = gradients(model, x)
        torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@recipes
def test_a_device_that_is_not_the_current_one(recipe):
    model, x = toy(recipe)
    with deterministic(), fxopt.at_step(0):
        gradients(model, x)
        expected = gradients(model, x)
    other = fxopt.optimize(toys.stack().to("cuda:1", torch.bfloat16), recipe=recipe)
    there = x.detach().to("cuda:1").requires_grad_()
    with deterministic(), fxopt.at_step(0):
        found = gradients(other, there)
    assert all(torch.equal(f.cpu(), e.cpu()) for f, e in zip(found, expected, strict=True))


def attend(q: Tensor, mask: Tensor | None, asked: str) -> tuple[Tensor, ...]:
    y = attention(q, q, q, mask, 0.0, False, None, False, None, asked)
    return y, *torch.autograd.grad(y.float().square().sum(), q)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_of_attention_runs_or_says_why_not(name):
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 8, 256, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
    expected = attend(q.double().requires_grad_(), None, "math")
    if replaced(BACKENDS[name]):  # by no package that has been activated
        with pytest.raises(AttentionRefused, match="install its package"):
            attend(q, None, name)
        return
    found = attend(q.requires_grad_(), None, name)
    for f, e in zip(found, expected, strict=True):
        # Weights are rounded to bf16 ahead of the second product, and gradients pass two more.
        assert relative_l2(f, e) < 8 * torch.finfo(torch.bfloat16).eps


def test_a_refusal_is_in_pytorchs_words():
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(1, 1, 64, 64, device="cuda", dtype=torch.bool)
    with pytest.raises(AttentionRefused, match="mask"):
        attend(q, mask, "flash")


@pytest.mark.parametrize("op", ["norm_modulate", "gated_activation"])
def test_more_elements_than_int32_counts(op):
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GB, {free / 2**30:.0f} are free")
    width, num_last = 4096, 7
    x = torch.empty(2**31 // width + num_last, width, device="cuda", dtype=torch.bfloat16)
    x.normal_(generator=torch.Generator("cuda").manual_seed(0)).requires_grad_()
    bf16 = torch.bfloat16

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        if op == "gated_activation":
            y = gated_activation.gated_activation(x, None, "silu", "none")
        else:
            settings = "rms", 1e-6, 0.0, 0.0, bf16, bf16
            y = norm_modulate.norm_modulate(x, *[None] * 7, *settings)[0]
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    last = x.detach()[-num_last:].clone().requires_grad_()
    for whole, alone in zip(run(x), run(last), strict=True):
        assert torch.equal(whole[-num_last:], alone)
