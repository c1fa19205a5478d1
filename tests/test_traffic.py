"""The counter, against sums done by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt import traffic

B, S, D = 2, 8, 64
ROWS, ELEMENTS = B * S, B * S * D
aten = torch.ops.aten


def activation(*shape):
    return torch.empty(shape or (B, S, D), dtype=torch.bfloat16, device="meta", requires_grad=True)


class Call(nn.Module):
    """Calls `function(weight, *args)`; the weight is [D, D], or [D]."""

    def __init__(self, function, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        self.function = function

    def forward(self, *args):
        return self.function(self.weight, *args)


def count(function, *args, shape=(D,)):
    return traffic.count(Call(function, *shape), args, {})


def test_pointwise_reads_and_writes_once():
    forward, backward = count(lambda w, x: x * 2, activation())
    assert forward.glue_bytes == 2 * ELEMENTS * 2
    assert forward.num_launches == backward.num_launches == 1


def test_views_and_allocations_are_free():
    forward, _ = count(
        lambda w, x: x.view(B * S, D).t().unsqueeze(0).chunk(2, -1)[0] * 1, activation()
    )
    assert forward.num_launches == 1
    assert forward.glue_bytes == 2 * ELEMENTS // 2 * 2


@pytest.mark.parametrize(
    "fill",
    [
        torch.zeros_like,
        lambda x: x.new_zeros(x.shape),
        lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device),
        lambda x: torch.full_like(x, 2.0),
        lambda x: torch.empty_like(x).zero_(),
        lambda x: torch.empty_like(x).fill_(1.0),
    ],
)
def test_a_fill_is_a_launch_that_writes(fill):
    plain, _ = count(lambda w, x: x * 2, activation())
    forward, _ = count(lambda w, x: (fill(x), x * 2)[1], activation())
    assert forward.num_launches == plain.num_launches + 1
    assert forward.glue_bytes == plain.glue_bytes + ELEMENTS * 2


def test_expanded_operand_costs_what_it_stores():
    forward, _ = count(lambda w, x: x + w.expand(B, S, D), activation())
    assert forward.glue_bytes == (2 * ELEMENTS + D) * 2


def test_linear_is_a_product_each_way():
    forward, backward = count(lambda w, x: F.linear(x, w), activation(), shape=(D, D))
    flops = 2 * ROWS * D * D
    assert [p.flops for p in forward.gemms] == [flops]
    assert forward.gemms[0].shape == (ROWS, D, D)
    assert forward.gemms[0].num_bytes == (2 * ROWS * D + D * D) * 2
    assert [p.flops for p in backward.gemms] == [flops, flops]
    assert forward.glue_bytes == 0


def test_saved_bytes_leave_out_parameters_and_count_storages_once():
    forward, _ = count(lambda w, x: F.linear(x, w) + F.linear(x.view(-1, D), w).view(B, S, D),
                       activation(), shape=(D, D))  # fmt: skip
    assert forward.saved_bytes == ELEMENTS * 2


@pytest.mark.parametrize(
    "rms_norm",
    [
        lambda w, x: F.rms_norm(x, (D,), w, 1e-6),
        lambda w, x: aten.rms_norm.default(x, [D], w, 1e-6),
        lambda w, x: torch.rms_norm(x, normalized_shape=[D], weight=w, eps=1e-6),
    ],
    ids=["functional", "aten", "keywords"],
)
def test_rms_norm_is_one_kernel_each_way(rms_norm):
    forward, backward = count(rms_norm, activation())
    assert forward.num_launches == backward.num_launches == 1
    assert forward.glue_bytes == 2 * ELEMENTS * 2 + D * 2 + ROWS * 4
    assert forward.saved_bytes == ELEMENTS * 2 + ROWS * 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "attention", [F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default]
)
def test_attention_is_one_kernel_each_way(attention, causal):
    q, k = activation(1, 4, 32, 16), activation(1, 2, 128, 16)
    forward, backward = count(
        lambda w, q, k: attention(q, k, k, None, 0.0, causal, enable_gqa=True), q, k
    )
    flops = 2 * 4 * 32 * 128 * (16 + 16) // (2 if causal else 1)
    assert [p.flops for p in forward.attentions] == [flops]
    assert [p.flops for p in backward.attentions] == [flops * 5 // 2]
    assert forward.glue_bytes == 0
    # q, k (also v), out in bf16 and one fp32 statistic per query
    assert forward.saved_bytes == (2 * q.numel() + k.numel()) * 2 + 4 * 32 * 4


def test_masked_attention_reads_its_mask():
    q = activation(1, 4, 32, 16)
    mask = torch.empty(1, 1, 32, 32, dtype=torch.bool, device="meta")

    def attend(w, q, mask=None):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    plain, _ = count(attend, q)
    masked, _ = count(attend, q, mask)
    assert masked.attentions[0].num_bytes - plain.attentions[0].num_bytes == 32 * 32


def test_block_is_left_as_it_was():
    block = Call(lambda w, x: F.linear(x, w), D, D)
    weight = block.weight
    traffic.count(block, (activation(),), {})
    assert block.weight is weight
    assert weight.device.type == "meta"
    assert weight.grad is None


def test_block_is_left_as_it_was_after_an_error():
    block = Call(lambda w, x: F.linear(x, w), D, D)
    weight = block.weight
    with pytest.raises(RuntimeError):
        traffic.count(block, (activation(B, D + 1),), {})
    assert block.weight is weight
