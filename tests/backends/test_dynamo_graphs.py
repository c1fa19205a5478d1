"""What a graph of Dynamo's may hold besides ops: the compiled door loses none of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxopt

pytestmark = pytest.mark.usefixtures("fresh")


class Scaled(torch.autograd.Function):
    """x * w, with a gradient that is not the one of x * w."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return 3 * grad * w, None


def keep(block, x):
    return checkpoint(block, x, use_reentrant=False)


def written_data(model, x):
    y = x.new_zeros(x.shape)
    y.data[:, 1:].copy_(x.detach()[:, :-1])
    return model.block(x + y)


def data_of_a_parameter(model, x):
    y = model.block(x * model.weight)
    model.weight.data.mul_(0.5)
    return y * model.weight


def vmap(model, x):
    return model.block(torch.vmap(lambda row: row * 2 + 1)(x))


def vmap_that_writes(model, x):
    y = x * 2
    torch.vmap(lambda row: row.mul_(3))(y)
    return model.block(y)


def vmap_of_a_linear(model, x):
    return model.block(x + torch.vmap(model.down)(torch.vmap(model.up)(x)))


def func_grad(model, x):
    return model.block(x + torch.func.grad(lambda t: (t**3).sum())(x))


def nested_checkpoints(model, x):
    return keep(lambda t: keep(model.block, model.block(t)), x)


def no_grad_in_a_checkpoint(model, x):
    def run(t):
        with torch.no_grad():
            y = model.block(t)
        return model.block(t) + y

    return keep(run, x)


def the_same_without_gradients(model, x):
    with torch.no_grad():
        y = model.block(x)
    return model.block(x) + y


def view_without_gradients(model, x):
    with torch.no_grad():
        y = x.view(x.shape)
    return model.block(x) * y


def slice_written_without_gradients(model, x):
    y = model.up(x)
    with torch.no_grad():
        y[:, 1:] = y[:, 1:] * 0.5
    return model.block(y[..., :32])


def checkpoint_under_autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return keep(model.block, x)


def cast_behind_autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.up(x)[..., :32]
    return model.block(x) * y.float().exp()


def cast_behind_autocast_in_a_checkpoint(model, x):
    def run(t):
        return model.block(t) * model.up(t)[..., :32].float().exp()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        return keep(run, x)


def autograd_function(model, x):
    return model.block(Scaled.apply(x, model.weight))


def autograd_function_in_a_checkpoint(model, x):
    return keep(lambda t: model.block(Scaled.apply(t, model.weight)), x)


def vmap_under_autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.vmap(model.up)(x)
    return model.block(y[..., :32].float())


def branches(model, x):
    x = torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t * 3, (x,))
    return model.block(x)


class Model(nn.Module):
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32, elementwise_affine=False)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.weight = nn.Parameter(torch.randn(32))
        self.run = run

    def block(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))

    def forward(self, x):
        return self.run(self, x)


def step(model):
    torch.manual_seed(1)
    x = torch.randn(2, 8, 32, requires_grad=True)
    out = model(x)
    out.double().sin().sum().backward()
    return {"output": out, "input": x.grad} | {k: p.grad for k, p in model.named_parameters()}


# How often gated_activation fires; None for a graph that goes on as it came.
FORMS = {
    written_data: 1,
    data_of_a_parameter: 1,
    vmap: 1,
    vmap_of_a_linear: 1,
    vmap_that_writes: None,
    func_grad: 1,
    nested_checkpoints: 2,
    no_grad_in_a_checkpoint: 2,
    the_same_without_gradients: 2,
    view_without_gradients: 1,
    slice_written_without_gradients: 1,
    checkpoint_under_autocast: 1,
    cast_behind_autocast: 1,
    cast_behind_autocast_in_a_checkpoint: 1,
    autograd_function: 1,
    autograd_function_in_a_checkpoint: 1,
    vmap_under_autocast: None,
    branches: 1,
}


@pytest.mark.parametrize("run", FORMS, ids=lambda run: run.__name__)
def test_form(run):
    model, eager = Model(run), Model(run)
    model.compile(backend="fxopt", fullgraph=True, options={"inner": "aot_eager"})
    # fp32, sums in another order; the casts of autocast stand in the same places.
    for found, expected in zip(step(model).items(), step(eager).items(), strict=True):
        assert (found[1] is None) == (expected[1] is None), found[0]
        if expected[1] is not None:
            assert (found[1] - expected[1]).norm() <= 2e-5 * expected[1].norm(), found[0]
    report = fxopt.report(model)
    assert report.counts().get("gated_activation") == FORMS[run]


def region_without_autocast(model, x):
    """As rotary embeddings make their tables."""
    with torch.autocast("cpu", enabled=False):
        y = x @ model.up.weight.T
    return model.block(x).exp() + y[..., :32], y.to(torch.bfloat16) * 3


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_region_without_autocast_in_one_of_the_callers(inner):
    model, eager = Model(region_without_autocast), Model(region_without_autocast)
    model.compile(backend="fxopt", fullgraph=True, options={"inner": inner})
    torch.manual_seed(1)
    x = torch.randn(2, 8, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, expected in zip(model(x), eager(x), strict=True):
            assert found.dtype is expected.dtype
            # fp32, sums in another order
            assert (found - expected).norm() <= 2e-5 * expected.norm()
    assert fxopt.report(model).counts()["gated_activation"] == 1


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (vmap_that_writes, "wrap writes to its operands in place"),
        (vmap_under_autocast, "wrap stays as it is, which is under autocast"),
        (vmap, "what wrap runs is no graph of the IR and stays as it is"),
        (branches, "what cond runs is no graph of the IR and stays as it is"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_stays_is_reported(run, why):
    model = Model(run)
    model.compile(backend="fxopt", options={"inner": "eager"})
    step(model)
    assert (why,) in [d.reasons for d in fxopt.report(model).declined if d.rule == "capture"]


def test_compiling_an_optimizer_takes_no_step():
    """Its state is part of the graph, not an input of it."""
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    compiled, eager = (torch.optim.AdamW([w], lr=0.1) for w in weights)
    step = torch.compile(lambda: compiled.step(), backend="fxopt", options={"inner": "aot_eager"})
    for number in range(3):
        for weight in weights:
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (number - 0.5)
        step()
        eager.step()
        assert [s["step"].item() for s in compiled.state.values()] == [number + 1]
        torch.testing.assert_close(*weights, rtol=1e-6, atol=0)  # fp32: a sum in another order
