"""The third door: known blocks, MLPs and norms get fused forwards, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.backends.eager import SwappedForward, swap
from fxopt.backends.swaps.fused import counting
from fxopt.errors import (
    NotAModule,
    StillRewritten,
    StrictRule,
    TargetMatchesNothing,
    UnknownRecipe,
    UnknownRule,
)
from tests.families import FAMILIES, Family, loss
from tests.numerics import assert_as_accurate, relative_l2, run, truth


def expected(
    norm_modulate: int, qk_norm_rope: int, gated_activation: int, merge_linears: int, **more: int
) -> dict[str, int]:
    """Substitutions by rule."""
    return {
        "norm_modulate": norm_modulate,
        "qk_norm_rope": qk_norm_rope,
        "gated_activation": gated_activation,
        "merge_linears": merge_linears,
        **more,
    }


COUNTS = {
    "flux": expected(16, 8, 6, 18),
    "flux2": expected(16, 8, 6, 16),
    "sd3.5": expected(32, 14, 9, 35),
    "qwen-image": expected(12, 4, 4, 14),
    "wan": expected(8, 8, 2, 10),
    "ltx": expected(8, 8, 2, 8),
    "z-image": expected(20, 12, 6, 18, rms_norm=4),
    "qwen3-eager": expected(2, 4, 2, 6, rms_norm=2, attention=2),
    "qwen3-sdpa": expected(2, 4, 2, 6, rms_norm=2),
    "llama-eager": expected(2, 4, 2, 6, rms_norm=2, attention=2),
    "llama-sdpa": expected(2, 4, 2, 6, rms_norm=2),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def flux() -> Family:
    return FAMILIES["flux"]


# Families


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_family_is_as_accurate_and_every_substitution_runs(
    family: Family, dtype: torch.dtype
) -> None:
    model, inputs = family.build().to(dtype), family.inputs(2, 0, dtype)
    exact, eager = truth(model, inputs), run(model, inputs)
    assert swap(model) is model
    with counting() as fired:
        swapped = run(model, inputs)
    report = fxopt.report(model)
    assert_as_accurate(swapped, eager, exact, what=family.name)
    assert report.counts() == COUNTS[family.name]
    assert Counter(rule for rule, _ in fired) == COUNTS[family.name]
    assert report.declined == ()


@pytest.mark.parametrize("batch_size", [(1, 3), (3, 7)], ids=str)
def test_other_resolutions_run_fused(family: Family, batch_size: tuple[int, int]) -> None:
    model, inputs = family.build(), family.inputs(*batch_size, torch.float32)
    exact, eager = truth(model, inputs), run(model, inputs)
    swap(model)
    assert_as_accurate(run(model, inputs), eager, exact, what=family.name)
    assert fxopt.report(model).declined == ()


# What optimize counts otherwise: the norm of SD3.5's dual blocks feeds two modulations, which is one
# region of its graph and two calls here.
OTHERWISE = {"sd3.5": {"norm_modulate": 30}}


@pytest.mark.parametrize("name", ["flux", "sd3.5", "ltx", "qwen3-eager"])
def test_counts_are_those_of_optimize(name: str) -> None:
    family = FAMILIES[name]
    model = fxopt.optimize(family.build(), example_inputs=family.inputs(2, 0, torch.float32))
    assert fxopt.report(model).counts() == COUNTS[name] | OTHERWISE.get(name, {})


# What stays as it was


def test_state_and_restore(family: Family) -> None:
    model, inputs = family.build(), family.inputs(2, 0, torch.float32)
    before = run(model, inputs)
    classes = [type(m) for m in model.modules()]
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    swap(model)
    run(model, inputs)
    assert [type(m) for m in model.modules()] == classes
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    pickle.dumps(model.state_dict())

    assert fxopt.restore(model) is model
    assert not any("forward" in vars(m) or "_fxopt_doors" in vars(m) for m in model.modules())
    after = run(model, inputs)
    assert all(t is None or torch.equal(t, after[name]) for name, t in before.items())


def test_twice_is_once(flux: Family) -> None:
    model = swap(flux.build())
    forwards = [vars(m).get("forward") for m in model.modules()]
    swap(model)
    assert all(vars(m).get("forward") is f for m, f in zip(model.modules(), forwards, strict=True))
    assert fxopt.report(model).counts() == COUNTS["flux"]


def test_a_deep_copy_has_its_own_parameters(flux: Family) -> None:
    model, inputs = swap(flux.build()), flux.inputs(2, 0, torch.float32)
    before = run(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with counting() as fired:
        after = run(twin, inputs)
    assert all(t is None or torch.equal(t, after[name]) for name, t in before.items())
    assert Counter(rule for rule, _ in fired) == COUNTS["flux"]
    fxopt.restore(twin)
    assert not any("forward" in vars(m) for m in twin.modules())
    assert any("forward" in vars(m) for m in model.modules())


def test_a_swapped_model_is_pickled_after_restore_only(flux: Family) -> None:
    model = swap(flux.build())
    with pytest.raises(StillRewritten, match="restore"):
        pickle.dumps(model)
    assert pickle.dumps(fxopt.restore(model))


def test_proofs_leave_the_random_state_alone(flux: Family) -> None:
    model = flux.build()
    state = torch.get_rng_state()
    swap(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_values_is_proved_all_the_same(flux: Family) -> None:
    model = flux.build().to("meta")
    assert fxopt.report(swap(model)).counts() == COUNTS["flux"]


# Guarantees


def same(model: nn.Module, family: Family, change: Callable[[nn.Module], None]) -> Counter[str]:
    """Assert accuracy of the swapped model after `change`; return what fired."""
    change(model)
    inputs = family.inputs(2, 0, torch.float32)
    exact, eager = truth(model, inputs), run(model, inputs)
    swap(model)
    with counting() as fired:
        assert_as_accurate(run(model, inputs), eager, exact, what=family.name)
    return Counter(rule for rule, _ in fired)


@pytest.mark.parametrize("name", ["flux", "wan", "qwen3-sdpa"])
def test_frozen_weights(name: str) -> None:
    def freeze(model: nn.Module) -> None:
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i % 3 == 0)

    assert same(FAMILIES[name].build(), FAMILIES[name], freeze) == COUNTS[name]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(flux: Family, use_reentrant: bool) -> None:
    def enable(model: nn.Module) -> None:
        model.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant)
        )

    # Reentrant checkpointing has no gradient to give where no input has one: FLUX's embedders are
    # outside the blocks, so its inputs do. Each block runs once more in the backward.
    twice = {rule: 2 * count for rule, count in COUNTS["flux"].items()}
    assert same(flux.build(), flux, enable) == twice


def test_autocast_runs_the_own_forward(flux: Family) -> None:
    model, inputs = flux.build(), flux.inputs(2, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model, inputs)
        swap(model)
        swapped = run(model, inputs)
    assert all(t is None or torch.equal(t, swapped[name]) for name, t in eager.items())
    assert any("autocast" in r for d in fxopt.report(model).declined for r in d.reasons)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_evaluation(flux: Family, mode: type) -> None:
    model, inputs = flux.build().eval(), flux.inputs(2, 0, torch.float32)
    eager = loss(model, inputs)
    swap(model)
    with mode(), counting() as fired:
        # 1e-5: one projection of fp32 outputs, whose roundings differ.
        torch.testing.assert_close(loss(model, inputs), eager.detach(), rtol=1e-5, atol=1e-5)
    assert Counter(rule for rule, _ in fired) == COUNTS["flux"]
    model.train()
    assert_as_accurate(
        run(model, inputs), run(flux.build(), inputs), truth(flux.build(), inputs), what="train"
    )


def test_hooks_of_the_block_run_and_those_inside_bring_the_own_forward_back(flux: Family) -> None:
    model, inputs = swap(flux.build()), flux.inputs(2, 0, torch.float32)
    calls = []
    block = model.transformer_blocks[0]
    block.register_forward_hook(lambda *_: calls.append("block"))
    with counting() as all_fused:
        eager = run(model, inputs)
    handle = block.ff.register_forward_hook(lambda *_: calls.append("ff"))
    with counting() as three_fused:
        hooked = run(model, inputs)
    handle.remove()
    assert calls == ["block", "ff", "block"]
    assert len(three_fused) == len(all_fused) - 17  # one double block less
    for name, t in eager.items():
        # 1e-4: fp32 through four blocks, one of which rounds differently.
        assert t is None or relative_l2(hooked[name], t.double()) < 1e-4, name
    assert any("hooks" in r for d in fxopt.report(model).declined for r in d.reasons)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(flux: Family, when: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def wrap(model: nn.Module) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False)
        inject_adapter_in_model(config, model)

    model = flux.build()
    if when == "after":
        swap(model)
        wrap(model)
        fired = same(model, flux, lambda _: None)
    else:
        fired = same(model, flux, wrap)
    assert fired["qk_norm_rope"] == 8
    assert fired["norm_modulate"] == 16
    assert fired["merge_linears"] < 18  # wrapped linears are called as modules


def test_replaced_parameters_are_the_ones_used(flux: Family) -> None:
    model, inputs = swap(flux.build()), flux.inputs(2, 0, torch.float32)
    run(model, inputs)
    linear = model.transformer_blocks[0].attn.to_q
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    reference = flux.build()
    reference.load_state_dict(model.state_dict())
    exact, eager = truth(reference, inputs), run(reference, inputs)
    assert_as_accurate(run(model, inputs), eager, exact, what="replaced")


def test_dropout_is_honoured(flux: Family) -> None:
    model, inputs = flux.build(), flux.inputs(2, 0, torch.float32)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.5
    eager = []
    for _ in range(2):
        torch.manual_seed(0)
        eager.append(loss(model, inputs).item())
        swap(model)
    torch.manual_seed(1)
    other = loss(model, inputs).item()
    counts = fxopt.report(model).counts()
    # 1e-4: fp32 outputs of order one, summed; another mask changes the sum by far more.
    assert eager[0] == pytest.approx(eager[1], rel=1e-4)
    assert other != pytest.approx(eager[0], rel=1e-2)
    assert counts["merge_linears"] == COUNTS["flux"]["merge_linears"] - 4  # `out` of four MLPs


def test_optimize_after_swap_and_the_reverse(flux: Family) -> None:
    inputs = flux.inputs(2, 0, torch.float32)
    exact, eager = truth(flux.build(), inputs), run(flux.build(), inputs)
    for doors in ((swap, fxopt.optimize), (fxopt.optimize, swap)):
        model = flux.build()
        for door in doors:
            door(model)
        assert_as_accurate(run(model, inputs), eager, exact, what=str(doors))
        report = fxopt.report(model)
        assert report.count("norm_modulate") >= COUNTS["flux"]["norm_modulate"]
        fxopt.restore(model)
        assert not any("forward" in vars(m) for m in model.modules())


def test_dynamo_sees_the_own_forward(flux: Family) -> None:
    model = swap(flux.build())
    block = model.transformer_blocks[0]
    graphs = []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(gm)
        return gm

    example = next(vars(block)["forward"].swap.examples(block, _draw(block)))
    with torch.no_grad():
        torch.compile(block, backend=backend, fullgraph=True)(**example)
    assert not any("fxopt" in str(n.target) for gm in graphs for n in gm.graph.nodes)
    assert "layer_norm" in str([n.target for gm in graphs for n in gm.graph.nodes])


def _draw(module: nn.Module) -> object:
    from fxopt.backends.swaps.swap import Draw

    return Draw(module)


# Found by structure


class OffsetNorm(nn.Module):
    """RMSNorm that stores its weight minus one, in fp32, as Gemma has it."""

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = epsilon

    def forward(self, x: Tensor) -> Tensor:
        n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (n * (1.0 + self.weight.float())).to(x.dtype)


class TwiceEpsNorm(OffsetNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * self.eps) * self.weight


class SecondToLastNorm(OffsetNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + self.eps) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Callable = F.silu) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.gate, self.activation = nn.Linear(width, hidden), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.activation(self.gate(x)))


class UnknownBlock(nn.Module):
    """A block of no known family, made of parts that are known by their structure."""

    def __init__(self, norm: type[nn.Module], mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm(24), mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _norms() -> list[tuple[str, Callable[[], nn.Module], int]]:
    from diffusers.models.normalization import RMSNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return [
        ("torch", lambda width: nn.RMSNorm(width, eps=1e-6), 1),
        ("torch, eps of the dtype", nn.RMSNorm, 1),
        ("diffusers", lambda width: RMSNorm(width, 1e-5), 1),
        ("llama", LlamaRMSNorm, 1),
        ("gemma", GemmaRMSNorm, 1),
        ("own", OffsetNorm, 1),
        ("twice eps", TwiceEpsNorm, 0),
        ("another dim", SecondToLastNorm, 0),
        ("layer norm", nn.LayerNorm, 0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("norm", "count"), [n[1:] for n in _norms()], ids=[n[0] for n in _norms()])
def test_norms(norm: Callable[[int], nn.Module], count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model(UnknownBlock(norm, SwiGLU(24, 40))).to(dtype)
    _check_unknown(model, {"rms_norm": count, "gated_activation": 1, "merge_linears": 2})


def _check_unknown(model: nn.Module, counts: dict[str, int]) -> None:
    """The swapped model is as accurate as the model was, and `counts` substitutions run."""
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))
    x = x.to(next(model.parameters()).dtype)

    def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        out = model(x)
        grads = torch.autograd.grad(out.double().square().sum(), [x, *model.parameters()])
        return {str(i): t for i, t in enumerate((out, *grads))}

    exact, eager = results(copy.deepcopy(model).double(), x.double()), results(model, x)
    exact = {name: t.detach() for name, t in exact.items()}
    swap(model)
    with counting() as fired:
        found = results(model, x)
    assert_as_accurate(found, eager, exact)
    wanted = {rule: count for rule, count in counts.items() if count}
    assert Counter(rule for rule, _ in fired) == wanted
    assert fxopt.report(model).counts() == wanted


def _mlps() -> list[tuple[str, Callable[[], nn.Module], dict[str, int]]]:
    from diffusers.models.attention import FeedForward
    from transformers.activations import GELUTanh

    def feed_forward(name: str, **options: float) -> Callable[[], nn.Module]:
        return lambda: FeedForward(24, activation_fn=name, mult=2, **options)

    def sequential(activation: nn.Module) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(nn.Linear(24, 48), activation, nn.Linear(48, 24, bias=False))

    one, two = ({"gated_activation": 1, "merge_linears": n} for n in (1, 2))
    return [
        ("gelu", feed_forward("gelu"), one),
        ("gelu-approximate", feed_forward("gelu-approximate"), one),
        ("geglu", feed_forward("geglu"), one),
        ("swiglu", feed_forward("swiglu"), one),
        ("linear-silu", feed_forward("linear-silu"), one),
        ("sigmoid gelu", feed_forward("geglu-approximate"), {}),
        ("dropout", feed_forward("gelu", dropout=0.1), {}),
        ("sequential relu", sequential(nn.ReLU()), one),
        ("sequential gelu", sequential(GELUTanh()), one),
        ("sequential tanh", sequential(nn.Tanh()), {}),
        ("gate and up", lambda: SwiGLU(24, 40), two),
        ("gate and up, gelu", lambda: SwiGLU(24, 40, F.gelu), two),
        ("as wide as deep", lambda: SwiGLU(24, 24), two),
    ]


@pytest.mark.parametrize(("mlp", "counts"), [m[1:] for m in _mlps()], ids=[m[0] for m in _mlps()])
def test_mlps(mlp: Callable[[], nn.Module], counts: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Model(UnknownBlock(nn.LayerNorm, mlp())).eval()
    _check_unknown(model, counts)


def test_what_lies_between_modules_is_reported() -> None:
    model = swap(Model(UnknownBlock(OffsetNorm, SwiGLU(24, 40))))
    declined = {d.rule: d for d in fxopt.report(model).declined}
    assert declined.keys() == {"attention", "qk_norm_rope", "norm_modulate"}
    miss = declined["norm_modulate"]
    assert "lies between them, in the forward of UnknownBlock" in miss.reasons[0]
    assert "optimize" in miss.remedy
    assert __file__ in miss.source


def test_a_failed_proof_is_reported() -> None:
    model = swap(Model(UnknownBlock(TwiceEpsNorm, SwiGLU(24, 40))))
    (miss,) = (d for d in fxopt.report(model).declined if d.rule == "swap")
    assert (miss.fqn, miss.node) == ("blocks.0.norm", "TwiceEpsNorm")
    assert "differs by" in miss.reasons[0]


# Near misses


def test_an_overridden_forward_is_not_touched(flux: Family) -> None:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    class Doubled(FluxSingleTransformerBlock):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
            text, image = super().forward(*args, **kwargs)
            return text, 2 * image

    class Renamed(FluxSingleTransformerBlock):
        pass

    model, inputs = flux.build(), flux.inputs(2, 0, torch.float32)
    model.single_transformer_blocks[0].__class__ = Doubled
    model.single_transformer_blocks[1].__class__ = Renamed
    exact, eager = truth(model, inputs), run(model, inputs)
    swap(model)
    assert "forward" not in vars(model.single_transformer_blocks[0])
    assert "forward" in vars(model.single_transformer_blocks[1])
    assert_as_accurate(run(model, inputs), eager, exact, what="overridden")


def test_a_changed_part_of_a_known_block_fails_the_proof(flux: Family) -> None:
    """The class of the block is known; that it computes what the class says is not taken for granted."""

    class Halved(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model, inputs = flux.build(), flux.inputs(2, 0, torch.float32)
    block = model.transformer_blocks[1]
    block.attn.norm_k.__class__ = Halved
    exact, eager = truth(model, inputs), run(model, inputs)
    swap(model)
    assert "forward" not in vars(block)
    assert_as_accurate(run(model, inputs), eager, exact, what="halved")
    reasons = [d.reasons[0] for d in fxopt.report(model).declined if d.node == type(block).__name__]
    assert any("differs by" in reason for reason in reasons)


def test_a_processor_set_later_is_noticed(flux: Family) -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Negated(FluxAttnProcessor):
        def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(-t for t in super().__call__(*args, **kwargs))

    model, inputs = swap(flux.build()), flux.inputs(2, 0, torch.float32)
    run(model, inputs)
    model.transformer_blocks[0].attn.processor = Negated()
    reference = flux.build()
    reference.transformer_blocks[0].attn.processor = Negated()
    exact, eager = truth(reference, inputs), run(reference, inputs)
    assert_as_accurate(run(model, inputs), eager, exact, what="negated")
    assert [d.fqn for d in fxopt.report(model).declined] == ["transformer_blocks.0"]


def test_a_call_of_another_kind_runs_the_own_forward(flux: Family) -> None:
    model = swap(flux.build())
    block = model.transformer_blocks[0]
    forward = vars(block)["forward"]
    assert isinstance(forward, SwappedForward)
    arguments = next(forward.swap.examples(block, _draw(block)))
    cos, sin = arguments["image_rotary_emb"]
    calls = [
        arguments | {"image_rotary_emb": None},
        arguments | {"image_rotary_emb": (cos.requires_grad_(), sin)},
    ]
    for call in calls:
        with counting() as fired:
            found = block(**call)
        assert not fired
        assert all(map(torch.equal, found, forward.original(**call)))
    (declined,) = fxopt.report(model).declined
    assert "it is called with" in declined.reasons[0]
    assert "requires grad" in declined.reasons[1]


def test_tables_in_double_precision_are_proved_when_they_come(flux: Family) -> None:
    model = swap(flux.build())
    block = model.transformer_blocks[0]
    forward = vars(block)["forward"]
    arguments = next(forward.swap.examples(block, _draw(block)))
    arguments["image_rotary_emb"] = tuple(t.double() for t in arguments["image_rotary_emb"])
    with counting() as fired:
        found = block(**arguments)
    assert len(fired) == 17
    for a, b in zip(found, forward.original(**arguments), strict=True):
        assert a.dtype == b.dtype
        # 1e-5: fp32 through one block, values of order one.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Mistakes


def test_mistakes_leave_the_model_as_it_was(flux: Family) -> None:
    model = flux.build()
    for mistake, options in (
        (UnknownRecipe, {"recipe": "fp7"}),
        (UnknownRule, {"strict": ["norm_modulat"]}),
        (TargetMatchesNothing, {"targets": ["blocks.*"]}),
        (StrictRule, {"strict": ["qk_norm_rope", "attention"]}),
    ):
        with pytest.raises(mistake):
            swap(model, **options)
        assert not any("forward" in vars(m) or "_fxopt_doors" in vars(m) for m in model.modules())
    with pytest.raises(NotAModule):
        swap("flux")


def test_targets(flux: Family) -> None:
    model = swap(
        flux.build(), targets=["transformer_blocks.0", "single_transformer_blocks.1.norm*"]
    )
    blocks = {a.fqn for a in fxopt.report(model).applied}
    assert blocks == {"transformer_blocks.0"}
