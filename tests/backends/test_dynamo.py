"""The second door: `torch.compile(model, backend="fxopt")`."""

import contextlib
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt import errors
from fxopt.backends import compiled_graphs, dynamo
from tests.families import FAMILIES
from tests.numerics import Draw, assert_as_accurate, redrawn, run, truth

# Whole graphs: the end of one block and the norm of the next are one op, and norms outside of the
# blocks count as well, so the numbers differ from optimize's.
FIRED = {
    "flux": {"qk_norm_rope": 8, "norm_modulate": 15, "gated_activation": 6},
    "flux2": {"qk_norm_rope": 8, "norm_modulate": 14, "gated_activation": 6},
    "sd3.5": {"qk_norm_rope": 14, "norm_modulate": 22, "gated_activation": 9},
    "qwen-image": {"qk_norm_rope": 4, "norm_modulate": 8, "gated_activation": 3, "rms_norm": 1},
    "wan": {"qk_norm_rope": 8, "norm_modulate": 7, "gated_activation": 3},
    "ltx": {"qk_norm_rope": 8, "norm_modulate": 7, "gated_activation": 3},
    "z-image": {"qk_norm_rope": 12, "norm_modulate": 21, "gated_activation": 6, "rms_norm": 5},
    "qwen3-eager": {
        "attention": 2,
        "drop_mask": 2,
        "qk_norm_rope": 4,
        "norm_modulate": 4,
        "gated_activation": 2,
        "rms_norm": 1,
    },
    "qwen3-sdpa": {
        "drop_mask": 2,
        "qk_norm_rope": 4,
        "norm_modulate": 4,
        "gated_activation": 2,
        "rms_norm": 1,
    },
    "llama-eager": {
        "attention": 2,
        "drop_mask": 2,
        "qk_norm_rope": 4,
        "norm_modulate": 4,
        "gated_activation": 2,
        "rms_norm": 1,
    },
    "llama-sdpa": {
        "drop_mask": 2,
        "qk_norm_rope": 4,
        "norm_modulate": 4,
        "gated_activation": 2,
        "rms_norm": 1,
    },
}
pytestmark = pytest.mark.usefixtures("fresh")


def check_family(name: str, inner: str) -> None:
    family = FAMILIES[name]
    model, plain, eager = (family.build() for _ in range(3))
    model.compile(backend="fxopt", options={"inner": inner})
    if inner == "inductor":
        # What the door started from: Inductor's own sin and cos of a timestep are 20 times further
        # from the truth than eager's.
        plain.compile(backend=inner)

    def draw(number: int) -> Draw:
        inputs = family.inputs(2, 0, torch.float32)
        inputs = inputs if number == 0 else redrawn(inputs, number)
        return run(model, inputs), run(plain, inputs), truth(eager, inputs)

    assert_as_accurate(*draw(0), what=name, again=draw)
    assert fxopt.report(model).counts() == FIRED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_family_under_aot_eager(name):
    check_family(name, "aot_eager")


