"""What compilers get in the place of an fxopt op."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.kernels.registration import REFERENCES, register
from fxopt.passes.inline import inline_native
from tests.passes.rewriting import RULES, Written, normal, rewrite

D = 16


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def test_an_op_is_written_out_by_what_its_registration_says():
    op = register(
        "soft_cap_of_a_test(Tensor x, float cap) -> Tensor",
        native=soft_cap,
        fake=lambda x, cap: torch.empty_like(x),
        reference=soft_cap,
    )
    try:
        x = torch.linspace(-90, 90, 12)
        gm = make_fx(lambda x: op(x, 30.0) + 1, tracing_mode="fake")(x)
        assert gm.graph.find_nodes(op="call_function", target=op)
        inline_native(gm)
        assert not [n for n in gm.graph.nodes if "fxopt" in str(n.target)]
        torch.testing.assert_close(gm(x), soft_cap(x, 30.0) + 1, rtol=0, atol=0)
    finally:
        del REFERENCES[op]


def test_nothing_opaque_is_left_for_a_compiler():
    def forward(m: Written, x: Tensor, gate: Tensor) -> Tensor:
        y = F.layer_norm(x + gate * F.linear(x, m.w), (D,)) * (1 + gate)
        return F.rms_norm(F.gelu(y), (D,), eps=1e-6)

    compiled = [name for name, rule in RULES.items() if rule.compiled]
    module, inputs = Written(forward, w=normal(D, D)), (normal(2, 5, D), normal(2, 1, D))
    found = rewrite(module, *inputs, rules=compiled)
    assert found.code().count("fxopt.norm_modulate(") == 2
    inline_native(found.plan.gm)
    assert "fxopt" not in found.code()
    assert found.code().count("aten.layer_norm(") == 1  # as a compiler knows it
    # 1e-5: fp32, the same steps in another order.
    expected = module(*inputs)
    torch.testing.assert_close(found.plan.gm(module.w, *inputs)[0], expected, rtol=1e-5, atol=1e-5)
