"""QK-norm, rotary embedding and the joint concatenation to one op per operand.

Shapes: B batch, S tokens, T text tokens, H heads, d head dim, D = H * d.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

H, d = 2, 8
D = H * d


def rewritten(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    return rewrite(Written(forward, **parameters), *inputs, rules=["qk_norm_rope"])


def projections(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = {name: normal(D, D, dtype=dtype, seed=i) / 4 for i, name in enumerate("qkv")}
    return weights | {"norm_q": normal(d, dtype=dtype), "norm_k": normal(d, dtype=dtype, seed=1)}


def tables(tokens: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] * 0.7 ** torch.arange(d // 2)
    return angle.cos(), angle.sin()


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, d))


def neighbours(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """FLUX: pairs of neighbours, tables [S, d]."""
    a, b = x_BSHd.reshape(*x_BSHd.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(3)
    cos, sin = (t.repeat_interleave(2, dim=-1)[None, :, None] for t in (cos, sin))
    return (x_BSHd.float() * cos + turned.float() * sin).to(x_BSHd.dtype)


def halves(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama: the two halves, tables [S, d]."""
    a, b = x_BSHd.chunk(2, dim=-1)
    cos, sin = (torch.cat([t, t], dim=-1)[None, :, None] for t in (cos, sin))
    return x_BSHd * cos + torch.cat([-b, a], dim=-1) * sin


