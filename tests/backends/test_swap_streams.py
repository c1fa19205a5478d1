"""The third door where streams share launches and gated residuals add biases: where they must not.

That they do, and how often in each family, is in test_swap.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.backends.eager import swap
from fxopt.backends.swaps import merged
from fxopt.backends.swaps.branches import Branch
from fxopt.backends.swaps.fused import Normed, counting
from fxopt.recipes import RECIPES
from tests.backends.swapping import COUNTS, same
from tests.families import FAMILIES, Family, outputs, project
from tests.passes.rewriting import normal

D = 32


@pytest.fixture
def flux() -> Family:
    return FAMILIES["flux"]


@pytest.mark.parametrize("recipe", ["fp8", "fp8_rowwise", "mxfp8"])
def test_counts_under_a_recipe_are_those_of_optimize(flux: Family, recipe: str) -> None:
    """Quantized linears keep their biases, and share launches as those in bf16 do."""
    inputs = flux.inputs(2, 0, torch.float32)
    model = fxopt.optimize(flux.build(), recipe=recipe, example_inputs=inputs)
    counts = fxopt.report(swap(flux.build(), recipe=recipe)).counts()
    assert counts == fxopt.report(model).counts()
    assert "fuse_bias" not in counts
    # And what attention gives to both streams is cast together, in each of two blocks.
    assert counts["merge_streams"] == COUNTS["flux"]["merge_streams"] + 2


def test_dual_attention_under_a_recipe_shares_what_optimize_shares() -> None:
    family = FAMILIES["sd3.5"]
    inputs = family.inputs(2, 0, torch.float32)
    model = fxopt.optimize(family.build(), recipe="fp8", example_inputs=inputs)
    count = fxopt.report(swap(family.build(), recipe="fp8")).count("merge_streams")
    # In the last of five blocks the text goes no further than attention.
    assert count == fxopt.report(model).count("merge_streams")
    assert count == COUNTS["sd3.5"]["merge_streams"] + 4


def test_streams_of_which_one_is_quantized(flux: Family) -> None:
    """The text's linears stay as they are: their biases move, and norms do not join."""
    keep = ("transformer_blocks.*.ff_context.*", "*.to_add_out", "*.add_?_proj")
    recipe = dataclasses.replace(RECIPES["fp8"], name="image", keep=keep)
    inputs = flux.inputs(2, 0, torch.float32)
    model = fxopt.optimize(flux.build(), recipe=recipe, example_inputs=inputs)
    counts = fxopt.report(swap(flux.build(), recipe=recipe)).counts()
    assert counts["fuse_bias"] == 6  # of the text, in two blocks
    assert counts == fxopt.report(model).counts()


@pytest.mark.parametrize("target", ["to_add_out", "net.2", "to_k"])
def test_lora(flux: Family, target: str) -> None:
    """A wrapped linear keeps its bias, and its stream the launches of its own."""
    from peft import LoraConfig, inject_adapter_in_model

    def wrap(model: nn.Module) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        inject_adapter_in_model(config, model)

    fired = same(flux.build(), flux, wrap)
    lost = {
        "to_add_out": {"fuse_bias": 2},  # of the text, in two blocks
        "net.2": {"fuse_bias": 8, "merge_streams": 2},  # of both its linears; activations
        "to_k": {"merge_streams": 2},  # norms before attention
    }[target]
    for rule in ("fuse_bias", "merge_streams"):
        assert fired[rule] == COUNTS["flux"][rule] - lost.get(rule, 0)