@pytest.mark.parametrize("name", ["ltx", "llama-eager"])
def test_family_under_inductor(name):
    check_family(name, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family_under_inductor_all(name):
    check_family(name, "inductor")


class Block(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, scale):
        h = self.norm(x) * (1 + scale[:, None])
        return x + self.down(F.gelu(self.up(h), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mode = mode

    def forward(self, x, scale):
        for block in self.blocks:
            if self.mode == "checkpoint":
                x = checkpoint(block, x, scale, use_reentrant=False)
            elif self.mode == "no_grad":
                with torch.no_grad():
                    y = block(x, scale)
                x = x + y
            elif self.mode == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = block(x, scale)
            elif self.mode == "dropout":
                x = block(F.dropout(x, 0.3), scale)
            else:
                x = block(x, scale)
        return x


def step(model, forward, mode, batch=2, num_tokens=8):
    torch.manual_seed(1)
    x = torch.randn(batch, num_tokens, 32, requires_grad=True)
    scale = torch.randn(batch, 32, requires_grad=True)
    ambient = mode == "ambient autocast"
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast if ambient else contextlib.nullcontext():
        out = forward(x, scale)
    wanted = [x, scale, *model.parameters()]
    grads = torch.autograd.grad(out.float().square().mean(), wanted, allow_unused=True)
    return [out.float(), *(g for g in grads if g is not None)]


def assert_same(a, b):
    # fp32, sums in another order: a few units in the seventh digit; the bf16 casts of autocast
    # stand in the same places, so they round alike.
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= 2e-6 * x.norm() + 1e-9


MODES = ["plain", "checkpoint", "no_grad", "autocast", "ambient autocast", "dropout"]


@pytest.mark.parametrize("mode", MODES)
def test_regions_and_modes(mode):
    model = Model(mode)
    expected = step(model, model, mode)
    compiled = torch.compile(model, backend="fxopt", options={"inner": "aot_eager"})
    assert_same(expected, step(model, compiled, mode))
    assert fxopt.report(compiled).counts() == {"norm_modulate": 2, "gated_activation": 2}


def test_dynamic_sizes_are_not_recompiled():
    model = Model("plain")
    compiled = torch.compile(model, backend="fxopt", options={"inner": "aot_eager"}, dynamic=True)
    step(model, compiled, "plain")
    num_graphs = len(compiled_graphs.GRAPHS)
    for batch, num_tokens in ((3, 5), (4, 9), (2, 17)):
        assert_same(
            step(model, model, "plain", batch, num_tokens),
            step(model, compiled, "plain", batch, num_tokens),
        )
    # One more for the switch to symbolic floats, none per size.
    assert len(compiled_graphs.GRAPHS) <= num_graphs + 1


def test_a_number_that_changes_is_no_tensor():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32, elementwise_affine=False)
            self.linear = nn.Linear(32, 32)

        def forward(self, x, scale, strength):
            return x + self.linear(self.norm(x) * (1 + scale[:, None])) * strength

    model = Scaled()
    compiled = torch.compile(model, backend="fxopt", options={"inner": "eager"})
    x, scale = torch.randn(2, 8, 32), torch.randn(2, 32)
    for strength in (0.5, 0.25, 0.125):
        # 1e-5: fp32 rounding.
        expected = model(x, scale, strength)
        torch.testing.assert_close(compiled(x, scale, strength), expected, rtol=1e-5, atol=1e-5)
    assert fxopt.report(compiled).counts() == {"norm_modulate": 1}


def test_a_report_is_of_one_model():
    model, other = Model("plain"), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    through, through_other = (
        torch.compile(m, backend="fxopt", options={"inner": "eager"}) for m in (model, other)
    )
    with pytest.raises(errors.NotReported, match="run it once"):
        fxopt.report(through)
    step(model, through, "plain")
    through_other(torch.randn(2, 8, 32)).sum().backward()
    assert fxopt.report(through).counts() == {"norm_modulate": 2, "gated_activation": 2}
    assert fxopt.report(through_other).counts() == {"gated_activation": 1}
    assert fxopt.report().count("gated_activation") == 3


def test_a_report_is_of_all_doors_of_a_model():
    model = Model("plain")
    fxopt.optimize(model)
    model.compile(backend="fxopt", options={"inner": "eager"})
    step(model, model, "plain")
    report = fxopt.report(model)
    assert report.door == "optimize+compile"
    assert report.counts() == {"norm_modulate": 2, "gated_activation": 2}


def test_a_model_on_the_graph_of_another_has_its_report():
    for _ in range(2):  # Dynamo compiles once: it does not guard whose parameters they are
        model = Model("plain")
        through = torch.compile(model, backend="fxopt", options={"inner": "eager"})
        step(model, through, "plain")
        assert fxopt.report(through).counts() == {"norm_modulate": 2, "gated_activation": 2}
    assert len(compiled_graphs.GRAPHS) == 1


def test_a_graph_for_other_sizes_counts_once():
    model = Model("plain")
    compiled = torch.compile(model, backend="fxopt", options={"inner": "eager"})
    for num_tokens in (3, 5):
        step(model, compiled, "plain", 2, num_tokens)
    assert len(compiled_graphs.GRAPHS) > 1
    assert fxopt.report(compiled).counts() == {"norm_modulate": 2, "gated_activation": 2}


def test_a_model_whose_blocks_are_compiled_has_their_report():
    model = Model("plain")
    for block in model.blocks:
        block.compile(backend="fxopt", options={"inner": "eager"})
    step(model, model, "plain")
    assert fxopt.report(model).count("gated_activation") in (1, 2)  # Dynamo may share one graph
    for module in model.modules():  # as FSDP2 does outside of their forward
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    assert fxopt.report(model).count("gated_activation") in (1, 2)


def test_frozen_weights_get_no_gradient():
    model = Model("plain")
    model.blocks[0].up.weight.requires_grad_(False)
    compiled = torch.compile(model, backend="fxopt", options={"inner": "aot_eager"})
    compiled(torch.randn(2, 8, 32), torch.randn(2, 32)).sum().backward()
    assert model.blocks[0].up.weight.grad is None
    assert model.blocks[1].up.weight.grad is not None


def test_graph_that_cannot_be_rewritten_goes_on(monkeypatch):
    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(dynamo, "retrace", fail)
    model = Model("plain")
    expected = step(model, model, "plain")
    compiled = torch.compile(model, backend="fxopt", options={"inner": "aot_eager"})
    assert_same(expected, step(model, compiled, "plain"))
    (declined,) = fxopt.report(compiled).declined
    assert declined.reasons == ("RuntimeError: planted",)


def test_a_mistake_in_a_rule_breaks_no_compilation(monkeypatch):
    def fail(*_, **__):
        raise KeyError("planted")

    monkeypatch.setattr(dynamo, "rewrite", fail)
    model = Model("plain")
    expected = step(model, model, "plain")
    compiled = torch.compile(model, backend="fxopt", options={"inner": "aot_eager"})
    with pytest.warns(RuntimeWarning, match="internal error of fxopt: KeyError: 'planted'"):
        assert_same(expected, step(model, compiled, "plain"))
    (declined,) = fxopt.report(compiled).declined
    assert declined.reasons == ("an internal error of fxopt: KeyError: 'planted'",)


def test_table_that_is_trained_is_left_alone():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x, cos, sin):
            q, k, v = (f(x).view(2, 8, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))

            def rotate(t):
                a, b = t.chunk(2, dim=-1)
                return t * cos + torch.cat((-b, a), dim=-1) * sin

            return F.scaled_dot_product_attention(rotate(q), rotate(k), v)

    model, x = Rotary(), torch.randn(2, 8, 16)
    tables = [torch.randn(8, 8, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(model(x, *tables).square().sum(), tables)
    compiled = torch.compile(model, backend="fxopt", options={"inner": "aot_eager"})
    assert_same(expected, torch.autograd.grad(compiled(x, *tables).square().sum(), tables))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"inner": "nvfuser"}, errors.UnknownOption),
        ({"inner": None}, errors.UnknownOption),
        ({"receipe": "fp8"}, errors.UnknownOption),
        ({"inner": "eager", "max_autotunes": True}, errors.UnknownOption),
        ({"recipe": "fp9"}, errors.UnknownRecipe),
    ],
)
def test_unknown_option_is_named(options, error):
    compiled = torch.compile(Model("plain"), backend="fxopt", options=options)
    with pytest.raises(Exception, match=r"unknown (option|recipe) '.*known: ") as caught:
        compiled(torch.randn(2, 8, 32), torch.randn(2, 32))
    chain = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
    assert any(isinstance(e, error) for e in chain)


