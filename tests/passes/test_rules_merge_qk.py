"""Queries and keys of one attention to one op, with the biases of their linears.

Shapes: B batch, S tokens, H heads, d head dim, D = H * d.
"""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from fxopt.kernels.qk_norm_rope import qk_norm_rope
from tests.passes.rewriting import RULES, Rewritten, Written, normal, rewrite

# Wide enough for the error of a bias's gradient to be a mean and not one draw.
H, d = 2, 32
D = H * d


def rewritten(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    names = ["rms_norm", "qk_norm_rope", "merge_qk"]
    return rewrite(Written(forward, **parameters), *inputs, rules=names)


def parameters(dtype: torch.dtype = torch.float32, num_keys: int = H) -> dict[str, Tensor]:
    widths = {"q": D, "k": num_keys * d, "v": num_keys * d}
    found = {n: normal(w, D, dtype=dtype, seed=i) / 4 for i, (n, w) in enumerate(widths.items())}
    found |= {f"{n}_bias": normal(w, dtype=dtype, seed=ord(n)) for n, w in widths.items()}
    return found | {f"norm_{n}": normal(d, dtype=dtype, seed=i) for i, n in enumerate("qk")}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (d,), weight, eps=1e-6)


def attention(m, x: Tensor) -> Tensor:
    q, k, v = (
        heads(F.linear(x, w, b)) for w, b in ((m.q, m.q_bias), (m.k, m.k_bias), (m.v, m.v_bias))
    )
    return F.scaled_dot_product_attention(
        norm(q, m.norm_q), norm(k, m.norm_k), v, enable_gqa=q.shape[1] != k.shape[1]
    )


def biases(found: Rewritten) -> list[str | None]:
    """What the one call of the op takes over."""
    (call,) = found.plan.gm.graph.find_nodes(op="call_function", target=qk_norm_rope)
    return [None if bias is None else bias.name for bias in call.args[1]]


def test_one_call_with_the_biases():
    found = rewritten(attention, normal(2, 5, D), **parameters())
    assert found.count("qk_norm_rope") == 2  # as without the merge
    assert found.count("merge_qk") == 1
    assert_expected_inline(
        found.code(),
        """\
linear_2 = aten.linear(inputs_0, p_v, p_v_bias)
unflatten_2 = aten.unflatten.int(linear_2, -1, [-1, 32])
transpose_2 = aten.transpose.int(unflatten_2, 1, 2)
linear = aten.linear(inputs_0, p_q)
unflatten_int = aten.unflatten.int(linear, -1, [-1, 32])
linear_1 = aten.linear(inputs_0, p_k)
unflatten_int_1 = aten.unflatten.int(linear_1, -1, [-1, 32])
qk_norm_rope_2 = fxopt.qk_norm_rope([unflatten_int, unflatten_int_1], [p_q_bias, p_k_bias],
    [p_norm_q, p_norm_k], [None, None], [None, None], [None, None], [1, 1], 'rms', [1e-06,
    1e-06], 0.0, False, 'none', 'channels', 'all', float32)
getitem_4 = qk_norm_rope_2[0]
permute_1 = aten.permute(getitem_4, [0, 2, 1, 3])
getitem_5 = qk_norm_rope_2[1]
permute_3 = aten.permute(getitem_5, [0, 2, 1, 3])
scaled_dot_product_attention = aten.scaled_dot_product_attention(permute_1, permute_3,
    transpose_2)
return (scaled_dot_product_attention,)""",
    )


