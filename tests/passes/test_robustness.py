"""Each idiom in many spellings, and the near misses of each.

Hypothesis draws the spellings from a fixed seed; a failure prints the draws. That a spelling which
does not fire is left as it was, and that one which fires means the same, holds in either case.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.passes import near_misses, spellings
from tests.passes.rewriting import rewrite
from tests.passes.spellings.parts import Pick, Spelling

LEAST_SHARE = 0.95
# How often which rules fire, together, when an idiom is understood.
IDIOMS: dict[Callable[[Pick], Spelling], tuple[int, tuple[str, ...]]] = {
    spellings.rms_norm: (1, ("rms_norm",)),
    # With [D] vectors for scale and shift, a norm and its modulation are one affine norm.
    spellings.norm_modulate: (1, ("norm_modulate", "rms_norm")),
    spellings.gated_residual: (1, ("norm_modulate",)),
    spellings.gated_activation: (1, ("gated_activation",)),
    spellings.attention: (1, ("attention",)),
    spellings.qk_norm_rope: (2, ("qk_norm_rope",)),
}
NEAR_MISSES: tuple[Callable[[Pick], Spelling], ...] = (
    near_misses.rms_norm,
    near_misses.norm_modulate,
    near_misses.gated_activation,
    near_misses.attention,
    near_misses.qk_norm_rope,
)


def examples(num: int) -> settings:
    return settings(
        max_examples=num,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def picker(data: st.DataObject) -> Pick:
    def pick(what: str, *alternatives: Any) -> Any:
        return alternatives[data.draw(st.integers(0, len(alternatives) - 1), label=what)]

    return pick


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def num_examples(few: int, many: int) -> pytest.MarkDecorator:
    """How many are drawn, in the quick run and in the full one."""
    return pytest.mark.parametrize("num", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda f: f.__name__)
@num_examples(10, 30)
def test_equivalent_spellings_fire(idiom: Callable[[Pick], Spelling], num: int):
    expected, rules = IDIOMS[idiom]
    fired: list[bool] = []

    @examples(num)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        pick = picker(data)
        module, inputs = idiom(pick)
        context = pick("context", nullcontext, nullcontext, autocast)
        with context():
            found = rewrite(module, *inputs)
        fired.append(sum(found.count(rule) for rule in rules) == expected)
        assert fired[-1] or any(found.reasons(rule) for rule in rules), "no reason is given"
        found.assert_as_accurate(
            *inputs, context=context, recomputed=pick("recompute", False, True)
        )

    check()
    assert sum(fired) >= LEAST_SHARE * len(fired), f"{sum(fired)} of {len(fired)} fired"


@pytest.mark.parametrize("near_miss", NEAR_MISSES, ids=lambda f: f.__name__)
@num_examples(5, 15)
def test_near_misses_stay(near_miss: Callable[[Pick], Spelling], num: int):
    @examples(num)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        module, inputs = near_miss(picker(data))
        found = rewrite(module, *inputs)
        assert not found.count(near_miss.__name__), found.code()
        found.assert_as_accurate(*inputs)

    check()
