"""GELU, SiLU and their gated forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rewriting import normal
from tests.passes.spellings.parts import (
    DTYPES,
    D,
    Pick,
    Spelling,
    copied,
    downcast,
    finished,
    times,
    upcast,
)


def gated_activation(pick: Pick) -> Spelling:
    multiply, dtype = times(pick), pick("dtype", *DTYPES)
    root = pick("constant", math.sqrt(2 / math.pi), 0.7978845608028654, 0.79788456)
    cube = pick("cube", lambda x: x**3, lambda x: x.pow(3.0), lambda x: x * x * x)
    act = pick(
        "activation",
        F.silu,
        lambda x: torch.nn.functional.silu(x, inplace=False),
        lambda x: multiply(x, torch.sigmoid(x)),
        lambda x: multiply(x, x.sigmoid()),
        F.gelu,
        nn.GELU(),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * 0.5 * (1.0 + torch.erf(x * 2**-0.5)),
        lambda x: x * torch.special.ndtr(x),
        lambda x: 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * cube(x)))),
        lambda x: 0.5 * multiply(x, 1 + torch.tanh(root * (x + 0.044715 * cube(x)))),
        lambda x: 0.5 * x * (1 + torch.tanh(x * root * (1 + 0.044715 * x * x))),
    )
    raise_, lower, copy = upcast(pick), downcast(pick), copied(pick)
    width = 2 * D
    split = pick(
        "halves",
        lambda t: t.chunk(2, dim=-1),
        lambda t: t.split(D, dim=-1),
        lambda t: t.split([D, D], dim=2),
        lambda t: (t[..., :D], t[..., D:]),
        lambda t: t.unflatten(-1, (2, D)).unbind(-2),
        lambda t: torch.tensor_split(t, 2, dim=-1),
        lambda t: (t.narrow(-1, 0, D), t.narrow(-1, D, D)),
    )
    swapped = pick("order", False, True)
    form = pick("form", "two linears", "halves", "two inputs", "alone")

    def forward(m: nn.Module, *inputs: Tensor) -> Tensor:
        if form == "two inputs":
            g, u = inputs
        elif form == "two linears":
            g, u = F.linear(inputs[0], m.wide[:D]), F.linear(inputs[0], m.wide[D:])
        elif form == "halves":
            g, u = split(F.linear(inputs[0], m.wide))
        else:
            return F.linear(lower(act(raise_(F.linear(inputs[0], m.wide))), inputs[0]), m.down)
        g, u = (u, g) if swapped else (g, u)
        return multiply(lower(act(raise_(copy(g))), u), u)

    inputs = [normal(2, 5, D, dtype=dtype, seed=i) for i in range(2 if form == "two inputs" else 1)]
    parameters = {"wide": normal(width, D, dtype=dtype), "down": normal(D, width, dtype=dtype)}
    return finished(pick, forward, inputs, **parameters)
