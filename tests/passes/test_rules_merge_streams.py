"""The norms of two streams to one op: launches, gradients, and what stays apart.

Shapes: B batch, S image tokens, T text tokens, D features.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from fxopt.backends.capture import capture
from fxopt.backends.options import rules_for
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears_streams
from fxopt.recipes import RECIPES
from tests.passes.rewriting import RULES, Rewritten, Written, normal, rewrite

D = 32


def rewritten(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    names = ["norm_modulate", "fuse_bias", "merge_linears", "merge_streams"]
    return rewrite(Written(forward, **parameters), *inputs, rules=names)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = {n: normal(D, D, dtype=dtype, seed=i) / 4 for i, n in enumerate("qkvo")}
    return weights | {"b": normal(D, dtype=dtype)}


def inputs(dtype: torch.dtype = torch.float32, B: int = 2, S: int = 7, T: int = 3) -> list[Tensor]:
    """Image, text and two modulations."""
    shapes = (B, S, D), (B, T, D), (B, D), (B, D)
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def normed(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, (D,), eps=eps) * (1 + scale[:, None])


def before_attention(m, x: Tensor, text: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    n, n_text = normed(x, a), normed(text, b, 1e-5)
    return F.linear(n, m.q, m.b), F.linear(n, m.k), F.linear(n_text, m.v)


def after_attention(m, x: Tensor, text: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    h, h_text = x + a[:, None] * F.linear(x, m.o, m.b), text + b[:, None] * F.linear(text, m.v)
    return h + F.linear(normed(h, a), m.q), h_text + F.linear(normed(h_text, b), m.k)


def other_offsets(m, x, text, a, b):
    n_text = F.layer_norm(text, (D,), eps=1e-6) * b[:, None]
    return F.linear(normed(x, a), m.q), F.linear(n_text, m.k)


def ends(m, x: Tensor, text: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return x + a[:, None] * F.linear(x, m.o, m.b), text + b[:, None] * F.linear(text, m.v, m.b)


def block(m, x: Tensor, text: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """A joint block: norms, attention, gated residuals, norms, MLPs, gated residuals."""
    q, k, v = before_attention(m, x, text, a, b)
    joint = [torch.cat([v, t], 1)[:, None] for t in (q, k, q)]
    attended = F.scaled_dot_product_attention(*joint)[:, 0]
    parts = attended.split([text.shape[1], x.shape[1]], 1)
    h, h_text = (
        x + a[:, None] * F.linear(parts[1], m.o),
        text + b[:, None] * F.linear(parts[0], m.o),
    )
    mlp, mlp_text = (F.linear(F.gelu(F.linear(normed(t, a), m.q)), m.k) for t in (h, h_text))
    return h + a[:, None] * mlp, h_text + b[:, None] * mlp_text


def test_norms_before_attention():
    found = rewritten(before_attention, *inputs(), **parameters())
    assert found.count("norm_modulate") == found.count("merge_linears") == 2  # as without the merge
    assert found.count("merge_streams") == 1
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_2, 1)
unsqueeze_1 = aten.unsqueeze(inputs_3, 1)
norm_modulate_linears_streams = fxopt.norm_modulate_linears_streams([inputs_0, inputs_1], [None,
    None], [None, None], [None, None], [None, None], [unsqueeze, unsqueeze_1], [None, None],
    [None, None], 'layer', [1e-06, 1e-05], [0.0, 0.0], [1.0, 1.0], float32, float32, [p_q, p_k,
    p_v], [p_b, None, None], [2, 1], [0, 0, 32, 1, 0, 32, 0, 0, 32], [2, 1])
getitem_7 = norm_modulate_linears_streams[0]
getitem_9 = getitem_7[0]
getitem_10 = getitem_7[1]
getitem_11 = getitem_7[2]
return (getitem_9, getitem_10, getitem_11)""",
    )


def test_gated_residuals_at_the_end():
    found = rewritten(ends, *inputs(), **parameters())
    assert found.count("merge_streams") == 1
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_2, 1)
linear = aten.linear(inputs_0, p_o)
linear_1 = aten.linear(inputs_1, p_v)
unsqueeze_1 = aten.unsqueeze(inputs_3, 1)
norm_modulate_linears_streams = fxopt.norm_modulate_linears_streams([linear, linear_1],
    [inputs_0, inputs_1], [unsqueeze, unsqueeze_1], [None, None], [None, None], [None, None],
    [None, None], [p_b, p_b], 'none', [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], float32, float32, [],
    [], [0, 0], [], [0, 0])
