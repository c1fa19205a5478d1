"""Capture a small module for all sizes, rewrite it, and judge the graph against the module."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fxopt.backends.calls import Call
from fxopt.backends.capture import Plan, capture
from fxopt.passes.rule import Rule
from fxopt.passes.rules import CATALOGUE
from tests import numerics

RULES = {rule.name: rule for rule in CATALOGUE}


class Written(nn.Module):
    """A forward written as a function of (module, *inputs); the module holds its parameters."""

    def __init__(self, forward: Callable[..., Any], **parameters: Tensor | nn.Module) -> None:
        super().__init__()
        self.written = forward
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)

    def forward(self, *inputs: Any) -> Any:
        return self.written(self, *inputs)


@dataclass(frozen=True)
class Rewritten:
    module: nn.Module
    plan: Plan

    def count(self, rule: str) -> int:
        return sum(a.count for a in self.plan.outcome.applied if a.rule == rule)

    def reasons(self, rule: str) -> list[str]:
        declined = [d for d in self.plan.outcome.declined if d.rule == rule]
        return list(dict.fromkeys(why for d in declined for why in d.reasons))

    def code(self) -> str:
        """The rewritten graph, one call after the other."""
        code = re.sub(r";  .*", "", self.plan.gm.code.strip())
        code = re.sub(r"torch\.(ops\.)?|[._]default", "", code)
        lines = [line.strip() for line in code.splitlines()[1:]]
        return "\n".join(textwrap.fill(line, 96, subsequent_indent="    ") for line in lines)

    def __call__(self, *inputs: Any) -> Any:
        call = Call.of(inputs, {})
        assert self.plan.accepts(call), "not what the graph was captured for"
        state = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        slots = [v if kind == "constant" else state[v] for kind, v in self.plan.slots]
        return pytree.tree_unflatten(self.plan.run(*slots, *call.leaves), self.plan.out_spec)

    def assert_as_accurate(
        self,
        *inputs: Any,
        context: Callable[[], AbstractContextManager] = nullcontext,
        recomputed: bool = False,
    ) -> None:
        """Outputs and gradients are at most twice as far from float64 as the module's own.

        Gradients are those of the parameters and of each input that requires one.

        Args:
            context: what both are called in, such as autocast; the truth is not.
            recomputed: whether the graph runs under activation checkpointing.
        """
        call = partial(checkpoint, self, use_reentrant=False) if recomputed else self

        def draw(number: int) -> numerics.Draw:
            # Masks and tables stay.
            drawn = inputs if number == 0 else numerics.redrawn(inputs, number, _requires_grad)
            called = _Called(self.module, self.module, drawn)
            exact = numerics.truth(copy.deepcopy(called).requires_grad_(), called.constants)
            called.context = context
            eager = numerics.run(called, called.constants)
            ours = _Called(self.module, call, drawn, context)
            found = numerics.run(ours, ours.constants)
            # The truth has gradients of frozen weights as well: in float64 only what has one is
            # cast.
            exact = {what: exact[what] if t is not None else None for what, t in eager.items()}
            return found, eager, exact

        numerics.assert_as_accurate(*draw(0), again=draw)


def _requires_grad(t: Tensor) -> bool:
    return t.requires_grad


class _Called(nn.Module):
    """A call whose differentiable inputs are parameters."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        inputs: Sequence[Any],
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        super().__init__()
        self.module, self.call, self.context = module, call, context
        self.num_inputs = len(inputs)
        self.constants: dict[str, Any] = {}
        for i, value in enumerate(inputs):
            if isinstance(value, Tensor) and value.requires_grad:
                self.register_parameter(f"input_{i}", nn.Parameter(value.detach().clone()))
            else:
                self.constants[f"input_{i}"] = value

    def forward(self, **constants: Any) -> Any:
        names = [f"input_{i}" for i in range(self.num_inputs)]
        with self.context():
            return self.call(*(constants[n] if n in constants else getattr(self, n) for n in names))


def rewrite(module: nn.Module, *inputs: Any, rules: Sequence[str] = tuple(RULES)) -> Rewritten:
    """`module` as the first door would run it, under the rules of these names."""
    chosen: list[Rule] = [RULES[name] for name in rules]
    return Rewritten(module, capture(module, module.forward, inputs, {}, chosen))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Differentiable, about 1 in size, with a mean: a LayerNorm of it is no RMSNorm."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    value = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
    return value.to(dtype).requires_grad_()
