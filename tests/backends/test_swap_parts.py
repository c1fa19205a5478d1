"""Swapping inside blocks of no known family: what is found by class and structure, what is not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.backends.blocks import find_blocks
from fxopt.backends.eager import swap
from fxopt.backends.swaps.fused import counting
from tests.backends.swapping import draw_arguments, expected
from tests.families import FAMILIES
from tests.numerics import Judge, assert_as_accurate, relative_l2, run


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
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    swap(model)

    def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        out = model(x)
        grads = torch.autograd.grad(out.double().square().sum(), [x, *model.parameters()])
        return {str(i): t for i, t in enumerate((out, *grads))}

    def draw(number: int) -> tuple[dict[str, Tensor], ...]:
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1 + number))
        x = x.to(next(model.parameters()).dtype)
        truth = {name: t.detach() for name, t in results(exact, x.double()).items()}
        return results(model, x), results(plain, x), truth

    with counting() as fired:
        first = draw(0)
    assert_as_accurate(*first, again=draw)
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

    one = {"gated_activation": 1, "merge_linears": 1, "fuse_bias": 1}
    two = {"gated_activation": 1, "merge_linears": 2}  # gate and up by linears of their own
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


def test_another_kind_of_call_is_proved_when_it_comes() -> None:
    """Experts are called with the tokens that were routed to them, [N, C]."""
    model = swap(Model(UnknownBlock(nn.LayerNorm, SwiGLU(24, 40))))
    mlp = next(m for m in model.modules() if isinstance(m, SwiGLU))
    with counting() as fired:
        mlp(torch.randn(5, 24))
    assert "gated_activation" in dict(fired)
    assert not any(d.rule == "swap" for d in fxopt.report(model).declined)


def test_a_proof_within_a_checkpoint() -> None:
    model = swap(Model(UnknownBlock(nn.LayerNorm, SwiGLU(24, 56))))
    mlp = next(m for m in model.modules() if isinstance(m, SwiGLU))
    x = torch.randn(5, 24, requires_grad=True)
    with counting() as fired:
        checkpoint(mlp, x, use_reentrant=False).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert Counter(rule for rule, _ in fired)["gated_activation"] == 2  # once more in the backward


RULES_OF_GRAPHS = {
    *("attention", "drop_mask", "qk_norm_rope", "merge_qk", "norm_modulate", "fuse_bias"),
    *("merge_streams", "norm_modulate_segments", "join_slices", "silu_linears"),
}


def test_what_lies_between_modules_is_reported() -> None:
    model = swap(Model(UnknownBlock(OffsetNorm, SwiGLU(24, 40))))
    declined = {d.rule: d for d in fxopt.report(model).declined}
    assert declined.keys() == RULES_OF_GRAPHS
    miss = declined["norm_modulate"]
    assert "lies between them, in the forward of UnknownBlock" in miss.reasons[0]
    assert "optimize" in miss.remedy
    assert __file__ in miss.source


def test_a_failed_proof_is_reported() -> None:
    model = swap(Model(UnknownBlock(TwiceEpsNorm, SwiGLU(24, 40))))
    (miss,) = (d for d in fxopt.report(model).declined if d.rule == "swap")
    assert (miss.fqn, miss.node) == ("blocks.0.norm", "TwiceEpsNorm")
    assert "differs by" in miss.reasons[0]


OVERRIDDEN = {
    "flux": expected(6, 8, 4, 10, silu_linears=6, fuse_bias=4),
    "flux2": expected(0, 4, 4, 8, rms_norm=4),
    "sd3.5": expected(12, 4, 9, 11, silu_linears=10, rms_norm=20, fuse_bias=9),
    "wan": expected(0, 8, 2, 6, fuse_bias=2),
    "ltx": expected(0, 8, 2, 6, rms_norm=4, fuse_bias=2),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_parts_of_blocks_with_an_overridden_forward(name: str) -> None:
    """AdaLN, attention, MLP and norm modules of a block that is not known as a whole."""
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs(2, 0, torch.float32)
    for block in find_blocks(model, None).values():
        kind = type(block)
        block.__class__ = type(
            kind.__name__,
            (kind,),
            {"forward": lambda self, *a, k=kind, **kw: k.forward(self, *a, **kw)},
        )
    judge = Judge(model, inputs)
    swap(model)
    with counting() as fired:
        found = run(model, inputs)
    judge(model, name, found)
    report = fxopt.report(model)
    wanted = {rule: count for rule, count in OVERRIDDEN[name].items() if count}
    assert report.counts() == wanted
    assert Counter(rule for rule, _ in fired) == wanted
    assert not any(d.rule == "swap" for d in report.declined)


def _variants() -> list[tuple[str, nn.Module, dict[str, int]]]:
    from diffusers.models.attention import JointTransformerBlock
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    wide = (96, 144, 3)  # another width than that of the narrow replica
    wan, biases = WanTransformerBlock, {"fuse_bias": 4}
    joint = {"silu_linears": 1, "fuse_bias": 6, "merge_streams": 4}
    return [
        ("sd3 without qk norm", JointTransformerBlock(96, 3, 32), expected(6, 0, 2, 6, **joint)),
        ("wan without norm2", wan(*wide), expected(4, 4, 1, 4, **biases)),
        ("wan with norm2", wan(*wide, cross_attn_norm=True), expected(4, 4, 1, 5, **biases)),
    ]


@pytest.mark.parametrize(
    ("block", "counts"), [v[1:] for v in _variants()], ids=[v[0] for v in _variants()]
)
def test_variants_of_known_blocks(block: nn.Module, counts: dict[str, int]) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    own = copy.deepcopy(block)
    assert fxopt.report(swap(model)).counts() == {r: n for r, n in counts.items() if n}
    _, arguments = draw_arguments(block)
    for a, b in zip(_leaves(block(**arguments)), _leaves(own(**arguments)), strict=True):
        # 1e-5: fp32 through one block.
        assert relative_l2(a, b.double()) < 1e-5


def _leaves(results: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor)]


class FusedAttention(nn.Module):
    """Two linears whose sizes fit those of an MLP that is read the other way round."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(-2))


class AddingMLP(nn.Module):
    """As Bloom's, which adds the residual itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.down(F.gelu(self.up(x)))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = FusedAttention(32, 2), AddingMLP(32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return self.mlp(x, x)


def test_what_is_no_mlp_by_its_structure_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def prove(*_: object) -> None:
        raise AssertionError("nothing is to be proved")

    monkeypatch.setattr("fxopt.backends.eager.prove", prove)
    model = nn.Sequential(FusedBlock(), FusedBlock())
    report = fxopt.report(swap(model))
    assert not report.applied and not [d for d in report.declined if d.rule == "swap"]


@pytest.mark.parametrize("hidden, num_quantized", [(64, 3), (40, 0), (36, 0)])
def test_an_mlp_reports_the_linears_that_are_quantized(hidden: int, num_quantized: int) -> None:
    """And not those of the narrow copy that it is proved on."""
    model = nn.Sequential(SwiGLU(48, hidden))
    report = fxopt.report(swap(model, recipe="fp8", targets=["0"]))
    assert report.count("quantized_linear") == num_quantized
    refused = [d for d in report.declined if d.rule == "quantized_linear"]
    assert len(refused) == 3 - num_quantized
