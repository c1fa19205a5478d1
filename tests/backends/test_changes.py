"""What a user changes after `optimize` is seen at the next call: a graph is never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from tests.backends.toys import (
    CHANNELS,
    Attention,
    Block,
    assert_like_eager,
    captures,
    counting_graph_runs,
    reasons,
    stack,
    tokens,
)
from tests.families import FAMILIES


class Settings(Block):
    """Reads what users keep on modules: an object, containers, a class attribute, a missing one."""

    sign = 1.0

    def __init__(self, layer_idx: int = 0) -> None:
        super().__init__(layer_idx)
        self.config = SimpleNamespace(gain=1.0, nested=SimpleNamespace(gains=[1.0, 2.0]))
        self.scales = {"default": 1.0}
        self.shift = None
        self.register_buffer("table", torch.ones(CHANNELS))

    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = super().forward(x_BSC) * self.config.gain * self.config.nested.gains[0]
        x_BSC = self.sign * self.scales["default"] * x_BSC * self.table
        if self.shift is not None:
            x_BSC = x_BSC + self.shift
        return x_BSC + getattr(self, "bonus", 0.0)


def negated(self: Block, x_BSC: Tensor) -> Tensor:
    return -self.down(F.relu(self.up(x_BSC)))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replace_weight(block: nn.Module) -> None:
    block.up.weight = nn.Parameter(torch.full_like(block.up.weight, 0.1))


def replace_module(block: nn.Module) -> None:
    linear = Doubled(CHANNELS, 48)
    linear.load_state_dict(block.up.state_dict())
    block.up = linear


def replace_forward(block: nn.Module) -> None:
    block.up.forward = MethodType(lambda linear, x: F.linear(x, linear.weight), block.up)


def parametrize(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block.up)
    block.up.parametrizations.weight.original0.data.mul_(2)


def tie(block: nn.Module) -> None:
    block.attn.to_q.weight = block.attn.to_k.weight


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "flag": lambda b: setattr(b, "flag", True),
    "number": lambda b: setattr(b.attn, "scale", 1.0),
    "processor": lambda b: setattr(b.config, "gain", 3.0),
    "list in an object in an object": lambda b: b.config.nested.gains.__setitem__(0, 3.0),
    "dict": lambda b: b.scales.update(default=3.0),
    "instance over class attribute": lambda b: setattr(b, "sign", -1.0),
    "attribute that was None": lambda b: setattr(b, "shift", torch.ones(CHANNELS)),
    "attribute that was missing": lambda b: setattr(b, "bonus", 1.0),
    "parameter": replace_weight,
    "module": replace_module,
    "bias to None": lambda b: setattr(b.up, "bias", None),
    "weights tied": tie,
    "values in place": lambda b: b.up.weight.data.mul_(2),
    "data": lambda b: setattr(b.up.weight, "data", 2 * b.up.weight.data),
    "buffer": lambda b: setattr(b, "table", 2 * b.table),
    "buffer in place": lambda b: b.table.mul_(2),
    "forward of a submodule": replace_forward,
    "method": lambda b: setattr(b, "mlp", negated.__get__(b)),
    "activation": lambda b: setattr(b, "norm1", nn.Identity()),
    "weight norm": parametrize,
    "epsilon": lambda b: setattr(b.norm1, "eps", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    model = fxopt.optimize(stack(Settings))
    eager = stack(Settings)
    before = model(tokens())
    for m in (model, eager):
        with torch.no_grad():
            CHANGES[name](m.blocks[1])
    assert not torch.allclose(model(tokens()), before, atol=1e-3)
    assert_like_eager(model, eager)
    assert not reasons(model)  # captured anew where it had to be


@pytest.mark.parametrize("name", ["flag", "number", "dict", "parameter", "bias to None"])
def test_a_change_back_needs_no_capture(name: str) -> None:
    model, eager = fxopt.optimize(stack(Settings)), stack(Settings)
    model(tokens())
    kept = copy.deepcopy(vars(model.blocks[1]))
    CHANGES[name](model.blocks[1])
    model(tokens())
    num_captures = captures(model)
    for key in ("flag", "scales", "config"):
        setattr(model.blocks[1], key, kept[key])
    model.blocks[1].attn.scale = 0.25
    model.blocks[1].up.weight = eager.blocks[1].up.weight
    model.blocks[1].up.bias = eager.blocks[1].up.bias
    with counting_graph_runs() as runs:
        model(tokens())
    assert len(runs) == 2
    assert captures(model) == num_captures
    assert_like_eager(model, eager)


def test_a_class_that_is_patched() -> None:
    """As packages do that replace the forward of a class for all models."""
    model, eager = fxopt.optimize(stack()), stack()
    model(tokens())
    forward = Attention.forward
    try:
        Attention.forward = lambda self, x: 3 * forward(self, x)
        assert_like_eager(model, eager)
    finally:
        Attention.forward = forward
    assert_like_eager(model, eager)


@pytest.mark.parametrize("is_trained", [True, False])
def test_untied_weights(is_trained: bool) -> None:
    def tied(layer_idx: int) -> nn.Module:
        block = Block(layer_idx)
        tie(block)
        return block

    model, eager = fxopt.optimize(stack(tied)), stack(tied)
    for m in (model, eager):
        m.requires_grad_(is_trained)
    inputs = {"x": tokens().requires_grad_()}
    assert_like_eager(model, eager, inputs)
    assert not reasons(model)
    for m in (model, eager):
        attn = m.blocks[0].attn
        attn.to_q.weight = nn.Parameter(2 * attn.to_k.weight.detach())
    assert_like_eager(model, eager, inputs)


def test_to_dtype() -> None:
    model, eager = fxopt.optimize(stack()), stack()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        inputs = {"x": tokens(dtype=dtype)}
        assert_like_eager(model.to(dtype), eager.to(dtype), inputs)
    assert captures(model) == 2
    assert not reasons(model)


def test_mixed_dtypes_of_parameters() -> None:
    """fp32 norms in a bf16 model, before and after the first call."""

    class Mixed(Block):
        def forward(self, x_BSC: Tensor) -> Tensor:
            h_BSC = self.norm1(x_BSC.to(self.norm1.weight.dtype)).to(x_BSC.dtype)
            return x_BSC + self.mlp(h_BSC)

    inputs = {"x": tokens(dtype=torch.bfloat16)}
    model, eager = (stack(Mixed).bfloat16() for _ in range(2))
    fxopt.optimize(model)
    assert_like_eager(model, eager, inputs)
    for m in (model, eager):
        m.blocks[0].norm1.float()
    assert_like_eager(model, eager, inputs)
    assert captures(model) == 2


def test_load_state_dict() -> None:
    model, eager = fxopt.optimize(stack()), stack()
    model(tokens())
    state = {name: 2 * value for name, value in eager.state_dict().items()}
    for m in (model, eager):
        m.load_state_dict(state)
    assert_like_eager(model, eager)
    assigned = {name: value.clone() for name, value in stack().state_dict().items()}
    for m in (model, eager):
        m.load_state_dict(assigned, assign=True)
        m.requires_grad_()
    assert_like_eager(model, eager)


def test_training_step_of_an_optimizer() -> None:
    """Twenty steps of AdamW: what one graph accumulates wrongly would show."""
    losses = []
    for model in (stack(), fxopt.optimize(stack())):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(20):
            optimizer.zero_grad()
            loss = (model(tokens(batch=2 + step % 2)) - 1).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    # 1e-3: Adam divides by gradients' size, which turns rounding of small ones into steps.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_attention_processor() -> None:
    """diffusers' `set_attn_processor` after the first call."""
    family = FAMILIES["ltx"]
    inputs = family.inputs(2, 0, torch.float32)
    model, eager = family.build(), family.build()
    fxopt.optimize(model)(**inputs)
    kind = type(model.transformer_blocks[0].attn1.processor)

    class Halving(kind):
        def __call__(self, *args: object, **kwargs: object) -> Tensor:
            return super().__call__(*args, **kwargs) / 2

    for m in (model, eager):
        m.set_attn_processor(Halving())
    assert_like_eager(model, eager, inputs)
    assert not reasons(model)


