"""`python -m bench.attention`: is PyTorch's own choice of an attention kernel the best one?

On a CUDA device, forward and backward of scaled_dot_product_attention as the presets call it: left
to PyTorch, against each kernel that PyTorch can be told to take. A kernel that refuses a call is
left out. Where PyTorch's choice is slower than the best, fxopt has something to choose.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contest import Contest, run
from fxopt.diagnose.protocol import Plan
from fxopt.diagnose.subjects import Subject
from fxopt.diagnose.suites import forward_backward

PLAN = Plan(
    min_rounds=8, min_seconds=0.5, max_rounds=24, seconds=4.0, min_warmup=0.1, warmup_seconds=10.0
)
NO_WORSE = 0.99
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
# Scores of float32 that MATH would keep, in elements.
LARGEST_SCORES = 1 << 31


@dataclass(frozen=True)
class Attention:
    """One call.

    Args:
        name: of the model that makes it.
        batch, num_heads, num_tokens, head_dim: of the queries [B, H, S, d]; S keys as well.
        num_kv_heads: of keys and values; fewer than `num_heads` are shared.
        is_causal: each query sees the keys up to its own.
        has_mask: a boolean mask [B, 1, 1, S] leaves out the last eighth of the keys.
    """

    name: str
    batch: int
    num_heads: int
    num_tokens: int
    head_dim: int = 128
    num_kv_heads: int = 0
    is_causal: bool = False
    has_mask: bool = False

    def subject(
        self, backend: SDPBackend | None, device: torch.device, dtype: torch.dtype
    ) -> Subject:
        """Forward and backward with one kernel, or with PyTorch's choice."""
        torch.manual_seed(0)
        kv_heads = self.num_kv_heads or self.num_heads
        inputs = {
            name: torch.randn(
                self.batch, heads, self.num_tokens, self.head_dim,
                device=device, dtype=dtype, requires_grad=True,
            )
            for name, heads in (("q", self.num_heads), ("k", kv_heads), ("v", kv_heads))
        }  # fmt: skip
        mask = None
        if self.has_mask:
            mask = torch.ones(self.batch, 1, 1, self.num_tokens, dtype=torch.bool, device=device)
            mask[..., -(self.num_tokens // 8) :] = False
        attend = functools.partial(
            F.scaled_dot_product_attention,
            attn_mask=mask,
            is_causal=self.is_causal,
            enable_gqa=kv_heads != self.num_heads,
        )

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend is None:
                return attend(q, k, v)
            with sdpa_kernel(backend):
                return attend(q, k, v)

        step = functools.partial(forward_backward, forward, nn.Identity(), 0)
        name = "PyTorch's choice" if backend is None else backend.name
        return Subject(f"{self.name}, {name}", step, None, inputs)

    @property
    def num_scores(self) -> int:
        return self.batch * self.num_heads * self.num_tokens**2


CALLS = (
    Attention("flux-dev", 1, 24, 4608),
    Attention("flux-dev, batch 4", 4, 24, 4608),
    Attention("qwen-image, padded", 1, 24, 4608, has_mask=True),
    Attention("wan2.1-14b", 1, 40, 32760),
    Attention("z-image", 1, 30, 4608),
    Attention("llama-3-8b", 1, 32, 8192, num_kv_heads=8, is_causal=True),
)


def measure(contest: Contest, call: Attention, dtype: torch.dtype = torch.bfloat16) -> None:
    """PyTorch's choice against every kernel that takes the call."""
    make = functools.partial(call.subject, device=contest.device.device, dtype=dtype)
    default = functools.partial(make, None)
    for backend in BACKENDS:
        if backend is SDPBackend.MATH and call.num_scores > LARGEST_SCORES:
            continue
        told, name = functools.partial(make, backend), backend.name.lower()
        try:
            told()()
        except RuntimeError:  # no kernel of this kind takes the call
            continue
        target = NO_WORSE if contest.is_right(call.name, name, default, told, False) else None
        name = f"PyTorch's choice vs {name}"
        contest.speedup(call.name, name, told(), default(), at_least=target)


def main(argv: list[str] | None = None) -> int:
    cases = {call.name: functools.partial(measure, call=call) for call in CALLS}
    return run("attention", __doc__, cases, PLAN, argv)


if __name__ == "__main__":
    sys.exit(main())
