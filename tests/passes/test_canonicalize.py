"""Fewer spellings, the same bits."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from fxopt.passes.canonicalize import machine_epsilon
from tests.passes.rewriting import Rewritten, Written, normal, rewrite

D = 16


def canonical(forward, *inputs: Tensor, **parameters: Tensor) -> Rewritten:
    """The captured graph before any rule, run once against the module."""
    module = Written(forward, **parameters)
    found = rewrite(module, *inputs, rules=[])
    torch.testing.assert_close(found(*inputs), module(*inputs), rtol=0, atol=0)
    return found


NOTHING = {
    "cast to its own dtype": lambda x: x.to(x.dtype).float().type_as(x),
    "whole slice": lambda x: x[:, :, 0:][:],
    "reshape to its own shape": lambda x: x.view(x.shape).reshape(x.shape),
    "views that undo one another": lambda x: x.unsqueeze(0).transpose(1, 2).transpose(2, 1)[0],
    "permutation of nothing": lambda x: x.permute(0, 1, 2).expand(x.shape),
    "whole slice of a dropout of nothing": lambda x: F.dropout(x, 0.0)[:],
    "dropout of nothing": lambda x: F.dropout(F.dropout(x, 0.0), 0.5, training=False),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_is_removed(name: str):
    found = canonical(lambda m, x: NOTHING[name](x).sin(), normal(2, 5, D))
    calls = [n for n in found.plan.gm.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls if "sym_size" not in n.name] == [torch.ops.aten.sin.default]


SOMETHING = {
    "transposition, then another reading": lambda x: x.transpose(0, 1).reshape(x.shape),
    "every second": lambda x: x[..., ::2].repeat(1, 1, 2),
    "double and back": lambda x: x.bfloat16().float(),
    "dropout": lambda x: F.dropout(x, 0.5) * 0,
}


@pytest.mark.parametrize("name", SOMETHING)
def test_what_does_something_stays(name: str):
    canonical(lambda m, x: SOMETHING[name](x), normal(3, 3, D))


def test_synonyms_have_one_name():
    def forward(m, x, y):
        x, y = x.multiply(y), torch.true_divide(x, y)
        return torch.concat([x.subtract(y).swapaxes(-1, -2), (x @ y.mT).absolute().mT], -1)

    found = canonical(forward, normal(2, D, D), normal(2, D, D, seed=1))
    assert_expected_inline(
        found.code(),
        """\
multiply = aten.mul.Tensor(inputs_0, inputs_1)
true_divide = aten.div.Tensor(inputs_0, inputs_1)
subtract = aten.sub.Tensor(multiply, true_divide)
swapaxes = aten.transpose.int(subtract, -1, -2)
m_t = aten.transpose.int(true_divide, -2, -1)
matmul = aten.matmul(multiply, m_t)
absolute = aten.abs(matmul)
m_t_1 = aten.transpose.int(absolute, -2, -1)
concat = aten.cat([swapaxes, m_t_1], -1)
return (concat,)""",
    )


LINEARS = {
    "operator": lambda x, w: x @ w.T,
    "method": lambda x, w: x.matmul(w.t()),
    "function": lambda x, w: torch.matmul(x, torch.permute(w, (1, 0))),
    "rows": lambda x, w: torch.mm(x[0], w.transpose(-1, 0)),
    "cast": lambda x, w: x.double() @ w.T.double(),
}


@pytest.mark.parametrize("name", LINEARS)
def test_a_product_with_a_weight_is_a_linear(name: str):
    found = canonical(lambda m, x: LINEARS[name](x, m.w), normal(2, 5, D), w=normal(D, D))
    targets = [n.target for n in found.plan.gm.graph.nodes]
    assert targets.count(torch.ops.aten.linear.default) == 1
    assert torch.ops.aten.matmul.default not in targets


PRODUCTS = {
    "no transposition": lambda x, w: x @ w,
    "no view of all": lambda x, w: x @ w[:D].T,
    "batches of weights": lambda x, w: x @ w.expand(2, -1, -1).mT,
    "one token": lambda x, w: x[0, 0] @ w.T,
    "what was computed": lambda x, w: x @ w.sin().T,
    "the same shape in another order": lambda x, w: x @ w[:D].permute(0, 1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_another_product_is_none(name: str):
    shape = (D, 6) if name == "no transposition" else (D + 1, D)
    found = canonical(lambda m, x: PRODUCTS[name](x, m.w), normal(2, 5, D), w=normal(*shape))
    assert torch.ops.aten.linear.default not in [n.target for n in found.plan.gm.graph.nodes]


def by_rows(m, x: Tensor) -> Tensor:
    """GPT-2, which stores its weights [in, out]; autocast casts the rows."""
    rows = torch.addmm(m.b, x.view(-1, x.shape[-1]).to(m.w.dtype), m.w)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def test_a_product_of_rows_with_a_stored_transpose_is_a_linear():
    found = canonical(by_rows, normal(2, 5, D), w=normal(D, 6), b=normal(6))
    assert_expected_inline(
        found.code(),
        """\
