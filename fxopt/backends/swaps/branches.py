"""The branches of a block, attention and MLP: how they end, and that the last bias can wait.

The op that adds a branch to the residual can add the bias of its last linear, as in the rule
`fuse_bias`. Streams that are added in one launch are in `merged`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.swaps import quantized
from fxopt.backends.swaps.fused import fire, fire_low, project
from fxopt.backends.swaps.quantized import Unbiased, is_plain
from fxopt.kernels.registration import ops
from fxopt.passes.rules.fuse_bias import has_room
from fxopt.passes.rules.merge_streams import common_of_activations, common_of_linears

_originals: ContextVar[Mapping[nn.Module, nn.Module] | None] = ContextVar("originals", default=None)


@contextmanager
def standing_for(module: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Decide for `twin`, a narrow replica, as for `module`: by the module's own widths."""
    token = _originals.set(dict(zip(twin.modules(), module.modules(), strict=True)))
    try:
        yield
    finally:
        _originals.reset(token)


class Branch(NamedTuple):
    """The result x of a branch; `bias` is what the op that reads it has still to add, or None."""

    x: Tensor
    bias: Tensor | None = None


def waiting_bias(x: Tensor, linear: Any, *, all_sums: bool) -> Tensor | None:
    """The bias of `linear` of `x`, if the op that adds it to the residual can add the bias.

    all_sums: whether that op has a gate, and norms with a weight or modulates.
    """
    if not is_plain(linear) or quantized.quantizes(x, linear) is not None:
        return None
    width = (_originals.get() or {}).get(linear, linear).out_features
    bias: Tensor | None = linear.bias
    return bias if has_room(int(width), all_sums=all_sums) else None


class Out(NamedTuple):
    """What attention's result goes through, one module after the other: diffusers' `to_out`."""

    modules: Iterable[nn.Module]

    def __call__(self, x: Tensor) -> Tensor:
        for i, module in enumerate(self.modules):
            (x,) = project(x, module, keeps_x=i == 0)  # attention keeps its result
        return x

    @property
    def linear(self) -> Any:
        """The first of the modules."""
        return next(iter(self.modules))

    def rest(self, x: Tensor) -> Tensor:
        """What the others make of what the first one made."""
        _, *others = self.modules
        for module in others:
            (x,) = project(x, module)
        return x

    def common(self, x: Tensor) -> tuple[Any, ...] | None:
        """What streams share whose linears can be cast in one launch, their recipe first; None
        where this one is not quantized."""
        recipe = quantized.quantizes(x, self.linear)
        return None if recipe is None else (recipe, *common_of_linears(keeps_x=True))

    def branch(self, x: Tensor, *, all_sums: bool) -> Branch:
        """The same, for an op that adds it to the residual; `all_sums` as in `waiting_bias`."""
        linear: Any
        linear, *others = self.modules
        bias = waiting_bias(x, linear, all_sums=all_sums)
        if bias is None or not all(map(_is_idle, others)):
            return Branch(self(x))
        return Branch(F.linear(x, linear.weight), bias)


def _is_idle(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and module.p == 0.0


class Mlp(NamedTuple):
    """inputs -> act(gate) * up -> dropout -> out, as `fxopt::gated_activation` names them.

    inputs: one linear, or those of gate and up. `out` may take features beside the activation.
    gate_bias: what the activation has still to add to what the one of `inputs` made.
    """

    inputs: tuple[nn.Module, ...]
    activation: str
    packing: str
    out: Any  # a linear
    dropout: nn.Module | None = None
    gate_bias: Tensor | None = None

    def holding(self, x: Tensor) -> Mlp:
        """The same on `x`, the bias of a single input linear left to the activation if it can be.

        As the rule `fuse_bias` does it: where a plain linear follows.
        """
        linear: Any = self.inputs[0]
        plain = len(self.inputs) == 1 and is_plain(linear) and self._is_direct()
        if not plain or linear.bias is None:
            return self
        if any(quantized.quantizes(x, m) is not None for m in (linear, self.out)):
            return self
        held: Any = Unbiased(linear.weight)
        return self._replace(inputs=(held,), gate_bias=linear.bias)

    def __call__(self, hidden: Sequence[Tensor], beside: Tensor | None = None) -> Tensor:
        """`out([beside | act])` for the outputs of `inputs`."""
        return self._run(hidden, beside, None)

    def branch(self, hidden: Sequence[Tensor], beside: Tensor | None = None) -> Branch:
        """The same for a gated residual that does not norm."""
        bias = self.waiting_bias(hidden)
        return Branch(self._run(hidden, beside, bias), bias)

    def waiting_bias(self, hidden: Sequence[Tensor]) -> Tensor | None:
        """The bias of `out`, if such a gated residual can add it."""
        return waiting_bias(hidden[0], self.out, all_sums=False)

    def common(self, hidden: Sequence[Tensor]) -> tuple[Any, ...] | None:
        """What streams share whose activations can be one launch, their recipe or None first; None
        where this is none."""
        gate = hidden[0]
        recipe = quantized.quantizes(gate, self.out)
        if not self._is_direct() or (recipe is not None and self.gate_bias is not None):
            return None
        kind = self.activation, self.packing, gate.dtype, gate.shape[-1]
        return recipe, *common_of_activations(*kind)

    def _is_direct(self) -> bool:
        """Whether nothing stands between the activation and a plain linear."""
        return is_plain(self.out) and getattr(self.dropout, "p", 0.0) == 0.0

    def _run(
        self, hidden: Sequence[Tensor], beside: Tensor | None, waiting: Tensor | None
    ) -> Tensor:
        gate, up = (*hidden, None)[:2]
        assert gate is not None
        fire("gated_activation", "gated_activation")
        held = self.gate_bias is not None  # no linear is quantized then
        recipe = None if held else quantized.quantizes(gate, self.out)
        bias = self.out.bias if waiting is None else None
        if held:
            fire("fuse_bias", "gated_activation")
        if self._is_direct():
            operands = (gate, up, self.activation, self.packing, beside)
            parameters = (self.out.weight, bias)
            if recipe is not None:
                fire_low("gated_activation", 1, recipe)
                return ops.gated_activation_quantized_linear(*operands, *parameters, recipe.key)
            fire("merge_linears", "gated_activation")
            return ops.gated_activation_linear(*operands, self.gate_bias, *parameters)
        y = ops.gated_activation(gate, up, self.activation, self.packing, self.gate_bias)
        if self.dropout is not None:
            y = self.dropout(y)
        y = y if beside is None else torch.cat([beside, y], -1)
        return project(y, self.out)[0] if waiting is None else F.linear(y, self.out.weight)
