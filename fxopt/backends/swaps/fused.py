"""The words in which a fused forward is written: norms and linears, as fxopt ops.

Each reads parameters off the modules at the time of the call. A linear that is no plain `nn.Linear`
any more (LoRA, quantized, sharded) is called as a module, on the tensor that the op then makes.

Shapes: B batch, S tokens, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.swaps import quantized
from fxopt.backends.swaps.quantized import is_plain as is_plain
from fxopt.kernels import scaled_matmul
from fxopt.kernels.quantized_linears import op_of
from fxopt.kernels.registration import ops
from fxopt.passes.rules.merge_streams import common_of_norms
from fxopt.recipes import Recipe

_fired: ContextVar[list[tuple[str, str]] | None] = ContextVar("fired", default=None)


@contextmanager
def counting() -> Iterator[list[tuple[str, str]]]:
    """Collect (rule, op) of every substitution that runs."""
    found: list[tuple[str, str]] = []
    token = _fired.set(found)
    try:
        yield found
    finally:
        _fired.reset(token)


def fire(rule: str, op: str) -> None:
    """Note that a substitution by `rule` runs; the proof of a replacement counts them."""
    found = _fired.get()
    if found is not None:
        found.append((rule, op))


class NormConstants(NamedTuple):
    """n = norm(h) * (weight_offset + weight) + bias, by kind: "layer", "rms" or "none"."""

    kind: str
    eps: float
    weight_offset: float
    weight: Tensor | None
    bias: Tensor | None


def read_norm(norm: nn.Module | None, x: Tensor, weight_offset: float = 0.0) -> NormConstants:
    """Read the constants and parameters off any library's LayerNorm or RMSNorm; None is no norm."""
    if norm is None or type(norm) is nn.Identity:
        return NormConstants("none", 0.0, 0.0, None, None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    return NormConstants(
        kind, eps, weight_offset, getattr(norm, "weight", None), getattr(norm, "bias", None)
    )


class Segments(NamedTuple):
    """That gate, scale and shift are tables of N rows, [B, N, D], and a token's row is `row`.

    row: [B, S] integers, or bool for two rows. shift_per_token: the shift is [B, S, D] and no
    table.
    """

    row: Tensor
    shift_per_token: bool = False


class Normed(NamedTuple):
    """norm(residual + gate * x) * (scale_offset + scale) + shift, computed where it is needed.

    x, residual: [B, S, D]. gate, scale, shift: broadcastable to them, or as `segments` says, or
    None. x_bias: [D], to be added to x first, or None.
    """

    norm: nn.Module
    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None
    scale_offset: float = 1.0
    h_dtype: torch.dtype | None = None
    x_bias: Tensor | None = None
    segments: Segments | None = None

    def value(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The normed tensor in `dtype` (default: x's), and h = residual + gate * x."""
        n, h_dtype = read_norm(self.norm, self.x), self._h_dtype()
        if n.kind == "none":
            more = self.x_bias, self.segments
            h = gated_residual(self.residual, self.gate, self.x, h_dtype, *more)
            return h, h
        self.fire(n)
        settings = (*n[:3], self.scale_offset, h_dtype, dtype or self.x.dtype)
        y, h, _, _ = getattr(ops, op_of_norm(self.segments))(*self.operands(n), *settings)
        return y, h if self.residual is not None else self.x

    def into(self, *linears: nn.Module, sizes: Sequence[int] = ()) -> tuple[list[Tensor], Tensor]:
        """What `linears` make of the normed tensor, and h; `sizes` splits that of a single one."""
        n = read_norm(self.norm, self.x)
        recipes = [quantized.quantizes(self.x, m) for m in linears]
        first = recipes[0]
        if first is not None and all(r is first for r in recipes) and n.kind != "none":
            return self._into_low(n, linears, first, sizes)
        low = [m.weight.dtype for m, r in zip(linears, recipes, strict=True) if r is not None]
        if low or n.kind == "none" or not all(map(is_plain, linears)):
            dtype: Any = low[0] if low else None
            y, h = self.value(dtype)
            outs = project(y, *linears)
            return list(outs[0].split(sizes, -1)) if sizes else outs, h
        self.fire(n)
        name = op_of_norm(self.segments)
        fire("merge_linears", name)
        settings = (*n[:3], self.scale_offset, self._h_dtype(), linears[0].weight.dtype)
        weights, biases = [m.weight for m in linears], [m.bias for m in linears]
        parameters = (weights, biases, pieces(weights, sizes))
        op = getattr(ops, f"{name}_linears")
        outs, h = op(*self.operands(n), *settings, *parameters)
        return outs, h

    def common(self, linears: Sequence[nn.Module]) -> tuple[Any, ...] | None:
        """What streams share whose `into(*linears)` can be one launch, their recipe or None first;
        None where it is none."""
        n = read_norm(self.norm, self.x)
        recipes = [quantized.quantizes(self.x, m) for m in linears]
        is_one = all(r is recipes[0] for r in recipes) and all(map(is_plain, linears))
        if n.kind == "none" or not is_one:
            return None
        dtype: Any = linears[0].weight.dtype
        width = self.x.shape[-1]
        common = common_of_norms(n.kind, self._h_dtype(), dtype, width, has_linears=True)
        return None if common is None else (recipes[0], *common)

    def _into_low(
        self,
        n: NormConstants,
        linears: Sequence[nn.Module],
        recipe: Recipe,
        sizes: Sequence[int],
    ) -> tuple[list[Tensor], Tensor]:
        """`into` for linears that all run by a recipe."""
        self.fire(n)
        name = op_of_norm(self.segments)
        fire_low(name, len(linears), recipe)
        settings = (*n[:3], self.scale_offset, self._h_dtype(), linears[0].weight.dtype)
        weights, biases = [m.weight for m in linears], [m.bias for m in linears]
        parameters = (weights, biases, recipe.key, pieces(weights, sizes))
        op = getattr(ops, f"{name}_quantized_linears")
        return op(*self.operands(n), *settings, *parameters)

    def operands(self, n: NormConstants) -> tuple[Any, ...]:
        """What `fxopt::norm_modulate` takes before its settings, or its form for segments."""
        return (*self.tensors(n), *(self.segments or ()))

    def tensors(self, n: NormConstants) -> tuple[Tensor | None, ...]:
        """The same without how tables are read."""
        affine = (n.weight, n.bias, self.scale, self.shift)
        return (self.x, self.residual, self.gate, *affine, self.x_bias)

    def _h_dtype(self) -> torch.dtype:
        return self.h_dtype or promoted(self.x, self.residual, self.gate)

    def fire(self, n: NormConstants) -> None:
        """Note the substitutions that the op makes."""
        if self.x_bias is not None:
            fire("fuse_bias", "norm_modulate")
        if self.residual is not None or self.scale is not None or self.shift is not None:
            fire_modulate(self.segments)
        elif n.kind == "rms":
            fire("rms_norm", "norm_modulate")


def op_of_norm(segments: Segments | None) -> str:
    """The name of the op that norms by segment, or not."""
    return "norm_modulate" if segments is None else "norm_modulate_segments"


def fire_modulate(segments: Segments | None) -> None:
    """Note a modulation or a gated residual."""
    fire("norm_modulate", "norm_modulate")
    if segments is not None:
        fire("norm_modulate_segments", "norm_modulate_segments")


def fire_low(op: str, num_linears: int, recipe: Recipe) -> None:
    """Note that quantized linears run together with the op that makes their input."""
    for _ in range(num_linears):
        fire("quantized_linear", scaled_matmul.op_of(recipe))
    fire("merge_quantized", op_of(op, recipe))


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of a sum of `tensors`."""
    first, *others = [t.dtype for t in tensors if t is not None]
    for other in others:
        first = torch.promote_types(first, other)
    return first


def gated_residual(
    residual: Tensor | None,
    gate: Tensor | None,
    x: Tensor,
    dtype: torch.dtype | None = None,
    x_bias: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """residual + gate * (x + x_bias); one op where there is a gate, and a bias only there."""
    if residual is None:
        return x
    if gate is None:
        return residual + x
    fire_modulate(segments)
    if x_bias is not None:
        fire("fuse_bias", "norm_modulate")
    dtype = dtype or promoted(x, residual, gate)
    operands = (x, residual, gate, None, None, None, None, x_bias, *(segments or ()))
    _, h, _, _ = getattr(ops, op_of_norm(segments))(*operands, "none", 0.0, 0.0, 0.0, dtype, dtype)
    return h


def project(x: Tensor, *linears: nn.Module, keeps_x: bool = False) -> list[Tensor]:
    """Several linears of one input, as one autograd node; `keeps_x` as in `quantized.multiply`."""
    recipes = [quantized.quantizes(x, linear) for linear in linears]
    if any(recipes):
        return _project_by(recipes, x, linears, keeps_x)
    if len(linears) == 1 or not all(map(is_plain, linears)):
        return [linear(x) for linear in linears]
    fire("merge_linears", "linears")
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    return ops.linears(x, weights, biases, pieces(weights))


def _project_by(
    recipes: Sequence[Recipe | None], x: Tensor, linears: Sequence[nn.Module], keeps_x: bool
) -> list[Tensor]:
    """Each of `linears` under its recipe; under None as it is."""
    products: dict[nn.Module, Tensor] = {}
    for recipe in {id(r): r for r in recipes if r is not None}.values():
        low = [m for m, r in zip(linears, recipes, strict=True) if r is recipe]
        for _ in low:
            fire("quantized_linear", scaled_matmul.op_of(recipe))
        outs = quantized.multiply(x, low, recipe, keeps_x=keeps_x)
        products |= zip(low, outs, strict=True)
    return [products[m] if m in products else m(x) for m in linears]


def pieces(weights: Sequence[Any], sizes: Sequence[int] = ()) -> list[int]:
    """(linear, first row, last row + 1) of each output, flat: one per linear, or one's `sizes`."""
    if not sizes:
        return [i for index, w in enumerate(weights) for i in (index, 0, w.shape[0])]
    ends = list(itertools.accumulate(sizes))
    return [i for size, end in zip(sizes, ends, strict=True) for i in (0, end - size, end)]


def modulation(temb: Tensor, *adaln: tuple[Any, int]) -> list[tuple[Tensor, ...]]:
    """What AdaLN linears make of the SiLU of one embedding: [B, D] to n parts [B, 1, N / n] each.

    adaln: of each its linear and n.
    """
    linears, nums = zip(*adaln, strict=True)
    if not all(map(is_plain, linears)):
        wholes = zip(project(F.silu(temb), *linears), nums, strict=True)
        return [whole.unsqueeze(1).chunk(num, -1) for whole, num in wholes]
    for linear in linears:
        quantized.quantizes(temb, linear)  # a row per sample never is, and the report says so
    fire("silu_linears", "silu_products")
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    sizes = [len(w) // num for w, num in zip(weights, nums, strict=True)]
    rows = [
        (i, part * size, (part + 1) * size)
        for i, (size, num) in enumerate(zip(sizes, nums, strict=True))
        for part in range(num)
    ]
    outs = ops.silu_linears(temb, weights, biases, [number for row in rows for number in row])
    parts = iter([out.unsqueeze(1) for out in outs])
    return [tuple(itertools.islice(parts, num)) for num in nums]


def clip_half(x: Tensor) -> Tensor:
    """Clip fp16 to its range, as diffusers does at the end of a block."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