getitem_5 = norm_modulate_linears_streams[1]
getitem_6 = getitem_5[0]
getitem_7 = getitem_5[1]
return (getitem_6, getitem_7)""",
    )


@pytest.mark.parametrize("forward", [before_attention, after_attention, other_offsets, ends])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(forward, dtype: torch.dtype):
    found = rewritten(forward, *inputs(dtype), **parameters(dtype))
    assert found.count("merge_streams") == 1
    found.assert_as_accurate(*inputs(dtype, 3, 37, 11))


def test_activations():
    def forward(m, x, text, a, b):
        return F.linear(F.gelu(x), m.q), F.linear(F.gelu(text), m.k, m.b)

    found = rewrite(Written(forward, **parameters()), *inputs())
    assert found.count("gated_activation") == found.count("merge_linears") == 2
    assert found.count("merge_streams") == 1
    assert_expected_inline(
        found.code(),
        """\
gated_activation_linear_streams = fxopt.gated_activation_linear_streams([inputs_0, inputs_1],
    [None, None], 'gelu_erf', 'none', [None, None], [None, None], [p_q, p_k], [None, p_b])
getitem = gated_activation_linear_streams[0]
getitem_1 = gated_activation_linear_streams[1]
return (getitem, getitem_1)""",
    )
    found.assert_as_accurate(*inputs(B=1, S=6, T=4))


def test_activations_of_other_kinds_stay():
    def forward(m, x, text, a, b):
        return F.linear(F.gelu(x), m.q), F.linear(F.silu(text), m.k)

    found = rewrite(Written(forward, **parameters()), *inputs())
    assert found.count("gated_activation") == 2 and not found.count("merge_streams")


def test_attention_is_not_crossed():
    found = rewritten(block, *inputs(), **parameters())
    assert found.count("merge_streams") == 3
    calls = found.plan.gm.graph.find_nodes(op="call_function", target=norm_modulate_linears_streams)
    attention = found.plan.gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert [call > attention[0] for call in calls] == [False, True, True]
    found.assert_as_accurate(*inputs(B=1, S=6, T=4))


def test_quantized_products_count_as_steps():
    """The image's products are quantized, the text's have a size that no unit takes."""

    def forward(m, x, text, a, b):
        branch = F.linear(F.linear(x, m.q), m.k)
        branch_text = F.linear(F.linear(text, m.up), m.down)
        return x + a[:, None] * branch, text + b[:, None] * branch_text

    module = Written(forward, **parameters(), up=normal(36, D) / 4, down=normal(D, 36) / 4)
    rules = rules_for(RECIPES["fp8_rowwise"], block="block")
    found = Rewritten(module, capture(module, module.forward, tuple(inputs()), {}, rules))
    assert found.count("quantized_linear") == 2
    assert found.count("merge_streams") == 1


def low(forward, recipe: str) -> Rewritten:
    """What the rules of a recipe make of it, as of a block of a model."""
    module = Written(forward, **parameters())
    rules = rules_for(RECIPES[recipe], block="block")
    return Rewritten(module, capture(module, module.forward, tuple(inputs()), {}, rules))


def test_quantized_norms():
    found = low(before_attention, "fp8_rowwise")
    assert found.count("merge_quantized") == 2 and found.count("merge_streams") == 1
    assert_expected_inline(
        found.code(),
        """\
unsqueeze = aten.unsqueeze(inputs_2, 1)
unsqueeze_1 = aten.unsqueeze(inputs_3, 1)
norm_modulate_quantized_linears_streams =
    fxopt.norm_modulate_quantized_linears_streams([inputs_0, inputs_1], [None, None], [None,
    None], [None, None], [None, None], [unsqueeze, unsqueeze_1], [None, None], [None, None],
    'layer', [1e-06, 1e-05], [0.0, 0.0], [1.0, 1.0], float32, float32, [p_q, p_k, p_v], [p_b,
    None, None], [2, 1], 'fp8_rowwise', [0, 0, 32, 1, 0, 32, 0, 0, 32], [2, 1])
getitem_10 = norm_modulate_quantized_linears_streams[0]
getitem_12 = getitem_10[0]
getitem_13 = getitem_10[1]
getitem_14 = getitem_10[2]
return (getitem_12, getitem_13, getitem_14)""",
    )


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8"])
def test_a_quantized_block(recipe: str):
    """Norms, attention's results, norms behind residuals, activations, residuals."""
    found = low(block, recipe)
    assert found.count("merge_streams") == 5
    code = found.code()
    for op in ("norm_modulate_quantized_linears", "quantized_linears"):
        assert f"fxopt.{op}_streams(" in code and f"fxopt.{op}(" not in code
    outs, exact = found(*inputs()), Written(block, **parameters())(*inputs())
    for out, expected in zip(outs, exact, strict=True):
        # Four products deep, each of 27 dB.
        assert (out - expected).norm() < 0.1 * expected.norm()


