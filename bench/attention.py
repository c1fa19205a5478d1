"""`python -m bench.attention`: which backend of attention is the fastest on this device?

On a CUDA device, forward and backward of scaled_dot_product_attention as the presets call it: left
to PyTorch, against each backend of `fxopt/kernels/attention_backends.py`. One that refuses a call
says why and is left out. For the calls of one kind and number of tokens, the backend that is never
wrong or slower and gains most is printed, on standard error, as the row to put into `TABLE` of
`fxopt/kernels/attention.py`, if it gains more than a margin. No file of fxopt is written.

The forward in FP8, which a recipe asks for by name or not at all, is timed beside the best of these
without gradients, and is no row.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from bench.contest import Contest, run
from fxopt.diagnose.protocol import Plan
from fxopt.diagnose.subjects import Subject
from fxopt.diagnose.suites import forward_backward
from fxopt.diagnose.verdict import MARGIN, Label, label
from fxopt.kernels import fp8_attention
from fxopt.kernels.attention import Row, attention, choose, device_name
from fxopt.kernels.attention_backends import BACKENDS
from fxopt.kernels.attention_call import Call, Window
from fxopt.recipe_errors import AttentionRefused

# An attention takes milliseconds: eight rounds of four are over in less than a second.
PLAN = Plan(
    min_rounds=8, min_seconds=0.25, max_rounds=16, seconds=1.5, min_warmup=0.1, warmup_seconds=3.0
)
NO_WORSE = 0.99
# Scores of float32 that "math" would keep, in elements.
LARGEST_SCORES = 1 << 31
# Of the codes' forward, relative L2: 25 dB, and as much again for kernels that round elsewhere.
FP8_ERROR = 0.1


@dataclass(frozen=True)
class Attention:
    """One call.

    Args:
        name: of the model that makes it.
        batch, num_heads, num_tokens, head_dim: of the queries [B, H, S, d]; S keys as well.
        num_kv_heads: of keys and values; fewer than `num_heads` are shared.
        is_causal: each query sees the keys up to its own.
        has_mask: a boolean mask [B, 1, 1, S] leaves out the last eighth of the keys.
        window: each query sees so many keys, its own the last, by a mask [1, 1, S, S] that is known
            to say so; 0 for all.
    """

    name: str
    batch: int
    num_heads: int
    num_tokens: int
    head_dim: int = 128
    num_kv_heads: int = 0
    is_causal: bool = False
    has_mask: bool = False
    window: int = 0

    def subject(
        self, asked: str, device: torch.device, dtype: torch.dtype, needs_grad: bool = True
    ) -> Subject:
        """Forward, and backward if there are gradients, on what is asked for."""
        torch.manual_seed(0)
        inputs = {
            name: torch.randn(
                self.batch, heads, self.num_tokens, self.head_dim,
                device=device, dtype=dtype, requires_grad=needs_grad,
            )
            for name, heads in zip("qkv", (*self.heads, self.heads[1]), strict=True)
        }  # fmt: skip
        sides = None if self.seen is None else list(self.seen)
        given = self.mask(device), 0.0, self.is_causal, None, bool(self.num_kv_heads)
        options = (*given, sides, asked)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = attention(q, k, v, *options)
            return out

        both = functools.partial(forward_backward, forward, nn.Identity(), 0)
        step = both if needs_grad else forward
        return Subject(f"{self.name}, {asked}", step, None, inputs)

    def described(self, device: torch.device, dtype: torch.dtype) -> Call:
        """As the table looks at it."""
        with FakeTensorMode():
            mask = self.mask(torch.device("cpu"))
        return Call(
            device,
            dtype,
            (self.batch,),
            self.heads,
            (self.num_tokens, self.num_tokens),
            (self.head_dim, self.head_dim),
            None if mask is None else (tuple(mask.shape), torch.bool, False),
            is_causal=self.is_causal,
            is_grouped=bool(self.num_kv_heads),
            needs_grad=True,
            is_padding=self.has_mask,
            window=self.seen,
        )

    def mask(self, device: torch.device) -> Tensor | None:
        if self.has_mask:
            mask = torch.ones(self.batch, 1, 1, self.num_tokens, dtype=torch.bool, device=device)
            mask[..., -(self.num_tokens // 8) :] = False
            return mask
        if not self.window:
            return None
        square = torch.ones(1, 1, *[self.num_tokens] * 2, dtype=torch.bool, device=device)
        return square.tril_().triu_(1 - self.window)

    @property
    def seen(self) -> Window | None:
        """What the mask is known to say."""
        return Window(self.window - 1, 0) if self.window else None

    @property
    def mask_kind(self) -> str:
        """As in a row of the table."""
        return "padding" if self.has_mask else "window" if self.window else "none"

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        return self.num_heads, self.num_kv_heads or self.num_heads

    @property
    def num_scores(self) -> int:
        return self.batch * self.num_heads * self.num_tokens**2

    @property
    def kind(self) -> str:
        """What the calls that one row is for have in common."""
        mask = {"padding": "padding mask", "none": "no mask"}.get(self.mask_kind, "window")
        notes = ", causal" * self.is_causal + ", grouped" * bool(self.num_kv_heads)
        return f"head {self.head_dim}, {mask}{notes}, {self.num_tokens} tokens"


CALLS = (
    Attention("flux-dev", 1, 24, 4608),
    Attention("flux-dev, batch 4", 4, 24, 4608),
    Attention("z-image", 1, 30, 4608),
    Attention("qwen-image, padded", 1, 24, 4608, has_mask=True),
    Attention("qwen-image, padded, batch 4", 4, 24, 4608, has_mask=True),
    Attention("flux-dev, 512 pixels", 4, 24, 1536),
    Attention("mistral-7b", 1, 32, 8192, num_kv_heads=8, window=4096),
    Attention("llama-3-8b", 1, 32, 8192, num_kv_heads=8, is_causal=True),
    Attention("wan2.1-14b", 1, 40, 32760),
)


def measure(
    contest: Contest, call: Attention, dtype: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    """Over PyTorch's own choice, the speedup of each backend that takes the call and is neither
    wrong nor slower; "pytorch" is 1.
    """
    make = functools.partial(call.subject, device=contest.device.device, dtype=dtype)
    default = functools.partial(make, "pytorch")
    found = {"pytorch": 1.0}
    for name in BACKENDS:
        if name == "math" and call.num_scores > LARGEST_SCORES:
            continue
        told = functools.partial(make, name)
        try:
            told()()
        except AttentionRefused as refused:
            print(f"{call.name}: {refused}", file=sys.stderr)
            continue
        if contest.is_right(call.name, name, default, told, False):
            compared = f"{name} vs PyTorch's choice"
            regime = contest.speedup(call.name, compared, default(), told())
            if label(regime.low, regime.high) is not Label.SLOW:
                found[name] = regime.speedup
    chosen = choose("auto", functools.partial(call.described, contest.device.device, dtype))
    share = found.get(chosen.backend, 0.0) / max(found.values())
    contest.add(call.name, "fxopt's choice vs the best", share, at_least=NO_WORSE)
    best = max(found, key=lambda name: found[name])
    against_fp8(contest, call, best, dtype)
    return found


def against_fp8(contest: Contest, call: Attention, best: str, dtype: torch.dtype) -> None:
    """The forward in FP8, on the units alone, over that of the best backend."""
    make = functools.partial(
        call.subject, device=contest.device.device, dtype=dtype, needs_grad=False
    )
    baseline, candidate = (
        functools.partial(make, best),
        functools.partial(make, fp8_attention.NATIVE),
    )
    try:
        candidate()()
    except AttentionRefused as refused:
        print(f"{call.name}: {refused}", file=sys.stderr)
        return
    if contest.is_right(call.name, "fp8 forward", baseline, candidate, False, FP8_ERROR):
        compared = f"fp8 forward vs {best}"
        contest.speedup(call.name, compared, baseline(), candidate())


def best_row(calls: Sequence[Attention], found: Sequence[Mapping[str, float]]) -> Row | None:
    """The row for calls of one kind, from what `measure` found of each; None if nothing gains.

    It holds for three quarters to one and a half times the number of tokens that was measured.
    """
    # Inductor would put a fused attention in the place of "math".
    everywhere = set.intersection(*map(set, found)) - {"math"}
    gains = {name: min(each[name] for each in found) for name in everywhere}
    best = max(gains, key=lambda name: gains[name])
    if gains[best] <= 1 + MARGIN:
        return None
    call = calls[0]
    return Row(
        best,
        round(gains[best], 3),
        call.head_dim,
        call.mask_kind,
        call.is_causal,
        bool(call.num_kv_heads),
        min_tokens=3 * call.num_tokens // 4,
        max_tokens=3 * call.num_tokens // 2,
    )


def search(contest: Contest, calls: Sequence[Attention]) -> None:
    """Print the row for these calls of one kind."""
    row = best_row(calls, [measure(contest, call) for call in calls]) or "as it is"
    name = device_name(contest.device.device)
    print(f"{name!r}, {calls[0].kind}: {row}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    kinds: dict[str, list[Attention]] = {}
    for call in CALLS:
        kinds.setdefault(call.kind, []).append(call)
    cases = {
        f"{kind}: {'; '.join(call.name for call in calls)}": functools.partial(search, calls=calls)
        for kind, calls in kinds.items()
    }
    return run("attention", __doc__, cases, PLAN, argv)


if __name__ == "__main__":
    sys.exit(main())
