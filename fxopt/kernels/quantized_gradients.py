"""What a node of quantized linears does in backward: each gradient is quantized once, in the launch
of the weights' transposed copies.

Shapes: M tokens (all leading dims), K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import weight_casts
from fxopt.kernels.counters import UNWATCHED, Slot
from fxopt.kernels.formats import Quantized
from fxopt.kernels.linears import Pieces, flat
from fxopt.kernels.quantize import Cast, Pair, covers, pair_of
from fxopt.kernels.scaled_matmul import multiply
from fxopt.kernels.sum_parts import sum_parts
from fxopt.kernels.together import Steps, side_by_side
from fxopt.recipes import Operand, Recipe


def by_linear(
    grads: Sequence[Tensor | None], pieces: Pieces, num_linears: int
) -> list[list[Tensor]]:
    """The gradient [M, .] of each linear's output, in pieces; none where no piece has one."""
    found: list[list[Tensor]] = [[] for _ in range(num_linears)]
    reached = {i: g for g, (i, _, _) in zip(grads, pieces, strict=True) if g is not None}
    for grad, (i, start, stop) in zip(grads, pieces, strict=True):
        if i in reached:
            like = reached[i]
            found[i].append(
                like.new_zeros(like.numel() // like.shape[-1], stop - start)
                if grad is None
                else flat(grad)
            )
    return found


def gradients(
    ctx: Any,
    grads: Sequence[list[Tensor]],
    weights: Sequence[Tensor],
    amax: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> Steps[tuple[Tensor | None, list[Tensor | Quantized | None], list[Tensor | None]]]:
    """The gradient of x [M, K]; for each linear the wgrad operand of its gradient, if its weight
    needs one; and the gradients of the biases. `grads` are those of `by_linear`; `needs` is of all
    weights, then of all biases."""
    recipe: Recipe = ctx.recipe
    products_MK: list[Tensor] = []
    operands: list[Tensor | Quantized | None] = [None] * len(grads)
    dbiases: list[Tensor | None] = [None] * len(grads)
    present = [i for i, grad in enumerate(grads) if grad]
    casts = []
    for i in present:
        needed = needs_x, needs[i], needs[len(grads) + i]
        slot = _with_known(ctx, i)
        casts.append(_of_gradient(grads[i], recipe, *needed, slot))
    pairs, factors = yield from side_by_side(
        quantized(*casts), _factors(ctx, present, weights, amax, needs_x)
    )
    for i, factor, cast, pair in zip(present, factors, casts, pairs, strict=True):
        if needs_x:
            products_MK.append(_input_gradient(cast.x, pair.rows, factor, recipe))
        if needs[i]:
            operands[i] = cast.x if recipe.wgrad is None else pair.columns
        if cast.wants_sum:
            dbiases[i] = pair.sum
    dx_MK = sum_parts(products_MK) if len(products_MK) > 1 else next(iter(products_MK), None)
    return dx_MK, operands, dbiases


def _factors(
    ctx: Any,
    present: Sequence[int],
    weights: Sequence[Tensor],
    amax: Sequence[Tensor],
    needs_x: bool,
) -> Steps[Sequence[Tensor | Quantized]]:
    """What dgrad multiplies gradients by: weights, or their transposed copies."""
    used = [weights[i] for i in present]
    if ctx.recipe.dgrad is None or not needs_x:
        return used
    if ctx.columns:
        return [weight_casts.columns_of(ctx.columns[i]) for i in present]
    found = [amax[i] for i in present] if amax else []
    slots = [ctx.slots.weights[i] for i in present]
    return (yield from weight_casts.for_gradients(used, found, ctx.recipe, slots))


def quantized(*casts: Cast) -> Steps[list[Pair]]:
    """The copies of each tensor; nothing is launched for one that has none but its sum."""
    is_cast = [cast.rows is not None or cast.columns is not None for cast in casts]
    found = iter((yield [c.ask() for c, needed in zip(casts, is_cast, strict=True) if needed]))
    return [
        pair_of(next(found)) if needed else _nothing(cast)
        for cast, needed in zip(casts, is_cast, strict=True)
    ]


def _nothing(cast: Cast) -> Pair:
    empty = Quantized(*[cast.x.new_empty(0) for _ in range(3)])
    return Pair(empty, empty, cast.x.sum(0) if cast.wants_sum else cast.x.new_empty(0))


def measures(ctx: Any, output: int, needs_x: bool, needs: Sequence[bool]) -> bool:
    """Whether `gradients` scales this output's gradient by its largest magnitude alone: one scale
    for a linear whose outputs are not split, of which nothing else is counted or recorded."""
    i = ctx.pieces[output][0]
    is_whole = [j for j, _, _ in ctx.pieces].count(i) == 1
    operands = [o for o in _operands(ctx.recipe, needs_x, needs[i]) if o is not None]
    by_tensor = all(covers(o) and o.block == "tensor" for o in operands)
    return bool(operands) and by_tensor and is_whole and ctx.slots.gradients[i] == UNWATCHED


def _with_known(ctx: Any, i: int) -> Slot:
    """The slot of a gradient, with its magnitude if the node that made it has left that."""
    slot: Slot = ctx.slots.gradients[i]
    each = zip(ctx.pieces, ctx.known, strict=False)
    known = next((amax for (j, _, _), amax in each if j == i and amax is not None), None)
    return slot if known is None else slot._replace(known=known)


def _operands(
    recipe: Recipe, for_input: bool, for_weight: bool
) -> tuple[Operand | None, Operand | None]:
    """How a gradient is cast for dgrad and, transposed, for wgrad."""
    rows = recipe.dgrad.a if recipe.dgrad and for_input else None
    return rows, recipe.wgrad.a if recipe.wgrad and for_weight else None


def _of_gradient(
    pieces: Sequence[Tensor],
    recipe: Recipe,
    for_input: bool,
    for_weight: bool,
    for_bias: bool,
    slot: Slot,
) -> Cast:
    rows, columns = _operands(recipe, for_input, for_weight)
    is_read = (for_input and rows is None) or (for_weight and columns is None)
    if len(pieces) > 1 and (is_read or rows is columns is None):
        pieces = [torch.cat(list(pieces), -1)]
    g_MN, *beside = pieces
    seed = None
    if any(operand is not None and operand.stochastic for operand in (rows, columns)):
        seed = torch.randint(2**62, (1,), device=g_MN.device)
    return Cast(g_MN, rows, columns, seed, for_bias, slot, beside)


def _input_gradient(
    g_MN: Tensor, rows: Quantized, factor: Tensor | Quantized, recipe: Recipe
) -> Tensor:
    """g W, for a weight or its transposed copy."""
    if recipe.dgrad is None:
        assert isinstance(factor, Tensor)
        return g_MN @ factor
    assert isinstance(factor, Quantized)
    return multiply(rows, factor, recipe.dgrad, g_MN.dtype)


def weight_gradients(
    operands: Sequence[Tensor | Quantized | None],
    x: Tensor | Quantized,
    weights: Sequence[Tensor],
    recipe: Recipe,
) -> list[Tensor | None]:
    return [
        None if operand is None else _weight_gradient(operand, x, weight, recipe)
        for operand, weight in zip(operands, weights, strict=True)
    ]


def _weight_gradient(
    g: Tensor | Quantized, x: Tensor | Quantized, weight: Tensor, recipe: Recipe
) -> Tensor:
    if isinstance(g, Quantized) and isinstance(x, Quantized):
        assert recipe.wgrad is not None
        return multiply(g, x, recipe.wgrad, weight.dtype)
    assert isinstance(g, Tensor) and isinstance(x, Tensor)
    return g.t() @ x.reshape(-1, x.shape[-1])
