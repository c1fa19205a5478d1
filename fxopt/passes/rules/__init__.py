"""One file is one substitution; CATALOGUE is the only list, in the order of application."""

from fxopt.passes.rule import Rule
from fxopt.passes.rules import (
    attention,
    gated_activation,
    merge_linears,
    norm_modulate,
    qk_norm_rope,
    quantized_linear,
    rms_norm,
)

CATALOGUE: tuple[Rule, ...] = (
    attention.RULE,
    rms_norm.RULE,
    qk_norm_rope.RULE,
    norm_modulate.RULE,
    gated_activation.RULE,
    quantized_linear.RULE,
    merge_linears.RULE,
)
