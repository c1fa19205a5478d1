"""`Recipe(attention="fp8")` in every door: the forward is in FP8, explicitly or not at all."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import errors
from fxopt.backends import compiled_graphs
from fxopt.backends.swaps.attending import Attending, attend, attending
from fxopt.kernels import scaled_attention as scaled
from fxopt.kernels.attention import attention
from fxopt.kernels.quantize_heads import quantize_heads
from fxopt.recipe_errors import AttentionRefused
from fxopt.recipes import RECIPES
from tests.backends.attention_doors import (
    DOORS,
    UNCOMPILED,
    Door,
    asking,
    compiled,
    kernels,
    lines,
    optimized,
    small,
)
from tests.backends.toys import Block, captures, stack, tokens
from tests.families import FAMILIES, loss
from tests.numerics import Tensors, relative_l2, run

RECIPE = asking("fp8")
EMULATED = (
    "attention: fp8; forward alone, as the recipe says, emulated for want of compute capability 9.0"
)
# A step between two codes is 2^-3 of a value at most. fp32 sums in another order tip one code in
# 2^20 / 2^4 or so over to its neighbour, here perhaps one in a tensor: 2^-3 of one in a thousand.
TIPPED = 5e-4
# Of a tiny model's codes, some 40,000, one that tips in an early block shows: on one input in six.
# A fault shows on all of these: batch sizes, each with values of its own.
BATCHES = (2, 3, 4, 5)
pytestmark = pytest.mark.usefixtures("fresh")


def in_fp8(model: nn.Module, inputs: dict[str, Any]) -> Tensors:
    """What the model's own code gives with its attention in FP8 and nothing else changed."""

    def instead(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        given = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False} | options
        return attention(query, key, value, attn_mask, *given.values(), None, "fp8")

    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Not in the backward, which calls the real one.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(F, "scaled_dot_product_attention", instead)
            return own(*args, **kwargs)

    model.forward = forward
    return run(model, inputs)


@cache
def expected(name: str, batch: int = 2) -> tuple[Tensors, Tensors]:
    """In FP8, and in the model's dtype."""
    family = FAMILIES[name]
    inputs = family.inputs(batch, 0, torch.float32)
    return in_fp8(family.build(), inputs), run(family.build(), inputs)


def assert_family_in_fp8(model: nn.Module, name: str) -> None:
    """On the first inputs of which no code tips."""
    for batch in BATCHES:
        try:
            found = run(model, FAMILIES[name].inputs(batch, 0, torch.float32))
            return assert_in_fp8(found, *expected(name, batch))
        except AssertionError:
            if batch == BATCHES[-1]:
                raise


def assert_in_fp8(found: Tensors, low: Tensors, plain: Tensors | None = None) -> None:
    sizes = {name: t.double().norm() for name, t in low.items() if t is not None}
    # What is smaller is left after cancellation, as gradients of keys' biases, which are zero.
    least = 1e-3 * max(size for name, size in sizes.items() if name.startswith("gradient"))
    for name, tensor in low.items():
        actual = found[name]
        assert (actual is None) == (tensor is None), name
        if actual is not None and tensor is not None:
            error = (actual.double() - tensor.double()).norm() / max(sizes[name], least)
            assert error < TIPPED, (name, error)
    if plain is not None:
        # Rounding to e4m3 is felt in every output: the comparison tells the two apart.
        output, low_output = plain["output 0"], low["output 0"]
        assert output is not None and low_output is not None
        assert relative_l2(low_output, output.double()) > 10 * TIPPED


