"""What each substitution saves, against sums done by hand.

Shapes: B batch, S tokens, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt import hardware, traffic
from fxopt.backends.exported import RewrittenCallable, rewrite_block
from fxopt.kernels.registration import provider
from fxopt.report import Applied
from tests.passes.rewriting import Written, normal

B, S, D = 2, 8, 64
ROWS, ELEMENTS = B * S, B * S * D
FP32 = 4


def metered(module: Written, *inputs: Tensor) -> tuple[RewrittenCallable, list[Applied]]:
    found = rewrite_block(module, inputs, {}, planned_for=hardware.lookup("h100"))
    return found, list(found.report.applied)


def difference(module: Written, found: RewrittenCallable, *inputs: Tensor) -> int:
    """Glue of the module's own forward and backward, less that of the rewritten ones."""
    own, ours = (sum(p.glue_bytes for p in traffic.count(module, inputs, {}, f))
                 for f in (None, found))  # fmt: skip
    return own - ours


def x_and_gate() -> tuple[Tensor, Tensor]:
    return normal(B, S, D), normal(B, 1, D)


def gated(m: Written, x: Tensor, gate: Tensor) -> Tensor:
    return x + gate * F.linear(x, m.w, m.b)


def test_gated_residual_and_bias():
    module, inputs = Written(gated, w=normal(D, D), b=normal(D)), x_and_gate()
    found, (residual, bias) = metered(module, *inputs)
    assert (residual.rule, bias.rule) == ("norm_modulate", "fuse_bias")
    # Forward: gate * y is neither written nor read. Backward: grad * y neither, and grad is read
    # once, not twice.
    assert residual.bytes_saved == FP32 * (2 + 3) * ELEMENTS
    assert residual.flops == 0
    # The gradient of the branch is not read again to be summed; the op reads the bias in both
    # passes, as glue.
    assert bias.bytes_saved == FP32 * (ELEMENTS - 2 * D)
    assert bias.flops == 2 * ROWS * D * D
    assert residual.bytes_saved + bias.bytes_saved == difference(module, found, *inputs)


def test_what_is_taken_in_counts_where_it_went():
    """The norm fires first and becomes part of a modulated one; nothing of it is lost."""

    def forward(m: Written, x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) * m.w

    module, inputs = Written(forward, w=normal(D)), x_and_gate()
    found, applied = metered(module, *inputs)
    assert [a.rule for a in applied] == ["norm_modulate"]
    assert applied[0].bytes_saved == difference(module, found, *inputs) > 0


def test_sizes_are_those_of_the_call_at_a_batch_of_one():
    """Which is captured as two."""
    module = Written(gated, w=normal(D, D), b=normal(D))
    x, gate = x_and_gate()
    whole, half = (metered(module, x[:n], gate[:n])[1][0] for n in (B, 1))
    assert whole.bytes_saved == 2 * half.bytes_saved


def test_frozen_parameters_save_less():
    module, inputs = Written(gated, w=normal(D, D), b=normal(D)), x_and_gate()
    module.b.requires_grad_(False)
    found, (_, bias) = metered(module, *inputs)
    assert bias.bytes_saved == -FP32 * 2 * D  # no sum is left to save; the op reads the bias
    assert difference(module, found, *inputs) == sum(a.bytes_saved for a in found.report.applied)


def test_products_in_a_body_are_not_known():
    def forward(m: Written, x: Tensor, gate: Tensor) -> Tensor:
        with torch.no_grad():
            target = gated(m, x, gate)
        return (x - target).square()

    module = Written(forward, w=normal(D, D), b=normal(D))
    _, applied = metered(module, *x_and_gate())
    assert applied and all(a.flops is None and a.bytes_saved is not None for a in applied)


def test_what_would_run_on_the_planned_device():
    module = Written(gated, w=normal(D, D), b=normal(D))
    _, applied = metered(module, *x_and_gate())
    found = rewrite_block(module, x_and_gate(), {})
    assert {a.provider for a in applied} == {provider("norm_modulate", torch.device("cuda"))}
    assert {a.provider for a in found.report.applied} == {"native"}


def test_unless_asked_nothing_is_counted():
    module = Written(gated, w=normal(D, D), b=normal(D))
    applied = rewrite_block(module, x_and_gate(), {}).report.applied
    assert {(a.bytes_saved, a.flops) for a in applied} == {(None, None)}