@pytest.mark.parametrize("num_keys", [1, H], ids=["grouped", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, num_keys: int):
    found = rewritten(attention, normal(2, 5, D, dtype=dtype), **parameters(dtype, num_keys))
    assert found.count("merge_qk") == 1
    found.assert_as_accurate(normal(3, 37, D, dtype=dtype))


def test_cross_attention():
    def forward(m, x, text):
        q, k, v = (heads(F.linear(t, w)) for t, w in ((x, m.q), (text, m.k), (text, m.v)))
        return F.scaled_dot_product_attention(norm(q, m.norm_q), norm(k, m.norm_k), v)

    found = rewritten(forward, normal(2, 5, D), normal(2, 3, D), **parameters())
    assert found.count("merge_qk") == 1
    found.assert_as_accurate(normal(1, 6, D), normal(1, 2, D))


def test_two_sections():
    def forward(m, x, text):
        joined = []
        for w, b in ((m.q, m.q_bias), (m.k, m.k_bias)):
            parts = [norm(heads(F.linear(t, w, b)), m.norm_q) for t in (text, x)]
            joined.append(torch.cat(parts, dim=2))
        v = heads(torch.cat([text, x], dim=1))
        return F.scaled_dot_product_attention(*joined, v)

    found = rewritten(forward, normal(2, 5, D), normal(2, 3, D), **parameters())
    assert found.count("merge_qk") == 1
    assert biases(found) == ["p_q_bias"] * 2 + ["p_k_bias"] * 2
    found.assert_as_accurate(normal(1, 6, D), normal(1, 2, D))


def test_only_the_queries_are_normed():
    def forward(m, x):
        q, k, v = (heads(F.linear(x, w, m.q_bias)) for w in (m.q, m.k, m.v))
        return F.scaled_dot_product_attention(norm(q, m.norm_q), k, v)

    found = rewritten(forward, normal(2, 5, D), **parameters())
    assert found.count("qk_norm_rope") == 1 and found.count("merge_qk") == 1
    assert biases(found) == ["p_q_bias"]
    found.assert_as_accurate(normal(1, 6, D))


def test_a_linear_that_others_read_keeps_its_bias():
    def forward(m, x):
        q, k, v = (F.linear(x, w, m.q_bias) for w in (m.q, m.k, m.v))
        attended = F.scaled_dot_product_attention(
            norm(heads(q), m.norm_q), norm(heads(k), m.norm_k), heads(v)
        )
        return attended, k

    found = rewritten(forward, normal(2, 5, D), **parameters())
    assert biases(found) == ["p_q_bias", None]
    found.assert_as_accurate(normal(1, 6, D))


def test_pieces_of_one_linear_keep_its_bias():
    def forward(m, x):
        q, k, v = F.linear(x, m.qkv, m.qkv_bias).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(
            norm(heads(q), m.norm_q), norm(heads(k), m.norm_k), heads(v)
        )

    weights = {"qkv": normal(3 * D, D) / 4, "qkv_bias": normal(3 * D)}
    found = rewritten(forward, normal(2, 5, D), **parameters(), **weights)
    assert found.count("merge_qk") == 1
    assert biases(found) == [None, None]
    found.assert_as_accurate(normal(1, 6, D))


def test_heads_that_are_interleaved_keep_the_bias():
    def forward(m, x):
        q, k = (F.linear(x, w, m.q_bias).unflatten(-1, (d, H)) for w in (m.q, m.k))
        q, k = (norm(t.permute(0, 3, 1, 2), w) for t, w in ((q, m.norm_q), (k, m.norm_k)))
        return F.scaled_dot_product_attention(q, k, k)

    found = rewritten(forward, normal(2, 5, D), **parameters())
    assert biases(found) == [None, None]
    found.assert_as_accurate(normal(1, 6, D))


def test_keys_made_of_the_queries_stay_apart():
    def forward(m, x):
        q = norm(heads(F.linear(x, m.q)), m.norm_q)
        k = norm(heads(F.linear(q.transpose(1, 2).flatten(2), m.k)), m.norm_k)
        return F.scaled_dot_product_attention(q, k, k)

    found = rewritten(forward, normal(2, 5, D), **parameters())
    assert found.count("qk_norm_rope") == 2 and not found.count("merge_qk")
    assert_expected_inline(
        "\n".join(found.reasons("merge_qk")), """an input of the region depends on its output"""
    )
    found.assert_as_accurate(normal(1, 6, D))


def test_different_norms_stay_apart():
    def forward(m, x):
        q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
        return F.scaled_dot_product_attention(norm(q, m.norm_q), F.layer_norm(k, (d,), m.norm_k), v)

    found = rewritten(forward, normal(2, 5, D), **parameters())
    assert found.count("qk_norm_rope") == 2 and not found.count("merge_qk")


def test_frozen_linears():
    module = Written(attention, **parameters())
    for name in ("q", "q_bias", "k"):
        getattr(module, name).requires_grad_(False)
    found = rewrite(module, normal(2, 5, D), rules=["qk_norm_rope", "merge_qk"])
    assert found.count("merge_qk") == 1
    found.assert_as_accurate(normal(1, 6, D))


def test_under_autocast():
    module = Written(attention, **parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = rewrite(module, normal(2, 5, D), rules=["qk_norm_rope", "merge_qk"])
    assert found.count("merge_qk") == 1
    found.assert_as_accurate(
        normal(3, 37, D), context=lambda: torch.autocast("cpu", torch.bfloat16)
    )


def test_a_compiler_is_not_given_it():
    assert not RULES["merge_qk"].compiled