def attention(rope=neighbours, norm=F.rms_norm):
    def forward(m, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
        q = rope(norm(q, (d,), m.norm_q, eps=1e-6), cos, sin)
        k = rope(norm(k, (d,), m.norm_k, eps=1e-6), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return forward


def joint(m, x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Text before image, as in FLUX."""
    operands = []
    for w, norm in ((m.q, m.norm_q), (m.k, m.norm_k)):
        parts = [F.rms_norm(heads(F.linear(t, w)), (d,), norm, eps=1e-6) for t in (text, x)]
        operands.append(neighbours(torch.cat(parts, dim=1), cos, sin))
    operands.append(torch.cat([heads(F.linear(t, m.v)) for t in (text, x)], dim=1))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in operands))


def test_norm_and_rotation():
    found = rewritten(attention(), normal(2, 5, D), *tables(5), **projections())
    assert_expected_inline(
        found.code(),
        """\
linear = aten.linear(inputs_0, p_q)
unflatten = aten.unflatten.int(linear, -1, [2, 8])
linear_1 = aten.linear(inputs_0, p_k)
unflatten_1 = aten.unflatten.int(linear_1, -1, [2, 8])
linear_2 = aten.linear(inputs_0, p_v)
unflatten_2 = aten.unflatten.int(linear_2, -1, [2, 8])
repeat_interleave = aten.repeat_interleave.self_int(inputs_1, 2, -1)
unsqueeze = aten.unsqueeze(repeat_interleave, 0)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 2)
repeat_interleave_1 = aten.repeat_interleave.self_int(inputs_2, 2, -1)
unsqueeze_2 = aten.unsqueeze(repeat_interleave_1, 0)
unsqueeze_3 = aten.unsqueeze(unsqueeze_2, 2)
qk_norm_rope = fxopt.qk_norm_rope([unflatten], [None], [p_norm_q], [None], [unsqueeze_1],
    [unsqueeze_3], [1], 'rms', [1e-06], 0.0, False, 'interleaved', 'channels', 'all', float32)
getitem_4 = qk_norm_rope[0]
permute = aten.permute(getitem_4, [0, 2, 1, 3])
qk_norm_rope_1 = fxopt.qk_norm_rope([unflatten_1], [None], [p_norm_k], [None], [unsqueeze_1],
    [unsqueeze_3], [1], 'rms', [1e-06], 0.0, False, 'interleaved', 'channels', 'all', float32)
getitem_5 = qk_norm_rope_1[0]
permute_1 = aten.permute(getitem_5, [0, 2, 1, 3])
transpose_2 = aten.transpose.int(unflatten_2, 1, 2)
scaled_dot_product_attention = aten.scaled_dot_product_attention(permute, permute_1,
    transpose_2)
transpose_3 = aten.transpose.int(scaled_dot_product_attention, 1, 2)
flatten_2 = aten.flatten.using_ints(transpose_3, 2)
return (flatten_2,)""",
    )


def test_the_joint_sequence():
    inputs = normal(2, 5, D), normal(2, 3, D), *tables(8)
    found = rewritten(joint, *inputs, **projections())
    assert found.count("qk_norm_rope") == 2
    assert_expected_inline(
        found.code(),
        """\
linear = aten.linear(inputs_1, p_q)
unflatten = aten.unflatten.int(linear, -1, [2, 8])
linear_1 = aten.linear(inputs_0, p_q)
unflatten_1 = aten.unflatten.int(linear_1, -1, [2, 8])
repeat_interleave = aten.repeat_interleave.self_int(inputs_2, 2, -1)
unsqueeze = aten.unsqueeze(repeat_interleave, 0)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 2)
repeat_interleave_1 = aten.repeat_interleave.self_int(inputs_3, 2, -1)
unsqueeze_2 = aten.unsqueeze(repeat_interleave_1, 0)
unsqueeze_3 = aten.unsqueeze(unsqueeze_2, 2)
linear_2 = aten.linear(inputs_1, p_k)
unflatten_2 = aten.unflatten.int(linear_2, -1, [2, 8])
linear_3 = aten.linear(inputs_0, p_k)
unflatten_3 = aten.unflatten.int(linear_3, -1, [2, 8])
linear_4 = aten.linear(inputs_1, p_v)
unflatten_4 = aten.unflatten.int(linear_4, -1, [2, 8])
linear_5 = aten.linear(inputs_0, p_v)
unflatten_5 = aten.unflatten.int(linear_5, -1, [2, 8])
cat_2 = aten.cat([unflatten_4, unflatten_5], 1)
qk_norm_rope = fxopt.qk_norm_rope([unflatten, unflatten_1], [None, None], [p_norm_q, p_norm_q],
    [None, None], [unsqueeze_1, unsqueeze_1], [unsqueeze_3, unsqueeze_3], [2], 'rms', [1e-06,
    1e-06], 0.0, False, 'interleaved', 'channels', 'all', float32)
getitem_4 = qk_norm_rope[0]
permute = aten.permute(getitem_4, [0, 2, 1, 3])
qk_norm_rope_1 = fxopt.qk_norm_rope([unflatten_2, unflatten_3], [None, None], [p_norm_k,
    p_norm_k], [None, None], [unsqueeze_1, unsqueeze_1], [unsqueeze_3, unsqueeze_3], [2], 'rms',
    [1e-06, 1e-06], 0.0, False, 'interleaved', 'channels', 'all', float32)
getitem_5 = qk_norm_rope_1[0]
permute_1 = aten.permute(getitem_5, [0, 2, 1, 3])
transpose_2 = aten.transpose.int(cat_2, 1, 2)
scaled_dot_product_attention = aten.scaled_dot_product_attention(permute, permute_1,
    transpose_2)
return (scaled_dot_product_attention,)""",
    )
    found.assert_as_accurate(normal(1, 6, D), normal(1, 2, D), *tables(8))


def test_norm_alone():
    found = rewritten(
        attention(rope=lambda x, cos, sin: x), normal(2, 5, D), *tables(5), **projections()
    )
    assert found.count("qk_norm_rope") == 2
    found.assert_as_accurate(normal(1, 3, D), *tables(3))


def test_rotation_alone():
    found = rewritten(
        attention(norm=lambda x, *_, eps: x), normal(2, 5, D), *tables(5), **projections()
    )
    assert found.count("qk_norm_rope") == 2
    found.assert_as_accurate(normal(1, 3, D), *tables(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [neighbours, halves])
def test_values_and_gradients(rope, dtype: torch.dtype):
    inputs = normal(2, 5, D, dtype=dtype), *(t.to(dtype) for t in tables(5))
    found = rewritten(attention(rope), *inputs, **projections(dtype))
    assert found.count("qk_norm_rope") == 2
    found.assert_as_accurate(normal(1, 7, D, dtype=dtype), *(t.to(dtype) for t in tables(7)))


def _pairs(first, second, join):
    def rope(x, cos, sin):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        return join(first(a, b, cos, sin), second(a, b, cos, sin))

    return rope


def _stack(a, b):
    return torch.stack([a, b], dim=-1).flatten(-2)


def _cat(a, b):
    return torch.cat([a, b], dim=-1)


NEAR_MISSES = {
    "wrong sign": _pairs(
        lambda a, b, c, s: a * c + b * s, lambda a, b, c, s: b * c + a * s, _stack
    ),
    "pairs exchanged": _pairs(
        lambda a, b, c, s: b * c + a * s, lambda a, b, c, s: a * c - b * s, _stack
    ),
    "neighbours in, halves out": _pairs(
        lambda a, b, c, s: a * c - b * s, lambda a, b, c, s: b * c + a * s, _cat
    ),
    "one table for both": _pairs(
        lambda a, b, c, s: a * c - b * c, lambda a, b, c, s: b * c + a * s, _stack
    ),
    "rotated twice in one member": _pairs(
        lambda a, b, c, s: a * c - b * s, lambda a, b, c, s: b * c + 2 * a * s, _stack
    ),
    "shifted tokens": lambda x, cos, sin: halves(x, cos.roll(1, 0), sin).roll(1, 1),
    "an odd number of channels": lambda x, cos, sin: torch.cat(
        [x[..., :3] * cos[:, None, :3] + x[..., :3] * sin[:, None, :3], x[..., 3:]], -1
    ),
    "rest doubled": lambda x, cos, sin: torch.cat(
        [halves(x[..., : d // 2], cos[:, : d // 4], sin[:, : d // 4]), 2 * x[..., d // 2 :]], -1
    ),
    "rest first": lambda x, cos, sin: torch.cat(
        [x[..., d // 2 :], halves(x[..., : d // 2], cos[:, : d // 4], sin[:, : d // 4])], -1
    ),
    "matrices of other pairs": _pairs(
        lambda a, b, c, s: a * c + b.flip(-1) * s, lambda a, b, c, s: b * c + a * s, _stack
    ),
    "not linear": lambda x, cos, sin: halves(x, cos, sin).sin(),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str):
    inputs = normal(2, 5, D), *tables(5)
    found = rewritten(attention(NEAR_MISSES[name]), *inputs, **projections())
    assert not found.count("qk_norm_rope"), found.code()
    assert found.reasons("qk_norm_rope")
    found.assert_as_accurate(*inputs)


def test_declines_with_the_reason():
    inputs = normal(2, 5, D), *tables(5)
    found = rewritten(attention(NEAR_MISSES["wrong sign"]), *inputs, **projections())
    assert_expected_inline(
        "\n".join(found.reasons("qk_norm_rope")),
        """\
queries: what stands between the norm and attention is no known rotation
keys: what stands between the norm and attention is no known rotation""",
    )


PART = d // 2  # of a head's channels


def first_channels(rope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """GPT-NeoX, Phi, GLM: the tables are for the first channels, the others go through."""

    def partly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rope(x[..., :PART], cos[:, : PART // 2], sin[:, : PART // 2])
        return torch.cat([turned, x[..., PART:]], dim=-1)

    return partly


def last_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = halves(x[..., PART:], cos[:, : PART // 2], sin[:, : PART // 2])
    return torch.cat([x[..., :PART], turned], dim=-1)


@pytest.mark.parametrize("norm", [F.rms_norm, lambda x, *_, eps: x], ids=["rms", "no norm"])
@pytest.mark.parametrize("rope", [neighbours, halves])
def test_a_part_of_the_channels(rope, norm):
    inputs = normal(2, 5, D), *tables(5)
    found = rewritten(attention(first_channels(rope), norm), *inputs, **projections())
    assert found.count("qk_norm_rope") == 2, found.reasons("qk_norm_rope")
    assert "slice" not in found.code().partition("qk_norm_rope")[2]  # nor anything of the rotation
    found.assert_as_accurate(normal(1, 7, D), *tables(7))


def test_a_part_that_is_not_the_first_declines_with_the_reason():
    inputs = normal(2, 5, D), *tables(5)
    found = rewritten(attention(last_channels), *inputs, **projections())
    assert_expected_inline(
        "\n".join(found.reasons("qk_norm_rope")),
        """\
queries: the rotated channels are not the first ones of a head
keys: the rotated channels are not the first ones of a head""",
    )
    found.assert_as_accurate(*inputs)


def in_neighbours(x: Tensor) -> Tensor:
    """[..., d / 2, 2]"""
    return x.unflatten(-1, (-1, 2))


def in_halves(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(-1, -2)


def by_columns(x: Tensor, matrices: Tensor) -> Tensor:
    """As FLUX was first published: a column times each member of a pair."""
    p, q = x.float().split(1, dim=-1)
    return matrices[..., 0] * p + matrices[..., 1] * q


def by_einsum(x: Tensor, matrices: Tensor) -> Tensor:
    return torch.einsum("...ij,...j->...i", matrices.expand(*x.shape, 2), x.float())


def by_matmul(x: Tensor, matrices: Tensor) -> Tensor:
    return (matrices @ x.float().unsqueeze(-1)).squeeze(-1)


def flux_block(product, pairs=in_neighbours, num_text: int = 3):
    """Text and image in one attention, matrices [B, 1, S, d/2, 2, 2] for all heads."""

    def turn(x_BHSd: Tensor, matrices: Tensor) -> Tensor:
        turned = product(pairs(x_BHSd), matrices).to(x_BHSd.dtype)
        if pairs is in_halves:
            turned = turned.transpose(-1, -2)
        return turned.flatten(-2)

    def forward(m, x: Tensor, text: Tensor, matrices: Tensor) -> Tensor:
        operands = []
        for w, norm in ((m.q, m.norm_q), (m.k, m.norm_k), (m.v, None)):
            parts = [heads(F.linear(t, w)).transpose(1, 2) for t in (text, x)]
            if norm is not None:
                parts = [F.rms_norm(t, (d,), norm, eps=1e-6) for t in parts]
            operands.append(torch.cat(parts, dim=2))
        q, k = (turn(t, matrices) for t in operands[:2])
        return F.scaled_dot_product_attention(q, k, operands[2]).transpose(1, 2).flatten(2)

    return forward


def matrices(batch: int, tokens: int) -> Tensor:
    """[B, 1, S, d/2, 2, 2], no rotations: nothing but its values says that a matrix is one."""
    return normal(batch, 1, tokens, d // 2, 2, 2).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", [in_neighbours, in_halves])
@pytest.mark.parametrize("product", [by_columns, by_einsum, by_matmul])
def test_matrices(product, pairs, dtype):
    inputs = normal(2, 5, D, dtype=dtype), normal(2, 3, D, dtype=dtype), matrices(2, 8)
    found = rewritten(flux_block(product, pairs), *inputs, **projections(dtype))
    assert found.count("qk_norm_rope") == 2, found.reasons("qk_norm_rope")
    found.assert_as_accurate(
        normal(1, 6, D, dtype=dtype), normal(1, 2, D, dtype=dtype), matrices(1, 8)
    )


def test_columns_of_matrices_are_views():
    inputs = normal(2, 5, D), normal(2, 3, D), matrices(2, 8)
    found = rewritten(flux_block(by_columns), *inputs, **projections())
    before, _, _ = found.code().partition("qk_norm_rope")
    lines = [line for line in before.splitlines() if "linear" not in line]
    assert_expected_inline(
        "\n".join(lines),
        """\
transpose_4 = aten.transpose.int(unflatten_4, 1, 2)
transpose_5 = aten.transpose.int(unflatten_5, 1, 2)
cat_2 = aten.cat([transpose_4, transpose_5], 2)
select = aten.select.int(inputs_2, 5, 0)
select_1 = aten.select.int(inputs_2, 5, 1)
flatten_using_ints = aten.flatten.using_ints(select, -2, -1)
permute = aten.permute(flatten_using_ints, [0, 2, 1, 3])
flatten_using_ints_1 = aten.flatten.using_ints(select_1, -2, -1)
permute_1 = aten.permute(flatten_using_ints_1, [0, 2, 1, 3])""",
    )


def test_matrices_that_are_trained_decline_with_the_reason():
    def forward(m, x, text):
        return flux_block(by_columns)(m, x, text, m.matrices)

    found = rewritten(
        forward, normal(2, 5, D), normal(2, 3, D), matrices=matrices(2, 8), **projections()
    )
    assert not found.count("qk_norm_rope")
    assert any("p_matrices is trained" in why for why in found.reasons("qk_norm_rope"))


@pytest.mark.parametrize("dim", [1, 2])
def test_keys_that_are_repeated_before_or_after_the_exchange_of_dims(dim: int):
    def forward(m, x, cos, sin):
        weights = (m.q, m.k[:d], m.v[:d])
        q, k, v = (F.linear(x, w).unflatten(-1, (-1, d)) for w in weights)
        q = neighbours(F.rms_norm(q, (d,), m.norm_q, eps=1e-6), cos, sin)
        k = neighbours(F.rms_norm(k, (d,), m.norm_k, eps=1e-6), cos, sin)
        if dim == 2:
            k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if dim == 1:
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    inputs = normal(2, 5, D), *tables(5)
    found = rewritten(forward, *inputs, **projections())
    assert found.count("qk_norm_rope") == 2, found.reasons("qk_norm_rope")
    found.assert_as_accurate(*inputs)


def test_rotated_queries_that_are_used_elsewhere_keep_their_value():
    def forward(m, x, cos, sin):
        q, k, v = (heads(F.linear(x, w)).transpose(1, 2) for w in (m.q, m.k, m.v))
        normed = F.rms_norm(q, (d,), m.norm_q, eps=1e-6)
        out = F.scaled_dot_product_attention(normed * 2, k, v)
        return out, normed

    inputs = normal(2, 5, D), *tables(5)
    found = rewritten(forward, *inputs, **projections())
    assert not found.count("qk_norm_rope")
    assert_expected_inline(
        "\n".join(found.reasons("qk_norm_rope")), """rms_norm is also used by output (output)"""
    )


def test_trained_tables_decline_with_the_reason():
    def forward(m, x):
        return attention()(m, x, m.cos[: x.shape[1]], m.sin[: x.shape[1]])

    cos, sin = tables(16)
    found = rewritten(forward, normal(2, 5, D), cos=cos, sin=sin, **projections())
    assert not found.count("qk_norm_rope")
    assert_expected_inline(
        "\n".join(found.reasons("qk_norm_rope")),
        """\
p_cos is trained, and the op gives it no gradient
p_sin is trained, and the op gives it no gradient""",
    )
    found.assert_as_accurate(normal(2, 5, D))


def test_tables_that_came_to_need_a_gradient_are_refused():
    inputs = normal(2, 5, D), *tables(5)
    found = rewritten(attention(), *inputs, **projections())
    cos, sin = (t.requires_grad_() for t in tables(5))
    with pytest.raises(AssertionError, match="captured for"):
        found(inputs[0], cos, sin)


def test_a_norm_behind_the_rotation_says_so():
    def forward(m, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
        q = F.rms_norm(halves(q, cos, sin), (d,), m.norm_q, 1e-6)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    found = rewritten(forward, normal(2, 5, D), *tables(5), **projections())
    assert found.reasons("qk_norm_rope") == [
        "queries: the norm is not the first after the projection; the op rotates last"
    ]


def test_heads_that_an_index_chooses_say_so():
    """Falcon, whose queries share one key."""

    def forward(m, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
        q, k = halves(q, cos, sin), halves(k[:, :, [-2]], cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k.expand(-1, -1, H, -1), v))
        return F.scaled_dot_product_attention(q, k, v)

    found = rewritten(forward, normal(2, 5, D), *tables(5), **projections())
    assert found.count("qk_norm_rope") == 1
    assert found.reasons("qk_norm_rope") == [
        "keys: a tensor of torch.int64 enters between the norm and attention"
    ]
    found.assert_as_accurate(normal(3, 5, D), *tables(5))


def test_a_norm_of_each_head_says_so():
    """StableLM."""

    def forward(m, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w)).transpose(1, 2) for w in (m.q, m.k, m.v))
        weights = m.norm_q, m.norm_k
        parts = zip(weights, q.split(1, dim=1), strict=True)
        q = torch.cat([F.layer_norm(part, (d,), w) for w, part in parts], dim=1)
        q = halves(q.transpose(1, 2), cos, sin).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v)

    found = rewritten(forward, normal(2, 5, D), *tables(5), **projections())
    assert found.reasons("qk_norm_rope") == [
        "queries: 2 norms stand side by side, as of heads that have a weight each; "
        "the op has one norm for all heads"
    ]


def every_two(x_BSHr: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """GPT-J: strided slices, sin before cos, tables repeated in the forward."""
    sin, cos = (torch.repeat_interleave(t[:, :, None, :], 2, 3) for t in (sin, cos))
    turned = torch.stack((-x_BSHr[..., 1::2], x_BSHr[..., ::2]), dim=-1).flatten(-2)
    return x_BSHr * cos + turned * sin


@pytest.mark.parametrize("r", [d, d // 2])
def test_rotation_of_every_two_of_part_of_a_head(r: int):
    def rotated(x_BSHd: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        turned = every_two(x_BSHd[..., :r], sin, cos)
        return turned if r == d else torch.cat([turned, x_BSHd[..., r:]], dim=-1)

    def forward(m, x: Tensor, embed_positions: Tensor, position_ids: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
        index = position_ids.unsqueeze(-1).repeat(1, 1, embed_positions.shape[-1])
        table = torch.gather(embed_positions.repeat(x.shape[0], 1, 1), 1, index)
        sin, cos = table.split(r // 2, dim=-1)
        q, k = (rotated(t, sin, cos) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def inputs(batch: int, tokens: int) -> list[Tensor]:
        positions = torch.arange(tokens).expand(batch, -1)
        return [normal(batch, tokens, D), normal(1, 9, r, seed=3).detach(), positions]

    found = rewritten(forward, *inputs(2, 5), **projections())
    assert found.count("qk_norm_rope") == 2
    found.assert_as_accurate(*inputs(3, 7))


@pytest.mark.parametrize("interleaves", [True, False])
def test_keys_that_are_repeated_for_grouped_queries(interleaves: bool):
    """Lumina: heads are repeated before they change places with tokens, by `repeat`."""

    def forward(m, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
        k, v = k[:, :, :1], v[:, :, :1]
        q, k = (halves(t, cos, sin) for t in (q, k))
        if interleaves:
            k, v = (t.unsqueeze(3).repeat(1, 1, 1, H, 1).flatten(2, 3) for t in (k, v))
        else:  # of each item of the last dim
            k = k.unsqueeze(3).repeat(1, 1, 1, H, 1)[..., : d // 2].repeat(1, 1, 1, 1, 2)
            k, v = k.flatten(2, 3), v.expand(-1, -1, H, -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    found = rewritten(forward, normal(2, 5, D), *tables(5), **projections())
    assert found.count("qk_norm_rope") == 1 + interleaves, found.code()
    found.assert_as_accurate(normal(3, 5, D), *tables(5))


@pytest.mark.parametrize("kv_heads", [H, 1])
def test_before_attention_whose_weights_are_returned(kv_heads: int):
    """CodeGen: attention stays as it is written, in fp32, and the rotation is found before it."""

    def forward(m, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (heads(F.linear(x, w)) for w in (m.q, m.k, m.v))
        k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]
        q, k = (halves(t, cos, sin) for t in (q, k))
        k, v = (t.repeat_interleave(H // kv_heads, 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q.float() @ k.float().transpose(-1, -2) / d**0.5
        weights = scores.softmax(-1).to(v.dtype)
        return weights @ v, weights

    found = rewritten(forward, normal(2, 5, D), *tables(5), **projections())
    assert (found.count("attention"), found.count("qk_norm_rope")) == (0, 2)
    found.assert_as_accurate(normal(3, 5, D), *tables(5))


def test_a_softmax_over_something_else_is_left_alone():
    def forward(m, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return halves(heads(F.linear(x, m.q)), cos, sin).softmax(-1)

    found = rewritten(forward, normal(2, 5, D), *tables(5), **projections())
    assert not found.count("qk_norm_rope") and not found.reasons("qk_norm_rope")


def test_a_single_number_is_no_table():
    """DeBERTa divides its queries by a tensor without dims."""

    def forward(m, x: Tensor, size: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w)).transpose(1, 2) for w in (m.q, m.k, m.v))
        return F.scaled_dot_product_attention(q / size, k, v)

    found = rewritten(forward, normal(2, 5, D), torch.tensor(2.0), **projections())
    assert found.count("qk_norm_rope") == 0
    assert found.reasons("qk_norm_rope") == [
        "queries: what stands between the norm and attention is no known rotation"
    ]
