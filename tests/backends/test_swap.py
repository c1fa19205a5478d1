"""The third door: known blocks get fused forwards; what is not known to be the same does not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backends.eager import swap
from fxopt.backends.swaps.fused import counting
from fxopt.errors import (
    NotAModule,
    OtherSetting,
    StrictRule,
    TargetMatchesNothing,
    UnknownRecipe,
    UnknownRule,
)
from tests.backends.swapping import COUNTS, draw_arguments
from tests.backends.test_optimize_families import COUNTS as OF_OPTIMIZE
from tests.backends.test_optimize_families import NAMES
from tests.families import FAMILIES, Family
from tests.numerics import Judge, run


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def flux() -> Family:
    return FAMILIES["flux"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_family_is_as_accurate_and_every_substitution_runs(
    family: Family, dtype: torch.dtype
) -> None:
    model, inputs = family.build().to(dtype), family.inputs(2, 0, dtype)
    judge = Judge(model, inputs)
    assert swap(model) is model
    with counting() as fired:
        swapped = run(model, inputs)
    report = fxopt.report(model)
    judge(model, family.name, swapped)
    assert report.counts() == COUNTS[family.name]
    assert Counter(rule for rule, _ in fired) == COUNTS[family.name]
    assert report.declined == ()


@pytest.mark.parametrize("batch_size", [(1, 3), (3, 7)], ids=str)
def test_other_resolutions_run_fused(family: Family, batch_size: tuple[int, int]) -> None:
    model, inputs = family.build(), family.inputs(*batch_size, torch.float32)
    judge = Judge(model, inputs)
    swap(model)
    judge(model, family.name)
    assert fxopt.report(model).declined == ()


# What optimize counts otherwise: the norm of SD3.5's dual blocks feeds two modulations, which is
# one region of its graph and two calls here.
OTHERWISE = {"sd3.5": {"norm_modulate": 30}}


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_optimize(name: str) -> None:
    """By the tables, which the tests of both doors hold to the models."""
    of_optimize = dict(zip(NAMES, OF_OPTIMIZE[name], strict=True))
    found = {rule: count for rule, count in of_optimize.items() if count}
    assert found == COUNTS[name] | OTHERWISE.get(name, {})


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
    judge = Judge(model, inputs)
    swap(model)
    assert "forward" not in vars(model.single_transformer_blocks[0])
    assert "forward" in vars(model.single_transformer_blocks[1])
    judge(model, "overridden")


def test_a_changed_part_of_a_known_block_fails_the_proof(flux: Family) -> None:
    """The class of a block is known; that it computes what the class says is still proved."""

    class Halved(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model, inputs = flux.build(), flux.inputs(2, 0, torch.float32)
    block = model.transformer_blocks[1]
    block.attn.norm_k.__class__ = Halved
    judge = Judge(model, inputs)
    swap(model)
    assert "forward" not in vars(block)
    judge(model, "halved")
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
    Judge(reference, inputs)(model, "negated")
    assert [d.fqn for d in fxopt.report(model).declined] == ["transformer_blocks.0"]


def test_a_call_of_another_kind_runs_the_own_forward(flux: Family) -> None:
    model = swap(flux.build())
    block = model.transformer_blocks[0]
    forward, arguments = draw_arguments(block)
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
    forward, arguments = draw_arguments(block)
    arguments["image_rotary_emb"] = tuple(t.double() for t in arguments["image_rotary_emb"])
    with counting() as fired:
        found = block(**arguments)
    assert len(fired) == 28
    for a, b in zip(found, forward.original(**arguments), strict=True):
        assert a.dtype == b.dtype
        # 1e-5: fp32 through one block, values of order one.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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
    assert blocks == {"transformer_blocks.0", "single_transformer_blocks.1.norm"}
    with pytest.raises(OtherSetting, match=r"targets=None .*'transformer_blocks.0'.* already"):
        swap(model)
    assert {a.fqn for a in fxopt.report(model).applied} == blocks


def test_strict_is_asked_of_a_door_that_is_open(flux: Family) -> None:
    model = swap(flux.build())
    counts = fxopt.report(model).counts()
    assert swap(model, strict=["norm_modulate"]) is model
    with pytest.raises(StrictRule, match="'linear_cross_entropy'"):
        swap(model, strict=["linear_cross_entropy"])
    assert fxopt.report(model).counts() == counts