def test_streams_in_other_formats_stay_apart_and_say_so():
    recipe = replace(
        RECIPES["fp8_rowwise"], name="two", overrides=(("*.v", RECIPES["fp8_tensorwise"]),)
    )

    class Two(Written):
        """Its linears are modules, so that a recipe knows them by name."""

        def __init__(self) -> None:
            super().__init__(lambda m, x, text, a, b: None)
            self.q, self.v = torch.nn.Linear(D, D), torch.nn.Linear(D, D)

        def forward(self, x: Tensor, text: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return self.q(normed(x, a)), self.v(normed(text, b))

    module = Two()
    rules = rules_for(recipe, block="block")
    found = Rewritten(module, capture(module, module.forward, tuple(inputs()), {}, rules))
    assert found.count("quantized_linear") == 2 and not found.count("merge_streams")
    assert all("in other formats" in why for why in found.reasons("merge_streams"))
    assert found.reasons("merge_streams")


def test_one_stream_goes_on_alone():
    """As in the last joint block: the text is normed for attention and then dropped."""

    def forward(m, *inputs):
        return block(m, *inputs)[0]

    found = rewritten(forward, *inputs(), **parameters())
    assert found.count("merge_streams") == 1
    found.assert_as_accurate(*inputs(B=1, S=6, T=4))


def test_what_makes_a_stream_without_a_gradient_gets_none():
    """As the text's MLP in the last joint block of a model that drops the text after it."""

    def forward(m, x, text, a, b):
        mlp = F.linear(F.gelu(F.linear(x, m.q, m.b)), m.k)
        mlp_text = F.linear(F.gelu(F.linear(text, m.v)), m.o)
        return x + a[:, None] * mlp, text + b[:, None] * mlp_text

    module = Written(forward, **parameters())
    found = rewrite(module, *inputs())
    assert found.count("merge_streams") == 2  # activations, gated residuals
    for i, j in ((0, 1), (1, 0)):
        leaves = [*inputs(), *module.parameters()]
        grads, expected = (
            torch.autograd.grad(f(*leaves[:4])[i].sum(), leaves, allow_unused=True)
            for f in (found, module)
        )
        assert [g is None for g in grads] == [g is None for g in expected]
        assert grads[i] is not None and grads[j] is None
        # fp32: the same sums in another order.
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_three_streams():
    """Two norms of one tensor and one of another, as before dual attention.

    What goes on with x comes out of the one node, which then sees all gradients of x but those of
    the other norm of it.
    """

    def forward(m, x, text, a, b):
        three = normed(x, a), normed(text, b), normed(x, b)
        q, k, v = (F.linear(n, w) for n, w in zip(three, (m.q, m.k, m.v), strict=True))
        return x + a[:, None] * F.gelu(q + v), k

    found = rewritten(forward, *inputs(), **parameters())
    assert found.count("merge_streams") == 1
    assert "fxopt.norm_modulate(gelu, getitem_" in found.code()
    found.assert_as_accurate(*inputs(B=1, S=4, T=9))


def test_frozen_linears():
    module = Written(after_attention, **parameters()).requires_grad_(False)
    found = rewrite(module, *inputs())
    assert found.count("merge_streams") == 1
    found.assert_as_accurate(*inputs())


def test_under_a_checkpoint():
    found = rewritten(after_attention, *inputs(), **parameters())
    found.assert_as_accurate(*inputs(), recomputed=True)


def in_sequence(m, x, text, a, b):
    first = F.linear(normed(x, a), m.q)
    return F.linear(normed(first, b), m.k)


def other_norms(m, x, text, a, b):
    n_text = F.rms_norm(text, (D,), eps=1e-6) * (1 + b[:, None])
    return F.linear(normed(x, a), m.q), F.linear(n_text, m.k)


def used_by_others(m, x, text, a, b):
    n = normed(x, a)
    return F.linear(n, m.q), n.sin(), F.linear(normed(text, b), m.k)


def other_widths(m, x, text, a, b):
    half = D // 2
    n_text = F.layer_norm(text[..., :half], (half,), eps=1e-6) * (1 + b[:, None, :half])
    return F.linear(normed(x, a), m.q), F.linear(n_text, m.k[:, :half])


NEAR_MISSES = {
    "one after the other": in_sequence,
    "other norms": other_norms,
    "the normed tensor has another user": used_by_others,
    "other widths": other_widths,
    "one stream": lambda m, x, text, a, b: F.linear(normed(x, a), m.q),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str):
    found = rewritten(NEAR_MISSES[name], *inputs(), **parameters())
    assert not found.count("merge_streams"), found.code()
    found.assert_as_accurate(*inputs())


def test_a_write_between():
    def forward(m, x, text, a, b):
        first = F.linear(normed(x, a), m.q)
        text = text * 1
        text.add_(1)
        return first, F.linear(normed(text, b), m.k)

    module = Written(forward, **parameters()).requires_grad_(False)
    found = rewrite(module, *inputs())
    assert not found.count("merge_streams")
    torch.testing.assert_close(found(*inputs()), module(*inputs()))


def test_a_compiler_is_not_given_it():
    assert not RULES["merge_streams"].compiled