transpose_int = aten.transpose.int(p_w, 0, 1)
addmm = aten.linear(inputs_0, transpose_int, p_b)
return (addmm,)""",
    )


def test_rows_that_are_cast_and_views_that_do_nothing():
    parameters = {"w": normal(D, 6, dtype=torch.double), "b": normal(6, dtype=torch.double)}
    found = canonical(lambda m, x: by_rows(m, x).view(2, -1, 6), normal(2, 5, D), **parameters)
    assert_expected_inline(
        found.code(),
        """\
transpose_int = aten.transpose.int(p_w, 0, 1)
to_dtype = aten.to.dtype(inputs_0, float64)
addmm = aten.linear(to_dtype, transpose_int, p_b)
return (addmm,)""",
    )


def to_heads(m, x: Tensor) -> Tensor:
    return torch.addmm(m.b, x.view(-1, D), m.w).view(*x.shape[:-1], 2, 3)


ROWS = {
    "views to something else": to_heads,
    "of another order": lambda m, x: by_rows(m, x.transpose(0, 1).clone().transpose(0, 1)[:, 0]),
    "a weight that was cast": lambda m, x: torch.addmm(m.b.double(), x[0].double(), m.w.double()),
}


@pytest.mark.parametrize("name", ROWS)
def test_views_stay_where_they_are_no_linears_own(name: str):
    found = canonical(ROWS[name], normal(2, 5, D), w=normal(D, 6), b=normal(6))
    (linear,) = found.plan.gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    )
    assert linear.args[0].meta["val"].dim() == 2


SUMS = {
    "scaled": lambda m, x: torch.addmm(m.b, x[0], m.w, beta=2),
    "a bias per row": lambda m, x: torch.addmm(m.c, x[0], m.w),
    "what was computed": lambda m, x: torch.addmm(m.b, x[0], m.w.sin()),
}


@pytest.mark.parametrize("name", SUMS)
def test_another_sum_is_no_linear(name: str):
    found = canonical(SUMS[name], normal(2, 5, D), w=normal(D, 6), b=normal(6), c=normal(5, 6))
    assert torch.ops.aten.linear.default not in [n.target for n in found.plan.gm.graph.nodes]


def test_one_computation_is_done_once():
    found = canonical(lambda m, x: (x.exp() + 1) * (x.exp() + 1), normal(2, 5, D))
    assert_expected_inline(
        found.code(),
        """\
