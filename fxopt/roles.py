"""Where a recipe keeps or changes formats: globs over names of linears, and roles.

A role goes by the names that diffusers and transformers give their modules, which every door knows;
a model with names of its own takes globs. A linear that serves two roles at once, such as FLUX's
output of attention and MLP, has both.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from types import MappingProxyType

PREFIX = "role:"
_QKV_AND_MLP = ("*.to_qkv_mlp_proj",)
_OUT_OF_BOTH = ("*single_transformer_blocks.*.proj_out", "*single_transformer_blocks.*.attn.to_out")
ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv": ("*.to_[qkv]", "*.add_[qkv]_proj", "*.[qkv]_proj", "*.to_qkv", *_QKV_AND_MLP),
        "attention_out": ("*.to_out.0", "*.to_add_out", "*.o_proj", *_OUT_OF_BOTH),
        "mlp_in": (
            *("*.net.0.proj", "*.proj_mlp", "*.linear_in", "*.gate_proj", "*.up_proj", "*.w[13]"),
            *_QKV_AND_MLP,
        ),
        "mlp_out": ("*.net.2", "*.linear_out", "*.down_proj", "*.w2", *_OUT_OF_BOTH),
    }
)


def unknown(where: str) -> str | None:
    """The role of `where`, if there is none of that name."""
    role = where.removeprefix(PREFIX)
    return role if where.startswith(PREFIX) and role not in ROLES else None


def matches(where: str, fqn: str) -> bool:
    """Whether a glob, or "role:NAME", picks the linear of this fully qualified name."""
    globs = ROLES[where.removeprefix(PREFIX)] if where.startswith(PREFIX) else (where,)
    return any(fnmatch.fnmatchcase(fqn, glob) for glob in globs)
