"""The last linear and its loss to one op."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.passes.rewriting import Rewritten, Written, normal, rewrite

K, V = 8, 40


def labels(*sizes: int) -> Tensor:
    found = torch.randint(V, sizes, generator=torch.Generator().manual_seed(0))
    found.view(-1)[0] = -100
    return found


def rewritten(forward, x: Tensor, target: Tensor, **parameters: Tensor) -> Rewritten:
    parameters = {"weight": normal(V, K, dtype=x.dtype)} | parameters
    return rewrite(Written(forward, **parameters), x, target, rules=["linear_cross_entropy"])


def transformers(m: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """As ForCausalLMLoss: labels moved by one, logits upcast."""
    logits = F.linear(x, m.weight).float()
    moved = F.pad(target, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), moved.view(-1), ignore_index=-100)


def test_loss_of_a_language_model_becomes_one_op():
    found = rewritten(transformers, normal(2, 5, K), labels(2, 5))
    assert_expected_inline(
        found.code(),
        """\
pad = aten.pad(inputs_1, [0, 1], 'constant', -100.0)
slice_1 = aten.slice.Tensor(pad, 1, 1, 9223372036854775807)
contiguous = aten.contiguous(slice_1)
view_1 = aten.reshape(contiguous, [-1])
reshape = aten.reshape(inputs_0, [-1, 8])
linear_cross_entropy = fxopt.linear_cross_entropy(reshape, p_weight, None, view_1, -100, 'mean')
return (linear_cross_entropy,)""",
    )


def sliced(m: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, m.weight)[..., :-1, :].contiguous().float()
    return F.cross_entropy(logits.view(-1, V), target[..., 1:].reshape(-1), reduction="sum")


def channels_first(m: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, m.weight).transpose(1, 2), target)


def permuted(m: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, m.weight).permute(0, 2, 1), target)


def in_two_ops(m: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    scores = F.log_softmax(F.linear(x, m.weight), dim=-1, dtype=torch.float32)
    return F.nll_loss(scores.flatten(0, 1), target.flatten())


def of_a_module(m: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits = x.flatten(0, 1) @ m.weight.t()
    return nn.CrossEntropyLoss()(logits, target.flatten())


SPELLINGS = [transformers, sliced, channels_first, permuted, in_two_ops, of_a_module]


@pytest.mark.parametrize("forward", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(forward, dtype):
    found = rewritten(forward, normal(2, 5, K, dtype=dtype), labels(2, 5))
    assert found.count("linear_cross_entropy") == 1, found.reasons("linear_cross_entropy")
    found.assert_as_accurate(normal(3, 7, K, dtype=dtype).requires_grad_(), labels(3, 7))


def test_other_sizes_and_a_bias():
    def forward(m, x, target):
        return F.cross_entropy(F.linear(x, m.weight, m.bias).flatten(0, 1), target.flatten())

    found = rewritten(forward, normal(2, 5, K), labels(2, 5), bias=normal(V, seed=1))
    assert found.count("linear_cross_entropy") == 1
    found.assert_as_accurate(normal(4, 9, K).requires_grad_(), labels(4, 9))


def test_checkpoint_keys_stay():
    found = rewritten(transformers, normal(2, 5, K), labels(2, 5))
    assert [*found.module.state_dict()] == ["weight"]


def loss_of(logits: Tensor, target: Tensor, **options) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), **options)


DECLINED = {
    "the labels are smoothed by 0.1": lambda m, x, t: loss_of(
        F.linear(x, m.weight), t, label_smoothing=0.1
    ),
    "the classes are weighted": lambda m, x, t: loss_of(
        F.linear(x, m.weight), t, weight=m.weight[:, 0].detach()
    ),
    "every token's own loss is asked for": lambda m, x, t: loss_of(
        F.linear(x, m.weight), t, reduction="none"
    ),
    "the targets are probabilities, not classes": lambda m, x, t: F.cross_entropy(
        F.linear(x, m.weight).flatten(0, 1), F.one_hot(t.clamp(0).flatten(), V).float()
    ),
    "tanh (aten.tanh.default) stands between": lambda m, x, t: loss_of(
        F.linear(x, m.weight).tanh(), t
    ),
    "is also used by": lambda m, x, t: (
        loss_of(logits := F.linear(x, m.weight), t),
        logits,
    ),
    "8 logits are no more than the 40 features": lambda m, x, t: loss_of(
        F.linear(F.linear(x, m.weight), m.weight.t()), t % K
    ),
}


@pytest.mark.parametrize("why", DECLINED)
def test_declines_with_its_reason(why):
    found = rewritten(DECLINED[why], normal(2, 5, K), labels(2, 5).clamp(0))
    assert found.count("linear_cross_entropy") == 0
    assert any(why in reason for reason in found.reasons("linear_cross_entropy"))


def test_float16_declines():
    """A loss that is scaled up, as float16 needs it, scales what is rounded by then."""
    forward = Written(transformers, weight=normal(V, K, dtype=torch.float16))
    x = normal(2, 5, K, dtype=torch.float16)
    found = rewrite(forward, x, labels(2, 5), rules=["linear_cross_entropy"])
    (why,) = found.reasons("linear_cross_entropy")
    assert "float16" in why


NEAR_MISSES = {
    "likelihood of logits that no softmax has normalized": lambda m, x, t: F.nll_loss(
        F.linear(x, m.weight).flatten(0, 1), t.flatten()
    ),
    "softmax over the tokens": lambda m, x, t: F.nll_loss(
        F.log_softmax(F.linear(x, m.weight).flatten(0, 1), 0), t.flatten()
    ),
    "tokens as classes": lambda m, x, t: F.cross_entropy(
        F.linear(x, m.weight), t[:, :1].expand(-1, V) % 5
    ),
    "logits of a token torn apart": lambda m, x, t: loss_of(
        F.linear(x, m.weight).reshape(2, 10, V // 2), t.repeat(1, 2) % (V // 2)
    ),
    "some of the classes": lambda m, x, t: loss_of(
        F.linear(x, m.weight)[..., : V // 2], t % (V // 2)
    ),
    "sigmoid": lambda m, x, t: F.binary_cross_entropy_with_logits(
        F.linear(x, m.weight), F.linear(x, m.weight).detach().sigmoid()
    ),
    "weight that is not transposed": lambda m, x, t: loss_of(x @ m.other, t),
}


@pytest.mark.parametrize("what", NEAR_MISSES)
def test_near_misses_stay(what):
    forward, target = NEAR_MISSES[what], labels(2, 5).clamp(0)
    found = rewritten(forward, normal(2, 5, K), target, other=normal(K, V))
    assert found.count("linear_cross_entropy") == 0