class Ops(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[op._schema.name] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("door", [swap, fxopt.optimize])
def test_nothing_goes_back_to_a_frozen_stream(
    flux: Family, door: Callable[[nn.Module], nn.Module]
) -> None:
    """An adapter on the image's values: texts, queries and keys of the first block are constant."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r".*\.to_v", init_lora_weights=False)
    model = inject_adapter_in_model(config, flux.build())
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    for p in model.parameters():
        p.requires_grad_(any(p is adapter for adapter in adapters))
    inputs = flux.inputs(2, 0, torch.float32)
    expected = torch.autograd.grad(project(outputs(model, inputs)), adapters)
    door(model)
    outputs(model, inputs)
    loss = project(outputs(model, inputs))
    with Ops() as ops:
        found = torch.autograd.grad(loss, adapters)
    num_blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    assert ops.counts["fxopt::qk_norm_rope_backward"] == num_blocks - 1
    # Roundings of fp32 in four blocks, of gradients that are sums over all tokens.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "ltx"])
def test_frozen_biases(name: str) -> None:
    def freeze(model: nn.Module) -> None:
        for path, p in model.named_parameters():
            p.requires_grad_(not path.endswith("bias"))

    assert same(FAMILIES[name].build(), FAMILIES[name], freeze) == COUNTS[name]


def test_a_dropout_behind_the_linear_keeps_its_bias(flux: Family) -> None:
    model = flux.build()
    for block in model.transformer_blocks:
        block.attn.to_out[1].p = 0.5
    counts = fxopt.report(swap(model)).counts()
    assert counts["fuse_bias"] == COUNTS["flux"]["fuse_bias"] - 2
    assert counts["merge_streams"] == COUNTS["flux"]["merge_streams"]


def test_wide_rows_keep_the_bias_of_the_gated_norm() -> None:
    """By the width of the module, not of the narrow replica that is proved: nothing is held."""
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    counts = []
    for heads in (48, 49):  # 6144 and 6272 features
        with torch.device("meta"):
            block = FluxTransformerBlock(heads * 128, heads, 128)
        model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
        counts.append(fxopt.report(swap(model)).count("fuse_bias"))
    assert counts == [6, 4]


def gated(*dtypes: torch.dtype, widths: Sequence[int]) -> tuple[list[torch.Tensor], int]:
    streams = [
        [normal(2, 5, n, dtype=d, seed=s) for s in range(3)]
        for n, d in zip(widths, dtypes, strict=True)
    ]
    residuals, gates, xs = zip(*streams, strict=True)
    with counting() as fired:
        branches = [Branch(x) for x in xs]
        found = merged.gated_residuals(residuals, gates, branches, [None] * len(xs))
    for r, g, x, out in zip(residuals, gates, xs, found, strict=True):
        # One rounding of each of two steps.
        torch.testing.assert_close(out, r + g * x, rtol=2 * torch.finfo(r.dtype).eps, atol=1e-2)
        assert out.dtype == r.dtype
    return found, sum(rule == "merge_streams" for rule, _ in fired)


def test_streams_of_other_widths_or_dtypes_run_apart() -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    assert gated(fp32, fp32, widths=(D, D))[1] == 1
    assert gated(fp32, fp32, widths=(D, 2 * D))[1] == 0
    assert gated(fp32, bf16, widths=(D, D))[1] == 0
    assert gated(fp32, bf16, fp32, widths=(D, D, D))[1] == 1  # the first and the third


def test_streams_of_other_norms_run_apart() -> None:
    linears = [[nn.Linear(D, D)], [nn.Linear(D, D)]]
    x, text = normal(2, 5, D), normal(2, 3, D)
    for norm, launches in ((nn.LayerNorm(D, 1e-5), 1), (nn.RMSNorm(D, 1e-6), 0)):
        norms = nn.LayerNorm(D, eps=1e-6), norm
        normed = [Normed(n, t) for n, t in zip(norms, (x, text), strict=True)]
        with counting() as fired:
            found = merged.into(normed, linears)
        assert sum(rule == "merge_streams" for rule, _ in fired) == launches
        for ((out,), _), n, t, (linear,) in zip(found, norms, (x, text), linears, strict=True):
            # 1e-5: fp32 through a norm and a product of 32 terms.
            torch.testing.assert_close(out, linear(n(t)), rtol=1e-5, atol=1e-5)


def test_a_block_of_an_unknown_class_says_why(flux: Family) -> None:
    """Its parts are swapped; streams meet in a forward that swap does not see."""
    model = flux.build()
    block = model.transformer_blocks[0]
    kind = type(block)

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        return kind.forward(self, *args, **kwargs)

    block.__class__ = type("Own", (kind,), {"forward": forward})
    report = fxopt.report(swap(model, targets=["transformer_blocks.0"]))
    declined = {d.rule: d for d in report.declined}
    assert "in the forward of Own" in declined["merge_streams"].reasons[0]
    assert "optimize" in declined["merge_streams"].remedy
    assert report.count("fuse_bias") == 2  # within its MLPs
