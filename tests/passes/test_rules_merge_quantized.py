"""Quantized linears and what makes their input, as one autograd node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.backends.capture import capture
from fxopt.backends.options import rules_for
from fxopt.recipes import RECIPES
from tests.passes.rewriting import RULES, Rewritten, Written, normal

D = 64


def rewritten(forward: Any, *inputs: Tensor, recipe: str = "fp8_rowwise") -> Rewritten:
    names = {"q": (D, D), "k": (48, D), "down": (D, 2 * D), "bias": (D,)}
    parameters = {name: normal(*size, seed=i) for i, (name, size) in enumerate(names.items())}
    module = Written(forward, **parameters)
    rules = rules_for(RECIPES[recipe], block="block")
    return Rewritten(module, capture(module, module.forward, inputs, {}, rules))


def normed(m: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y = F.layer_norm(x, (D,)) * (1 + scale[:, None])
    return F.linear(y, m.q, m.bias), F.linear(y, m.k)


def test_a_norm_and_its_linears() -> None:
    found = rewritten(normed, normal(2, 5, D), normal(2, D))
    code = found.code()
    assert "fxopt.norm_modulate_quantized_linears(" in code and "'fp8_rowwise'" in code
    assert "fxopt.quantized_linears" not in code
    assert [found.count(n) for n in ("norm_modulate", "quantized_linear", "merge_quantized")] == [
        1,
        2,
        1,
    ]
    (merged,) = (a for a in found.plan.outcome.applied if a.rule == "merge_quantized")
    assert (merged.tier, merged.provider) == ("low_precision", "native")


@pytest.mark.parametrize("dim", [-1, 1])
def test_an_activation_and_what_is_joined_before_it(dim: int) -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, F.gelu(y)], dim)
        return F.linear(both, m.down if dim == -1 else m.q)

    found = rewritten(forward, normal(2, 5, D), normal(2, 5, D))
    fused = "fxopt.gated_activation_quantized_linear(" in found.code()
    assert fused == (dim == -1) and found.count("merge_quantized") == int(fused)


def test_a_normed_tensor_that_others_read_stays() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.layer_norm(x, (D,))
        return F.linear(y, m.q), y.sin()

    found = rewritten(forward, normal(2, 5, D))
    assert "fxopt.quantized_linears(" in found.code()
    (why,) = found.reasons("merge_quantized")
    assert "is also used by sin" in why


def test_the_residual_is_read_from_the_node() -> None:
    """Its gradient is then added in the norm's own pass."""

    def forward(m: Any, x: Tensor) -> Tensor:
        branch = F.linear(F.layer_norm(x, (D,)), m.q)
        return F.layer_norm(x + branch, (D,))

    code = rewritten(forward, normal(2, 5, D)).code()
    assert "norm_modulate_quantized_linears[1]" in code


@pytest.mark.parametrize("expected", [True, False])
def test_what_attention_made_is_kept_as_it_is(expected: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return F.linear(out if expected else out * 2, m.q)

    code = rewritten(forward, normal(2, 5, D)).code()
    assert f"[None], 'fp8_rowwise', {expected}, [0, 0, 64])" in code.replace("\n    ", " ")


def test_other_recipes_and_none() -> None:
    inputs = normal(2, 5, D), normal(2, D)
    found = rewritten(normed, *inputs, recipe="mxfp8")
    assert found.count("merge_quantized") == 1
    found = rewritten(normed, *inputs, recipe="bf16")
    assert not found.count("merge_quantized") and found.count("merge_linears") == 1
    assert not RULES["merge_quantized"].compiled
