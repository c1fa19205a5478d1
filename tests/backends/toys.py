"""A transformer small enough to be captured in a moment, and how the tests of the doors judge it.

Shape legend: B batch, S tokens, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.backends.rewritten import Bound
from tests.families import seeded
from tests.numerics import Draw, assert_as_accurate, redrawn, run, truth

CHANNELS = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)
        self.to_out = nn.Linear(CHANNELS, CHANNELS)
        self.scale = 0.25

    def forward(self, x_BSC: Tensor) -> Tensor:
        heads = [f(x_BSC).unflatten(-1, (2, 16)) for f in (self.to_q, self.to_k, self.to_v)]
        q, k, v = self.norm_q(heads[0]), self.norm_k(heads[1]), heads[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        x_BHSD = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out(x_BHSD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP behind norms; `layer_idx` is never read, `flag` is."""

    def __init__(self, layer_idx: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attn = Attention()
        self.up, self.down = nn.Linear(CHANNELS, 48), nn.Linear(48, CHANNELS)
        self.dropout = nn.Dropout(dropout)
        self.layer_idx, self.flag = layer_idx, False

    def mlp(self, x_BSC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSC), approximate="tanh"))

    def forward(self, x_BSC: Tensor) -> Tensor:
        x_BSC = x_BSC + self.dropout(self.attn(self.norm1(x_BSC)))
        branch = self.mlp(self.norm2(x_BSC))
        return x_BSC - branch if self.flag else x_BSC + branch


class Stack(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module] = Block, num_blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([make(i) for i in range(num_blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def stack(make: Callable[[int], nn.Module] = Block, num_blocks: int = 2) -> nn.Module:
    """The same parameters at every call."""
    return seeded(lambda: Stack(make, num_blocks))()


def tokens(batch: int = 2, num_tokens: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * batch + num_tokens)
    return torch.randn(batch, num_tokens, CHANNELS, generator=generator).to(dtype)


def assert_like_eager(
    model: nn.Module,
    eager: nn.Module,
    inputs: dict[str, Any] | None = None,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Outputs and all gradients, at most twice as far from float64 as those of `eager`."""
    inputs = {"x": tokens()} if inputs is None else inputs

    def draw(number: int) -> Draw:
        drawn = inputs if number == 0 else redrawn(inputs, number)
        exact = truth(eager, drawn)
        with context():
            expected = run(eager, drawn)
        with context():
            found = run(model, drawn)
        exact = {name: exact[name] if t is not None else None for name, t in expected.items()}
        return found, expected, exact

    assert_as_accurate(*draw(0), again=draw)


def reasons(model: nn.Module) -> list[str]:
    """Why blocks were not captured."""
    declined = [d for d in fxopt.report(model).declined if d.rule == "capture"]
    return list(dict.fromkeys(why for d in declined for why in d.reasons))


def captures(model: nn.Module) -> int:
    """Number of graphs that `optimize` has made for `model`."""
    blocks = model._fxopt_doors[0].blocks
    return sum(
        len(shared.plans) for shared in {id(b.captures): b.captures for b in blocks}.values()
    )


@contextlib.contextmanager
def counting_graph_runs() -> Iterator[list[Bound]]:
    """The graphs that run meanwhile, trials aside."""
    calls: list[Bound] = []
    run_graph = Bound.run

    def counted(self: Bound, leaves: Any) -> Any:
        calls.append(self)
        return run_graph(self, leaves)

    Bound.run = counted
    try:
        yield calls
    finally:
        Bound.run = run_graph
