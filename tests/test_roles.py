"""Roles go by names: every block linear of every family has one, what modulates has none."""

from __future__ import annotations

import pytest
from torch import nn

from fxopt import roles
from tests.families import FAMILIES

SENSITIVE = ("norm", "mod", "adaLN")


def of(fqn: str) -> set[str]:
    return {role for role in roles.ROLES if roles.matches(f"role:{role}", fqn)}


@pytest.mark.parametrize("name", FAMILIES)
def test_linears_of_blocks_have_roles(name: str) -> None:
    linears = [n for n, m in FAMILIES[name].build().named_modules() if isinstance(m, nn.Linear)]
    within = {n for n in linears if any(part.isdigit() for part in n.split(".")[:-1])}
    within -= {n for n in linears if any(s in n.replace("model", "") for s in SENSITIVE)}
    within -= {n for n in linears if "embed" in n}
    assert len(within) > 5
    for fqn in linears:
        assert bool(of(fqn)) == (fqn in within), fqn


def test_a_linear_can_have_two() -> None:
    assert of("single_transformer_blocks.3.proj_out") == {"attention_out", "mlp_out"}
    assert of("single_transformer_blocks.3.attn.to_qkv_mlp_proj") == {"qkv", "mlp_in"}
    assert of("transformer_blocks.3.attn.to_k") == {"qkv"}
    assert of("proj_out") == of("x_embedder") == set()


def test_what_is_no_role_is_a_glob() -> None:
    assert roles.matches("*.attn.*", "blocks.0.attn.to_q")
    assert not roles.matches("*.ATTN.*", "blocks.0.attn.to_q")
    assert roles.unknown("qkw") is None and roles.unknown("role:qkv") is None
    assert roles.unknown("role:qkw") == "qkw"
