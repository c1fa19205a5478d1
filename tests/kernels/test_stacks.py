"""Gradients that lie one after the other in memory, and the one product for their weights."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.kernels.linears import linears
from fxopt.kernels.qk_norm_rope import outputs_backward, qk_norm_rope
from fxopt.kernels.qk_norm_rope_arguments import Arguments
from fxopt.kernels.stacks import empty_stacks, stacks
from fxopt.traffic import _Counting


def members(*tensors):
    return [run for run, _ in stacks(tensors)]


def test_tensors_of_one_shape_are_a_stack():
    like = [torch.empty(2, 3), None, torch.empty(4), torch.empty(2, 3).t().t(), torch.empty(2, 3)]
    found = empty_stacks(like)
    assert [None if t is None else t.shape for t in found] == [
        None if t is None else t.shape for t in like
    ]
    ((run, stack),) = stacks(found)
    assert run == [0, 3, 4]
    for i, t in enumerate(found):
        if t is not None:
            t.fill_(i)
    assert stack[:, 0, 0].tolist() == [0, 3, 4]


def test_a_stack_is_found_in_any_order_and_shape_of_its_members():
    q, k = torch.arange(24.0).view(2, 3, 4)
    ((run, stack),) = stacks([None, k.view(12), torch.empty(12), q.view(12)])
    assert run == [3, 1]
    assert torch.equal(stack, torch.arange(24.0).view(2, 12))


@pytest.mark.parametrize(
    "apart",
    [
        lambda a: (a[0], a[2]),  # a gap between them
        lambda a: (a[0], a[0]),  # one tensor
        lambda a: (a[0], a[1].clone()),
        lambda a: (a[0], a[1].t()),
        lambda a: (a[:2].flatten(0, 1), a[2]),
        lambda a: (a[0], a[1].view(torch.int32)),
        lambda a: (a[0, :0], a[0, :0]),
    ],
)
def test_others_are_none(apart):
    assert members(*apart(torch.zeros(3, 2, 2))) == []


def test_gradients_of_queries_and_keys_are_a_stack():
    q, k, text = torch.empty(1, 5, 2, 4), torch.empty(1, 5, 2, 4), torch.empty(1, 3, 2, 4)
    weight = torch.empty(4)
    none = [None] * 3
    fields = [q, text, k], none, [weight, None, None], none, none, none
    settings = ((2, 1), "rms", (1e-6,) * 3, 0.0, False, "none", "channels", "all", torch.float32)
    needs = [True] * 3 + [False] * 3 + [True] + [False] * 5
    found = outputs_backward(Arguments(*fields, *settings), needs)
    assert members(*found) == [[0, 2]]
    assert [i for i, t in enumerate(found) if t is not None] == [0, 1, 2, 6]


@pytest.mark.parametrize("frozen", [False, True])
def test_one_product_for_the_weights_of_a_stack(frozen):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights[1].requires_grad_(not frozen)
    wanted = [w for w in weights if w.requires_grad]
    outs = linears(x, weights, [None] * 3, [0, 0, 6, 1, 0, 6, 2, 0, 6])
    v, k, q = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    with _Counting() as counting:
        found = torch.autograd.grad(outs, [x, *wanted], [q, k, v.clone()])
    launches = counting.traffic.launches
    assert (launches["bmm"], launches["mm"]) == ((0, 3) if frozen else (1, 2))
    plain = [x @ w.T for w in weights]
    expected = torch.autograd.grad(plain, [x, *wanted], [q, k, v])
    for f, e in zip(found, expected, strict=True):
        # fp64 against fp64: the same sums in another order.
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_fake_tensors_are_as_real_ones():
    with FakeTensorMode():
        found = empty_stacks([torch.empty(2, 3), torch.empty(2, 3)])
        assert members(*found) == [[0, 1]]


def test_empty_tensors_are_left_alone():
    found = empty_stacks([torch.empty(0, 3), torch.empty(0, 3), torch.empty(())])
    assert [t.shape for t in found] == [(0, 3), (0, 3), ()]
    assert members(*found) == []


def test_a_write_to_one_is_none_to_another():
    first, second = empty_stacks([torch.empty(2, 3), torch.empty(2, 3)])
    first.zero_()
    assert (first._version, second._version) == (1, 0)


@pytest.mark.parametrize("shape", [(5, 8), (8,)])
def test_gradients_of_two_weights_are_written_apart(shape):
    """`torch.stack` splits its gradient into neighbours."""
    x, scale = torch.randn(shape), torch.ones((), requires_grad=True)
    weights = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    torch.stack(linears(x, weights, [None] * 2, [0, 0, 6, 1, 0, 6])).square().sum().backward()
    first, second = (w.grad for w in weights)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    expected, loss = second.sum(), (scale * second).sum()
    first.zero_()
    loss.backward()
    assert torch.equal(scale.grad, expected) and torch.equal(second.sum(), expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_trace_does_not_rely_on_where_gradients_lie(mode):
    """Fakes of an op lie one after the other; what its native provider makes does not."""

    def gradients(x, wq, wk, grad):
        wanted = [t.requires_grad_() for t in (wq, wk)]
        q, k = linears(x, wanted, [None] * 2, [0, 0, 16, 1, 0, 16])
        heads, none = [t.unflatten(-1, (2, 8)) for t in (q, k)], [None] * 2
        settings = [1, 1], "rms", [1e-6] * 2, 0.0, False, "none", "channels", "all", torch.float32
        q, k, *_ = qk_norm_rope(heads, none, [torch.ones(8)] * 2, none, none, none, *settings)
        return torch.autograd.grad([q, k], wanted, [grad, grad * 2])

    shapes = (2, 5, 8), (16, 8), (16, 8), (2, 5, 2, 8)
    tensors = [torch.randn(shape) for shape in shapes]
    traced = make_fx(gradients, tracing_mode=mode)(*(t.clone() for t in tensors))
    expected = gradients(*(t.clone() for t in tensors))
    assert all(map(torch.equal, expected, traced(*tensors)))


def test_compiled_autograd_takes_the_node_in_one_graph():
    def gradients():
        weights = [torch.ones(6, 8, requires_grad=True) for _ in range(2)]
        outs = linears(torch.arange(40.0).view(5, 8), weights, [None] * 2, [0, 0, 6, 1, 0, 6])
        torch.stack(outs).square().sum().backward()
        return [w.grad for w in weights]

    expected = gradients()
    whole = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(whole):
        assert all(map(torch.equal, expected, gradients()))
