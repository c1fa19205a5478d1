"""One file is one substitution; CATALOGUE is the only list, in the order of application."""

from fxopt.passes.rule import Rule
from fxopt.passes.rules import (
    attention,
    drop_mask,
    fuse_bias,
    gated_activation,
    join_slices,
    linear_cross_entropy,
    merge_linears,
    merge_qk,
    merge_quantized,
    merge_streams,
    norm_modulate,
    norm_modulate_segments,
    qk_norm_rope,
    quantized_linear,
    rms_norm,
    silu_linears,
)

CATALOGUE: tuple[Rule, ...] = (
    attention.RULE,
    drop_mask.RULE,
    rms_norm.RULE,
    qk_norm_rope.RULE,
    join_slices.RULE,
    norm_modulate.RULE,
    norm_modulate_segments.RULE,
    gated_activation.RULE,
    linear_cross_entropy.RULE,
    quantized_linear.RULE,  # before rules that make linears anew, at the place of another module
    merge_qk.RULE,
    fuse_bias.RULE,
    merge_quantized.RULE,
    silu_linears.RULE,
    merge_linears.RULE,
    merge_streams.RULE,  # last: its `finish` sees the nodes of all norms
)
