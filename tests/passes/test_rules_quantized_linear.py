"""quantized_linear: which linears a recipe takes, by role, and the reasons for those it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.capture import capture
from fxopt.backends.options import rules_for
from fxopt.hardware import lookup
from fxopt.passes.rules import quantized_linear as rule
from fxopt.recipes import RECIPES, Recipe
from tests.passes.rewriting import Rewritten, Written, normal

FP8 = RECIPES["fp8_tensorwise"]
WIDTH = 32


def rewritten(
    forward: Callable[..., object],
    *inputs: Tensor,
    recipe: Recipe = FP8,
    block: str | None = "blocks.0",
    **parameters: Tensor | nn.Module,
) -> Rewritten:
    module = Written(forward, **parameters)
    rules = rules_for(recipe, block=block)
    return Rewritten(module, capture(module, module.forward, inputs, {}, rules))


def weight(out: int = WIDTH, features: int = WIDTH) -> Tensor:
    return normal(out, features).detach() / features**0.5


def test_linears_of_one_input_share_its_quantized_form() -> None:
    found = rewritten(
        lambda m, x: (F.linear(x, m.q, m.bias), F.linear(x, m.k)),
        normal(2, 7, WIDTH),
        q=weight(),
        k=weight(48),
        bias=normal(WIDTH).detach(),
    )
    assert found.count("quantized_linear") == 2
    assert "fxopt.quantized_linears(inputs_0, [p_q, p_k], [p_bias, None]" in found.code()
    assert found.plan.outcome.applied[-1].tier == "low_precision"


@pytest.mark.parametrize("shape", [(2, WIDTH), (2, 1, WIDTH)])
def test_one_row_per_sample_is_a_modulation(shape: tuple[int, ...]) -> None:
    found = rewritten(lambda m, x: F.linear(F.silu(x), m.w), normal(*shape), w=weight())
    assert found.reasons("quantized_linear") == [rule.PER_SAMPLE]


def test_a_modulation_per_token_is_one_too() -> None:
    def forward(m: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = F.linear(F.silu(emb), m.ada).chunk(2, -1)
        y = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        return F.linear(y, m.out)

    found = rewritten(
        forward, normal(2, 7, WIDTH), normal(2, 7, WIDTH), ada=weight(2 * WIDTH), out=weight()
    )
    assert found.reasons("quantized_linear") == [rule.MODULATES]
    assert found.count("quantized_linear") == 1


@pytest.mark.parametrize("by", ["where", "gather", "index_select"])
def test_a_modulation_that_is_looked_up_is_one_too(by: str) -> None:
    """Whether the lookup goes into the op of segments, or stays in front of a norm."""

    def forward(m: nn.Module, x: Tensor, emb: Tensor, index: Tensor) -> Tensor:
        table = F.linear(F.silu(emb), m.ada)
        if by == "where":
            modulation = torch.where(index[..., None] == 0, table[:, :1], table[:, 1:])
        elif by == "gather":
            modulation = table.gather(1, index[..., None].expand(-1, -1, 2 * WIDTH))
        else:
            modulation = table.index_select(-2, index[0])
        scale, shift = modulation.chunk(2, -1)
        y = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift.tanh()
        return F.linear(y, m.out)

    inputs = normal(2, 7, WIDTH), normal(2, 2, WIDTH), torch.randint(0, 2, (2, 7))
    found = rewritten(forward, *inputs, ada=weight(2 * WIDTH), out=weight())
    assert found.reasons("quantized_linear") == [rule.MODULATES]
    assert found.count("quantized_linear") == 1


def test_sizes_that_no_unit_takes() -> None:
    found = rewritten(lambda m, x: F.linear(x, m.w), normal(2, 7, 24), w=weight(20, 24))
    assert found.reasons("quantized_linear") == [rule.SIZES.format("20 and 24")]


def test_weights_that_are_stored_the_other_way_round() -> None:
    """GPT-2: their codes would be those of a copy."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.addmm(m.b, x.view(-1, WIDTH), m.w).view(*x.shape[:-1], 48)

    bias = normal(48).detach()
    found = rewritten(forward, normal(2, 7, WIDTH), w=weight(WIDTH, 48), b=bias)
    assert found.reasons("quantized_linear") == [rule.STORED]


def test_float64_is_left_alone() -> None:
    x = normal(2, 7, WIDTH, dtype=torch.float64)
    found = rewritten(lambda m, x: F.linear(x, m.w), x, w=weight().double())
    assert found.reasons("quantized_linear") == [rule.FLOAT64]


def test_all_reasons_are_listed() -> None:
    found = rewritten(lambda m, x: F.linear(x, m.w), normal(2, 24), w=weight(20, 24))
    assert len(found.reasons("quantized_linear")) == 2


