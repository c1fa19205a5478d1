"""Attention with its forward in FP8: codes, scales, rounding, gradients, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as of_torch

from fxopt.kernels import quantize_heads as quantizing
from fxopt.kernels import scaled_attention as scaled
from fxopt.kernels.attention import TABLE, Choice, attention, choose, named, steers
from fxopt.kernels.attention_backends import BACKENDS
from fxopt.kernels.attention_call import Call
from fxopt.kernels.fp8_attention import NAME, NATIVE, refusals
from fxopt.kernels.in_force import high_precision
from fxopt.kernels.quantize_heads import quantize_heads
from fxopt.kernels.scaled_attention import scaled_attention
from fxopt.recipe_errors import AttentionRefused
from tests.numerics import assert_as_accurate, relative_l2

CPU = torch.device("cpu")
SCALE = 0.2
HEADS = {"as many": (4, 4), "grouped": (4, 2), "one": (4, 1)}


def draw(
    heads: tuple[int, int] = (4, 4),
    tokens: tuple[int, int] = (40, 40),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q, k and v, laid out as projections leave them, with heads of other magnitudes."""
    generator, (h, h_kv), (s, t) = torch.Generator().manual_seed(0), heads, tokens
    drawn = []
    for num_heads, num_tokens in ((h, s), (h_kv, t), (h_kv, t)):
        x_BSHd = torch.randn(2, num_tokens, num_heads, head_dim, generator=generator)
        x_BSHd *= torch.arange(1, num_heads + 1)[:, None] / 2
        drawn.append(x_BSHd.transpose(1, 2).to(dtype).requires_grad_())
    return drawn


def attend(inputs: list[Tensor], causal: bool = False, asked: str = NAME) -> Tensor:
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    return attention(*inputs, None, 0.0, causal, SCALE, grouped, None, asked)