@pytest.mark.parametrize("door", DOORS)
def test_flux(door: Door) -> None:
    family = FAMILIES["flux"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    door(model, RECIPE)
    assert_family_in_fp8(model, "flux")
    assert set(lines(model)) == {EMULATED}
    assert kernels(partial(loss, model, inputs))["fp8"] == 4
    if door is not compiled:  # which would compile it again
        with torch.no_grad():
            assert kernels(partial(loss, model, inputs))["fp8"] == 4


@pytest.mark.parametrize("door", UNCOMPILED)
def test_llama_shares_keys_and_scales(door: Door) -> None:
    family = FAMILIES["llama-sdpa"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    door(model, RECIPE)
    assert_family_in_fp8(model, "llama-sdpa")
    assert set(lines(model)) == {EMULATED}
    assert kernels(partial(loss, model, inputs))["fp8"] == 2


def test_a_mask_is_refused_unless_it_is_known_to_be_causal() -> None:
    """Where it is traced, transformers makes the mask of a whole sequence a tensor."""
    family = FAMILIES["llama-sdpa"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    compiled(model, RECIPE)
    loss(model, inputs)
    assert set(lines(model)) == {EMULATED}
    is_token = torch.ones_like(inputs["input_ids"])
    with pytest.raises(AttentionRefused, match="it takes no mask, and this is boolean"):
        loss(model, inputs | {"attention_mask": is_token})
    model = FAMILIES["qwen-image"].build()
    optimized(model, RECIPE)
    with pytest.raises(AttentionRefused, match="it takes no mask, and this is padding"):
        loss(model, FAMILIES["qwen-image"].inputs(2, 0, torch.float32))


class Grouped(Block):
    """Two heads of queries share one of keys and values, and see what came before."""

    def attend(self, x_BSC: Tensor) -> Tensor:
        q, k, v = (f(x_BSC) for f in (self.attn.to_q, self.attn.to_k, self.attn.to_v))
        heads = [t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k[..., :16], v[..., :16])]
        x_BHSD = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.attn.to_out(x_BHSD.transpose(1, 2).flatten(2))

    def forward(self, x_BSC: Tensor) -> Tensor:
        return x_BSC + self.attend(self.norm1(x_BSC))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_compiled_graphs_take_all_sizes(inner: str) -> None:
    """Grouped and causal; AOTAutograd traces the backward's forward as well."""
    model, num_graphs = stack(Grouped), []
    compiled(model, RECIPE, inner, dynamic=True)
    for batch, num_tokens in ((2, 6), (3, 11), (2, 8)):
        inputs = {"x": tokens(batch, num_tokens)}
        assert_in_fp8(run(model, inputs), in_fp8(stack(Grouped), inputs))
        num_graphs.append(len(compiled_graphs.GRAPHS))
    assert len(set(num_graphs)) == 1
    with torch.no_grad():
        model(tokens(2, 8))  # tracing counts as well
        assert kernels(partial(model, tokens(2, 8)))["fp8"] == 2


def test_blocks_that_are_compiled_in_place() -> None:
    model = fxopt.optimize(stack(), recipe=RECIPE, execution="compile")
    inputs = {"x": tokens()}
    assert_in_fp8(run(model, inputs), in_fp8(stack(), inputs), run(stack(), inputs))
    assert set(lines(model)) == {EMULATED}


def test_graphs_take_all_sizes() -> None:
    model = fxopt.optimize(stack(Grouped), recipe=RECIPE)
    for batch, num_tokens in ((2, 6), (1, 11), (3, 8)):
        inputs = {"x": tokens(batch, num_tokens)}
        assert_in_fp8(run(model, inputs), in_fp8(stack(Grouped), inputs))
    assert captures(model) == 1


@pytest.mark.parametrize("door", UNCOMPILED)
def test_a_checkpoint_computes_the_same_again(door: Door) -> None:
    family, results = FAMILIES["flux"], []
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    door(model, RECIPE)
    for num_forwards in (4, 8):
        results.append(run(model, inputs))
        ran = kernels(lambda: loss(model, inputs).backward())
        assert ran["fp8"] == num_forwards
        model.enable_gradient_checkpointing()
    for name, tensor in results[0].items():
        assert tensor is None or torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("door", [optimized, compiled])
def test_under_autocast(door: Door, monkeypatch) -> None:
    model, dtypes = stack(), []

    def noting(*operands: Tensor) -> Any:
        dtypes.extend(t.dtype for t in operands)
        return quantize_heads(*operands)

    monkeypatch.setattr("fxopt.kernels.fp8_attention.quantize_heads", noting)
    door(model, RECIPE)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens())
    # Norms of queries and keys return fp32, which autocast casts for its attention.
    assert dtypes == [torch.bfloat16] * 6
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_swapped_under_autocast() -> None:
    """What it casts for scaled_dot_product_attention it casts for what stands in its place."""
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    for given in ((q, k, v), (q, k, v.bfloat16())):
        with attending(Attending("fp8")), torch.autocast("cpu", torch.bfloat16):
            out = attend(partial(F.scaled_dot_product_attention, *given), q)
        low = (t.bfloat16() for t in given)
        assert torch.equal(out, attention(*low, None, 0.0, False, None, False, None, "fp8"))


@pytest.mark.parametrize("door", UNCOMPILED)
def test_beside_quantized_linears(door: Door) -> None:
    """A recipe has both; what multiplies attention's result then keeps it."""
    family = FAMILIES["flux"]
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    door(model, replace(RECIPES["fp8"], name="mine", attention="fp8"))
    found, (_, plain) = run(model, inputs), expected("flux")
    assert kernels(partial(loss, model, inputs))["fp8"] == 4
    output, exact = found["output 0"], plain["output 0"]
    assert output is not None and exact is not None
    # As `fxopt.diagnose.numerics` allows a model in 8 bits.
    assert relative_l2(output, exact.double()) < 0.06


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_a_recipe_that_may_not_be_emulated(door: Door, context: Any) -> None:
    recipe = replace(RECIPE, emulate=False)
    why = r"'mine' cannot run on cpu, it needs compute capability 9\.0.*emulate=True"
    with pytest.raises(Exception, match=why) as caught, context():
        _, run = small(door, recipe)
        run()
    if door is not compiled:  # Dynamo wraps it
        assert isinstance(caught.value, errors.NotNative)


@pytest.mark.parametrize("door", DOORS)
def test_units_that_are_gone_are_no_emulation(door: Door, monkeypatch) -> None:
    """flash-attention 3 can be taken out again after a door was opened."""
    monkeypatch.setattr("fxopt.backends.precision.missing", lambda device: None)
    _, run = small(door, replace(RECIPE, emulate=False))
    with pytest.raises(AttentionRefused, match="may not be emulated and needs compute cap") as e:
        run()
    assert e.value.backend == "fp8" and scaled.missing(torch.device("cpu"))


class Dropping(Block):
    def forward(self, x_BSC: Tensor) -> Tensor:
        q, k, v = (f(self.norm1(x_BSC)) for f in (self.attn.to_q, self.attn.to_k, self.attn.to_v))
        heads = [t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, dropout_p=0.1)
        return x_BSC + self.attn.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("door", [optimized, compiled])
def test_all_reasons_reach_the_user(door: Door) -> None:
    model = stack(Dropping)
    door(model, RECIPE)
    with pytest.raises(AttentionRefused) as caught:
        model(tokens())
    assert "it has no dropout" in str(caught.value) and "heads have 8 channels" in str(caught.value)


@pytest.mark.usefixtures("attention_backends")
def test_what_a_model_sets_itself_is_not_overridden() -> None:
    family = FAMILIES["flux"]
    model = fxopt.swap(family.build(), recipe=RECIPE)
    model.set_attention_backend("_native_math")
    with pytest.raises(AttentionRefused, match=r"'fp8' cannot run .*backend '_native_math'"):
        loss(model, family.inputs(2, 0, torch.float32))


def test_swap_says_where_it_is_not_reached() -> None:
    model = fxopt.swap(stack(), recipe=replace(RECIPE, attention="fp8"))
    model(tokens())
    why = "swap does not replace the forward of Block that calls it: 'fp8' is not what runs"
    assert set(lines(model)) == {f"attention: PyTorch's own choice; {why}"}


def test_explain_says_what_would_run() -> None:
    report = fxopt.explain(stack(), example_inputs={"x": tokens()}, recipe=RECIPE, target="h100")
    (found,) = report.attentions
    assert found.backend == "fp8"
    assert "compute capability 9.0 and flash-attention 3 run it, others emulate it" in found.why


def test_restore_brings_the_models_dtype_back() -> None:
    model = stack()
    before = model(tokens())
    fxopt.restore(fxopt.optimize(model, recipe=RECIPE))
    assert not kernels(partial(model, tokens()))["fp8"]
    assert torch.equal(model(tokens()), before)