exp = aten.exp(inputs_0)
add = aten.add.Tensor(exp, 1)
mul = aten.mul.Tensor(add, add)
return (mul,)""",
    )


def test_random_numbers_are_drawn_as_often_as_before():
    module = Written(lambda m, x: F.dropout(x, 0.5) - F.dropout(x, 0.5))
    found = rewrite(module, normal(2, 5, D), rules=[])
    assert found(normal(2, 5, D)).abs().max() > 0


def test_nothing_is_shared_across_a_write():
    def forward(m, x):
        h = x * 2
        before = h.sin()
        h.add_(1)
        return before, h.sin()

    canonical(forward, normal(2, 5, D).detach())


def halves_written(even, odd):
    def forward(m, x):
        out = torch.empty_like(x)
        out[even] = x[odd]
        out[odd] = -x[even]
        return out

    return forward


def test_writes_of_even_and_odd_channels_are_a_stack():
    even, odd = (..., slice(0, None, 2)), (..., slice(1, None, 2))
    found = canonical(halves_written(even, odd), normal(2, 5, D).detach())
    assert_expected_inline(
        found.code(),
        """\
slice_1 = aten.slice.Tensor(inputs_0, 2, 1, 9223372036854775807, 2)
slice_3 = aten.slice.Tensor(inputs_0, 2, 0, 9223372036854775807, 2)
neg = aten.neg(slice_3)
to_dtype = aten.to.dtype(slice_1, float32)
to_dtype_1 = aten.to.dtype(neg, float32)
stack = aten.stack([to_dtype, to_dtype_1], -1)
flatten_using_ints = aten.flatten.using_ints(stack, -2, -1)
return (flatten_using_ints,)""",
    )
    found.assert_as_accurate(normal(2, 5, D))


def test_writes_of_both_halves_are_a_concatenation():
    first, second = (..., slice(0, D // 2)), (..., slice(D // 2, D))
    found = canonical(halves_written(first, second), normal(2, 5, D).detach())
    assert_expected_inline(
        found.code(),
        """\
slice_1 = aten.slice.Tensor(inputs_0, 2, 8, 16)
slice_3 = aten.slice.Tensor(inputs_0, 2, 0, 8)
neg = aten.neg(slice_3)
to_dtype = aten.to.dtype(slice_1, float32)
to_dtype_1 = aten.to.dtype(neg, float32)
cat = aten.cat([to_dtype, to_dtype_1], -1)
return (cat,)""",
    )
    found.assert_as_accurate(normal(2, 5, D))


def test_writes_that_overlap_stay():
    def forward(m, x):
        out = torch.zeros_like(x)
        out[..., :10] = x[..., :10]
        out[..., 6:] = -x[..., 6:]
        return out

    found = canonical(forward, normal(2, 5, D).detach())
    assert "copy_" in found.code()


def test_slices_of_what_is_written_stay_trainable():
    """Autograd refuses to write to what the pieces of one split share."""

    def forward(m, x):
        h = x * 2
        first, second = h[..., :10], h[..., 10:]
        h.add_(1)
        return first.sin(), second

    canonical(forward, normal(2, 5, D).detach()).assert_as_accurate(normal(2, 5, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_machine_epsilon_is_what_pytorch_adds(dtype: torch.dtype):
    x = normal(2, 3, D, dtype=dtype).detach() * 1e-4
    bound = F.rms_norm(x, (D,), eps=machine_epsilon(dtype))
    torch.testing.assert_close(bound, F.rms_norm(x, (D,)), rtol=0, atol=0)


def test_a_norm_without_eps_keeps_its_own():
    module = Written(lambda m, x: m.norm(x), norm=nn.RMSNorm(D))
    found = rewrite(module, normal(2, 5, D), rules=[])
    assert_expected_inline(
        found.code(),
        """\
rms_norm = aten.rms_norm(inputs_0, [16], p_norm_weight, 1.1920928955078125e-07)
return (rms_norm,)""",
    )


def test_two_tensors_that_are_returned_stay_two():
    """The caller may write to one of them."""

    def forward(m, x):
        h = x.sin()
        return h.clone(), h.clone().transpose(0, 1), x.sin()

    first, second, third = canonical(forward, normal(2, 5, D).detach())(normal(2, 5, D).detach())
    expected = second.clone(), third.clone()
    first.zero_()
    assert torch.equal(second, expected[0]) and torch.equal(third, expected[1])