def test_attention_implementation() -> None:
    """transformers' setting lives in a config that all layers share."""
    family = FAMILIES["llama-eager"]
    inputs = family.inputs(2, 0, torch.float32)
    model, eager = fxopt.optimize(family.build()), family.build()
    model(**inputs)
    before = fxopt.report(model).count("attention")
    for m in (model, eager):
        m.set_attn_implementation("sdpa")
    assert_like_eager(model, eager, inputs)
    assert captures(model) == 2
    assert before == 2


def test_inputs_that_start_to_require_a_gradient() -> None:
    """A table that no op differentiates is a constant only as long as it is one."""
    family = FAMILIES["ltx"]
    model, eager = (family.build().transformer_blocks[0] for _ in range(2))
    fxopt.optimize(model, targets=None)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fixed = {
        "hidden_states": draw(2, 12, 64),
        "encoder_hidden_states": draw(2, 5, 64),
        "temb": draw(2, 1, 6 * 64),
    }
    tables = draw(2, 12, 64), draw(2, 12, 64)
    for trained in (False, True, False):
        gradients = []
        for m in (model, eager):
            cos, sin = (t.clone().requires_grad_(trained) for t in tables)
            out = m(**fixed, image_rotary_emb=(cos, sin))
            out.square().sum().backward()
            gradients.append([cos.grad, sin.grad])
        for found, expected in zip(*gradients, strict=True):
            assert (found is None) == (expected is None) == (not trained)
            if trained:
                # 1e-3: fp32 sums over channels that cancel.
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