class Model(nn.Module):
    """An embedder, two blocks of two linears, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        pairs = [[nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)] for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.project(x)


def captured(model: nn.Module, recipe: Recipe, block: str | None) -> Rewritten:
    x = normal(2, 7, WIDTH)
    return Rewritten(model, capture(model, model.forward, (x,), {}, rules_for(recipe, block=block)))


def test_what_stands_outside_the_blocks_of_a_model() -> None:
    found = captured(Model(), FP8, None)
    assert found.count("quantized_linear") == 4
    declined = [d for d in found.plan.outcome.declined if d.rule == "quantized_linear"]
    assert [d.reasons for d in declined] == [(rule.OUTSIDE,)] * 2
    assert all(d.remedy == rule.REMEDY for d in declined)


def test_a_graph_that_is_a_block_has_no_outside() -> None:
    assert captured(Model(), FP8, "").count("quantized_linear") == 6


def test_the_recipe_keeps_by_name() -> None:
    recipe = replace(FP8, keep=("blocks.0.*",))
    found = captured(Model(), recipe, None)
    assert found.count("quantized_linear") == 2
    assert rule.KEPT in found.reasons("quantized_linear")
    # The name is that in the model, also where the graph is of a block alone.
    assert captured(Model().blocks[0], recipe, "blocks.0").count("quantized_linear") == 0
    assert captured(Model().blocks[0], recipe, "blocks.1").count("quantized_linear") == 2


def test_a_write_between_two_linears_splits_the_group() -> None:
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        q = F.linear(x, m.q)
        x.mul_(2)
        return q, F.linear(x, m.q)

    x = normal(2, 7, WIDTH).detach()
    found = rewritten(forward, x.clone(), q=weight())
    assert found.count("quantized_linear") <= 1
    exact = Written(forward, q=found.module.q.detach())
    for a, b in zip(found(x.clone()), exact(x.clone()), strict=True):
        assert (a - b).norm() < 0.06 * b.norm()  # two operands of e4m3: 27 dB


def test_without_a_recipe_there_is_no_rule() -> None:
    assert rule.RULE not in rules_for(RECIPES["bf16"])
    assert not list(rule.RULE.propose(None))


@pytest.mark.parametrize(
    ("activation", "merging"), [(torch.tanh, "merge_linears"), (F.silu, "silu_linears")]
)
def test_merging_takes_the_linears_that_are_left(
    activation: Callable[[Tensor], Tensor], merging: str
) -> None:
    def forward(m: nn.Module, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        pooled = activation(emb)
        return F.linear(x, m.q), F.linear(x, m.k), F.linear(pooled, m.a), F.linear(pooled, m.b)

    found = rewritten(
        forward,
        normal(2, 7, WIDTH),
        normal(2, WIDTH),
        **{name: weight() for name in ("q", "k", "a", "b")},
    )
    assert (found.count("quantized_linear"), found.count(merging)) == (2, 1)


def test_what_does_not_pay_says_from_where_it_does() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, m.w)

    module = Written(forward, w=weight(512, 512))
    theta = 1 / 512 + 1 / 512 + 1 / 100.5  # 101 tokens and more
    for num_tokens, applied in ((50, 0), (101, 1)):
        inputs = (normal(1, num_tokens, 512),)  # a batch of 1, which is captured as 2
        chosen = [rule.rule(FP8, "", theta)]
        found = Rewritten(module, capture(module, module.forward, inputs, {}, chosen))
        assert found.count("quantized_linear") == applied
    found = Rewritten(module, capture(module, module.forward, (normal(1, 50, 512),), {}, chosen))
    (why,) = found.reasons("quantized_linear")
    assert why == "512 -> 512 features: FP8 pays from 101 tokens, here are 50"


@pytest.mark.parametrize("profit, count", [("model", 2), ("always", 4)])
def test_the_recipe_decides_whether_the_cost_counts(profit: str, count: int) -> None:
    recipe = replace(FP8, profit=profit)
    rules = rules_for(recipe, block="", target=lookup("h100"))
    wide, narrow = weight(4096, 4096), weight()

    def forward(m: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, m.q), F.linear(x, m.k), F.linear(y, m.a), F.linear(y, m.b)

    module = Written(forward, q=wide, k=wide, a=narrow, b=narrow)
    inputs = (normal(2, 700, 4096), normal(2, 700, WIDTH))
    assert (
        Rewritten(module, capture(module, module.forward, inputs, {}, rules)).count(
            "quantized_linear"
        )
        == count
    )


def test_without_units_nothing_pays() -> None:
    rules = rules_for(FP8, block="", target=lookup("a100"))
    module = Written(lambda m, x: F.linear(x, m.w), w=weight())
    inputs = (normal(2, 7, WIDTH),)
    found = Rewritten(module, capture(module, module.forward, inputs, {}, rules))
    assert found.reasons("quantized_linear") == ["32 -> 32 features: FP8 never pays, here are 14"]


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("reads_whole", [False, True])
def test_an_output_that_is_only_split_is_in_pieces(is_normed: bool, reads_whole: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(F.layer_norm(x, (WIDTH,)) if is_normed else x * 2, m.w)
        return (*y.split((WIDTH, 2 * WIDTH), -1), *([y] if reads_whole else []))

    code = rewritten(forward, normal(2, 7, WIDTH), w=weight(3 * WIDTH)).code()
    stops = [3 * WIDTH] if reads_whole else [WIDTH, 3 * WIDTH]
    pieces = [n for start, stop in zip([0, *stops], stops, strict=False) for n in (0, start, stop)]
    assert f"{pieces})" in code.replace("\n    ", " ")