def test_backend_is_found_without_importing_fxopt():
    script = """
        import torch
        f = torch.compile(lambda x: x.sin(), backend="fxopt", options={"inner": "eager"})
        assert torch.allclose(f(torch.ones(3)), torch.ones(3).sin())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_changed_backward_is_not_served_from_a_cache(tmp_path):
    """AOTAutograd's cache knows the graph, not the Python behind a backward."""
    script = """
        import sys, torch
        from fxopt.backends import inductor
        K = float(sys.argv[1])
        inductor.catalogue_hash = lambda: f"catalogue {K}"

        # No more than calls of an op: what Inductor writes itself has to pass a C++ compiler.
        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, factor):
                return below_autograd(scaled, x, factor)
            @staticmethod
            def backward(ctx, grad):
                return below_autograd(scaled, grad, K), None

        from fxopt.kernels.registration import below_autograd, register
        scaled = register(
            "test_scaled(Tensor x, float factor) -> Tensor",
            native=lambda x, factor: x * factor, fake=lambda x, _: torch.empty_like(x),
            function=Scaled,
        )
        f = torch.compile(lambda x: scaled(x, 2.0), backend="fxopt")
        x = torch.zeros(4, requires_grad=True)
        f(x).sum().backward()
        print("gradient", x.grad[0].item())
    """
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for factor in ("3", "5"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), factor],
            check=True, capture_output=True, text=True, env=env,
        )  # fmt: skip
        assert f"gradient {float(factor)}" in done.stdout