def quantized(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return quantize_heads(*[t.detach() for t in inputs])


def oracle_codes(x: Tensor, num_scales: int) -> tuple[np.ndarray, np.ndarray]:
    """Head by head in numpy, by ml_dtypes' cast."""
    values = x.detach().float().numpy()
    codes, scales = np.zeros(values.shape, np.uint8), np.zeros((len(values), num_scales), "f4")
    group = values.shape[1] // num_scales
    for b, h in np.ndindex(scales.shape):
        own = values[b, h * group : (h + 1) * group]
        amax = np.abs(own).max()
        with np.errstate(over="ignore", invalid="ignore"):
            factor = np.float32(448) / amax if amax > 0 else np.float32(1)
        factor = min(factor, np.float32(2.0**126))
        factor = factor if np.isfinite(amax) else np.float32("nan")
        # What is scaled is at most 448 and a rounding more, which is back at 448.
        rounded = np.clip(own * factor, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        codes[b, h * group : (h + 1) * group] = rounded.view(np.uint8)
        scales[b, h] = np.float32(1) / factor
    return codes, scales


def assert_codes(found: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    for x, codes, scales in zip(inputs, found[:3], found[3:], strict=True):
        expected, expected_scales = oracle_codes(x, inputs[1].shape[1])
        np.testing.assert_array_equal(scales.numpy(), expected_scales)
        # Any NaN is as good as another.
        is_nan = np.isnan(expected.view(ml_dtypes.float8_e4m3fn))
        np.testing.assert_array_equal(codes.float().isnan().numpy(), is_nan)
        found_bytes = codes.contiguous().view(torch.uint8).numpy()
        np.testing.assert_array_equal(found_bytes[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_an_oracle(heads, dtype: torch.dtype) -> None:
    inputs = draw(heads, (40, 24), dtype=dtype)
    assert_codes(quantized(inputs), inputs)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 3e38, 1e-40, 1e-45])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_one_head_does_not_touch_another(value: float, heads: tuple[int, int]) -> None:
    """Zeros have scale 1, what is not finite makes its own head NaN, what is tiny may vanish."""
    inputs = [t.detach().clone() for t in draw(heads)]
    for x in inputs:
        x[1, -1] = 0
        x[1, -1, 3, 5] = value
    found = quantize_heads(*inputs)
    assert_codes(found, inputs)
    is_nan = torch.stack([scale.isnan() for scale in found[3:]])
    assert is_nan.any() == (not math.isfinite(value)) and is_nan[:, 0].sum() == 0


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_one_launch_gives_the_same(heads) -> None:
    """Integers up to 7: the interpreter rounds unlike the hardware, and these need no rounding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = [t.detach().clone().copy_(t) for t in draw(heads, (40, 24))]
    for x in (q, k, v):
        x.copy_(torch.randint(-6, 7, x.shape, generator=generator))
        x[:, :, 3, 5] = 7
    k[1, 0], v[0, 0, 2, 2] = 0, math.nan
    found, expected = quantizing.triton(q, k, v), quantizing.native(q, k, v)
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (e.shape, e.dtype, e.stride())
        assert torch.equal(f.float().nan_to_num(9.0), e.float().nan_to_num(9.0))


def oracle(inputs: list[Tensor], causal: bool) -> Tensor:
    """The same in float64, row by row of one head after the other, from the oracle's codes."""
    coded = [oracle_codes(x, inputs[1].shape[1]) for x in inputs]
    q, k, v = (c.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for c, _ in coded)
    scales = [s.astype(np.float64) for _, s in coded]
    group, out = q.shape[1] // k.shape[1], np.zeros(q.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        own = h // group
        q_scale, k_scale, v_scale = (s[b, own] for s in scales)
        num_keys = i + 1 if causal else k.shape[2]
        scores = k[b, own, :num_keys] @ q[b, h, i] * (SCALE * q_scale * k_scale)
        numerators = np.exp(scores - scores.max())
        rounded = (256 * numerators).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        out[b, h, i] = rounded @ v[b, own, :num_keys] * (v_scale / (256 * numerators.sum()))
    return torch.from_numpy(out)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_forward_against_float64(heads, causal: bool, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(scaled, "CHUNK", chunk)
    inputs = draw(heads)
    found = attend(inputs, causal)
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    # Rounding to bf16 is 2^-9 of an element at most. A numerator whose fp32 value is beside a tie
    # falls on its other side in about one of 2^20 / 2^4, and moves a result by 2^-4 of a share.
    assert relative_l2(found.detach(), oracle(inputs, causal)) < 2**-9


def test_strides_are_no_matter() -> None:
    inputs = [t.detach() for t in draw((4, 2))]
    expected = attend(inputs)
    for changed in (
        [t.contiguous() for t in inputs],
        [t.mT.contiguous().mT for t in inputs],
    ):
        assert torch.equal(attend(changed), expected)
    expanded = [t[:1, :1].expand_as(t) for t in inputs]
    assert torch.equal(attend(expanded), attend([t.clone() for t in expanded]))


def test_signal_to_noise() -> None:
    """e4m3 rounds by 0.026 of an element (root mean square, 3 bits of mantissa, values spread
    evenly over a power of two): once in v and once in the numerators. A score of deviation 1 takes
    0.026 from q and from k. Together sqrt(4) * 0.026 = 0.053, or 25.6 dB; 26.6 without rounding the
    numerators."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(1, 4, 1024, 64, generator=generator) for _ in range(3)]
    found = attention(q, k, v, None, 0.0, False, None, False, None, NAME)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert 25 < -20 * math.log10(relative_l2(found, exact)) < 26.2


def gradients(out: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return dict(zip("qkv", torch.autograd.grad(out, inputs, weight), strict=True))


@pytest.mark.parametrize("shared", [0.0, 4.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_gradients_are_those_of_the_models_dtype(heads, dtype, causal: bool, shared: float) -> None:
    """Also where all keys have something in common, which drops out of the softmax: by the result
    and the statistic of the codes, that of the queries would be half of its size away."""
    inputs = draw(heads, dtype=dtype)
    common = shared * torch.randn(32, generator=torch.Generator().manual_seed(1))
    inputs[1] = (inputs[1].detach() + common.to(dtype)).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found, eager, truth = (
        gradients(attend(given, causal, asked), given)
        for given, asked in ((inputs, NAME), (inputs, "pytorch"), (exact, "math"))
    )
    assert_as_accurate(found, eager, truth)


def gradient_of_queries(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *left: Tensor) -> Tensor:
    """As a flash backward has it, from the forward's result and the softmax's statistic."""
    out, lse = left
    p = (q @ k.mT / 8 - lse).exp()
    return p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) @ k / 8


@pytest.mark.parametrize(
    "spread, shared, recomputed, reused, of_codes",
    [(1, 0, 0.003, 0.01, 0.06), (4, 0, 0.004, 0.19, 0.12), (1, 4, 0.01, 0.51, 0.2)],
)
def test_why_the_backward_computes_its_forward_again(
    spread, shared, recomputed, reused, of_codes
) -> None:
    """Scores that are `spread` times as large, keys with `shared` in common: errors of three ways,
    as DESIGN.md has them. They are rounded there, and one draw of many numbers differs little."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, 2, 1024, 64, generator=generator)
    k = k + shared * torch.randn(64, generator=generator)
    q, k, v, grad = ((t * s).bfloat16() for t, s in ((q, spread), (k, 1), (v, 1), (grad, 1)))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = attention(*inputs, None, 0.0, False, None, False, None, NAME)
    found, *_ = torch.autograd.grad(out, inputs, grad)
    wide = [t.detach().double() for t in inputs]
    codes = quantized(inputs)
    own = [
        c.double() * s[..., None, None].double() for c, s in zip(codes[:3], codes[3:], strict=True)
    ]
    left, left_of_codes = (
        (F.scaled_dot_product_attention(q, k, v), (q @ k.mT / 8).logsumexp(-1, True))
        for q, k, v in (wide, own)
    )
    exact = gradient_of_queries(grad.double(), *wide, *left)
    left = out.detach().double(), left_of_codes[1]
    errors = (
        relative_l2(found, exact),
        relative_l2(gradient_of_queries(grad.double(), *wide, *left), exact),
        relative_l2(gradient_of_queries(grad.double(), *own, *left), exact),
    )
    assert errors == pytest.approx((recomputed, reused, of_codes), rel=0.2)


def test_only_what_is_needed_gets_a_gradient() -> None:
    q, k, v = draw()
    out = attend([q.detach(), k, v.detach()])
    (found,) = torch.autograd.grad(out.sum(), k)
    (expected,) = torch.autograd.grad(attend([q.detach(), k, v.detach()], asked="flash").sum(), k)
    # Both run PyTorch's kernel on the same numbers.
    assert torch.equal(found, expected)


def test_it_keeps_queries_keys_and_values_alone() -> None:
    inputs, kept = draw(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(inputs)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]


def test_there_is_no_second_backward() -> None:
    inputs = draw()
    (grad,) = torch.autograd.grad(attend(inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_it_is_deterministic_and_the_same_without_gradients() -> None:
    inputs = draw((4, 2))
    expected = attend(inputs)
    assert torch.equal(attend(inputs), expected)
    with torch.no_grad():
        assert torch.equal(attend(inputs), expected)


def test_autocast_around_it_changes_nothing() -> None:
    inputs = draw()
    expected = attend(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(inputs)
        grads = torch.autograd.grad(found.sum(), inputs)
    assert torch.equal(found, expected)
    for f, e in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.equal(f, e)


def test_checks_of_a_rewrite_run_in_high_precision() -> None:
    inputs = draw()
    with high_precision():
        assert torch.equal(attend(inputs), attend(inputs, asked="pytorch"))
        with pytest.raises(AttentionRefused):
            attend([t.double() for t in inputs])


def plain(**changes: Any) -> Call:
    call = Call(CPU, torch.bfloat16, (2,), (4, 4), (16, 16), (32, 32))
    return call._replace(**changes)


REFUSED = {
    "float64": ({"dtype": torch.float64}, "its inputs are float64"),
    "three dims": ({"batch": ()}, "four dims, not of 3"),
    "mask": ({"mask": ((16, 16), torch.bool, False)}, "it takes no mask, and this is boolean"),
    "dropout": ({"dropout_p": 0.1}, "no dropout, and this is 0.1"),
    "wide": ({"head_dims": (272, 272)}, "272 channels"),
    "odd": ({"head_dims": (40, 40)}, "multiple of 16 up to 256"),
    "other values": ({"head_dims": (64, 32)}, "64 channels for queries and 32 for values"),
    "not grouped": ({"heads": (4, 2)}, "4 heads of queries cannot share 2"),
    "no multiple": ({"heads": (4, 3), "is_grouped": True}, "4 heads of queries cannot share 3"),
    "no queries": ({"tokens": (0, 16)}, "no queries or keys"),
    "no samples": ({"batch": (0,)}, "no queries or keys"),
    "causal": ({"tokens": (8, 16), "is_causal": True}, "causal with 8 queries and 16 keys"),
}


@pytest.mark.parametrize("changes, part", REFUSED.values(), ids=REFUSED)
def test_reasons(changes: dict[str, Any], part: str) -> None:
    (why,) = refusals(plain(**changes))
    assert part in why


def test_what_is_taken() -> None:
    for changes in (
        {"dtype": torch.float16, "head_dims": (256, 256)},
        {"heads": (4, 1), "is_grouped": True, "tokens": (3, 7)},
        {"is_causal": True, "needs_grad": True},
        {"is_dense": False},
    ):
        assert not [*refusals(plain(**changes))]


def test_all_reasons_are_in_the_error() -> None:
    q, k, v = (t.double() for t in draw(head_dim=24))
    with pytest.raises(AttentionRefused) as caught:
        attention(q, k, v[:1], torch.ones(40, 40), 0.1, False, None, False, None, NATIVE)
    text = str(caught.value)
    assert text.startswith("attention='fp8' cannot run q [2, 4, 40, 24]")
    assert "attention='auto'" in text
    for part in (
        *("float64", "no mask, and this is additive", "dropout", "24 channels", "other batches"),
        "it may not be emulated and needs compute capability 9.0",
    ):
        assert sum(part in why for why in caught.value.reasons) == 1, (part, text)


def test_a_compiled_graph_with_other_sizes_is_refused_as_well() -> None:
    codes = quantized(draw(tokens=(40, 24)))
    with pytest.raises(AttentionRefused, match="causal with 40 queries and 24 keys"):
        scaled_attention(*codes, True, SCALE, torch.float32)


def test_it_is_chosen_by_name_alone() -> None:
    assert NAME not in BACKENDS and named(NAME) == named(NATIVE) == NAME
    assert steers(NAME, CPU) and not steers("auto", CPU) and not steers("pytorch", CPU)
    assert not any(row.backend == NAME for rows in TABLE.values() for row in rows)
    on_cpu = "forward alone, as the recipe says, emulated for want of compute capability 9.0"
    assert choose(NAME, plain) == Choice(NAME, on_cpu)
    backend, why = choose(NAME, plain, "h100")
    assert backend == NAME and "compute capability 9.0 and flash-attention 3 run it" in why


def test_what_the_units_lack(monkeypatch) -> None:
    """On Hopper what PyTorch lacks, then the package; the emulation until all is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    device = torch.device("cuda")
    assert scaled.missing(CPU) == scaled.missing(device) == "compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "activate_flash_attention_impl('FA3')" in str(scaled.missing(device))
    with monkeypatch.context() as older:
        flash = SimpleNamespace(overloads=lambda: ["default"])
        older.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
        assert "a PyTorch with" in str(scaled.missing(device))
    monkeypatch.setattr(of_torch, "current_flash_attention_impl", lambda: "FA3")
    assert scaled.missing(device) is None
    on_units = "forward alone, as the recipe says, by flash-attention 3"
    assert choose(NAME, lambda: plain(device=device)) == Choice(NAME, on_units)


def test_the_units_get_codes_and_scales_and_return_bf16(monkeypatch) -> None:
    """As `_scaled_dot_product_attention_quantized` of PyTorch calls the kernel. It wants the
    result's layout to be that of the codes, which is what linears read without a copy."""
    calls = []

    def flash(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.append((args, options))
        return (scaled.emulated(*args[:6], args[7], options["scale"], torch.bfloat16),)

    packet = SimpleNamespace(quantized=flash)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", packet)
    inputs = draw((4, 2))
    expected = attend(inputs, True)
    monkeypatch.setattr(scaled, "missing", lambda device: None)
    found = attend(inputs, True)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert found.transpose(1, 2).is_contiguous()
    ((q, k, v, *scales, dropout_p, is_causal, wants_mask), options) = calls[0]
    assert [t.dtype for t in (q, k, v)] == [torch.float8_e4m3fn] * 3
    assert [(t.shape, t.dtype) for t in scales] == [((2, 2), torch.float32)] * 3
    assert (dropout_p, is_causal, wants_mask, options) == (0.0, True, False, {"scale": SCALE})


def test_opcheck() -> None:
    """Without the test of the schema, which compares tensors by an op that FP8 lacks on a CPU."""
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for heads in HEADS.values():
        inputs, grouped = draw(heads), heads[0] != heads[1]
        call = (*inputs, None, 0.0, True, SCALE, grouped, None, NAME)
        # A composite has no fake of its own.
        torch.library.opcheck(attention, call, test_utils=checks[::2])
        detached = [t.detach() for t in inputs]
        torch.library.opcheck(quantize_heads, tuple(detached), test_utils=checks)
        codes = (*quantize_heads(*detached), True, SCALE, torch.bfloat16)
        torch.library.opcheck(scaled_attention, codes, test_utils=checks)


def test_flops_are_those_of_both_products() -> None:
    codes = quantized(draw((4, 2), (40, 24)))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        scaled_attention(*codes, False, SCALE, torch.bfloat16)
    assert counted.get_total_flops() == 2 * 2 * 4 * 40 * 24 * (32 + 32)
