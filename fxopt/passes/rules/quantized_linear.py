"""Block linears in the formats of a recipe; linears that share an input share its quantized form.

Which linears is read off the graph. What modulates (one row per sample, or whose result only
scales, shifts and gates), embeds or projects outside the blocks stays in the model's dtype: it is a
small part of the work and sensitive to rounding.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from fxopt import cost
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.quantized_linears import quantized_linears
from fxopt.kernels.scaled_matmul import MULTIPLE, op_of
from fxopt.passes import ir
from fxopt.passes.ir import aten
from fxopt.passes.lookup import LOOKUPS, POINTWISE
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.rules.merge_linears import is_stored_by_output, split_outputs
from fxopt.recipes import Recipe

PER_SAMPLE = "its input is one row per sample, not per token: a modulation or an embedding"
MODULATES = "its result only scales, shifts or gates: a modulation"
OUTSIDE = "it stands outside the repeated blocks: an embedder or the final projection"
KEPT = "the recipe keeps it in the model's dtype"
SIZES = f"its {{}} features are no multiple of {MULTIPLE}, which the matrix units need"
STORED = "its weight is stored as [in, out]; codes are made of one stored as [out, in]"
FLOAT64 = "float64 is for measuring: it is not quantized"
REMEDY = "it stays in the model's own dtype"
REGARDLESS = 'Recipe(profit="always") quantizes it all the same'

MODULATION_OPERANDS = (2, 5, 6)  # gate, scale and shift of norm_modulate
# What makes modulations of a linear's result, or looks them up in it.
BEFORE_MODULATION = (
    *(*ir.VIEWS, *POINTWISE, *LOOKUPS),
    *(aten.add.Tensor, aten.cat.default, aten.broadcast_tensors.default),
)
# An item of a list is a block from this many linears on: those of an MLP may be items themselves.
LEAST_LINEARS = 2
ATTENTION = (aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default)


def rule(recipe: Recipe, block: str | None, theta: float | None = None) -> Rule:
    """The rule for a recipe.

    Args:
        recipe: one that quantizes.
        block: fully qualified name of the block whose graph it will see; None for graphs of whole
            models, where the blocks are found by the paths of the modules.
        theta: the bound of `cost.fp8_pays` that a linear has to meet; None for any linear.
    """
    return replace(RULE, propose=partial(propose, recipe, block, theta))


def propose(
    recipe: Recipe, block: str | None, theta: float | None, anchor: fx.Node
) -> Iterator[Binding | Reason]:
    why_not = [Reason(why, anchor, REMEDY) for why in reasons(recipe, block, anchor)]
    if not why_not and theta is not None:
        why_not = [Reason(why, anchor, REGARDLESS) for why in unprofitable(anchor, theta)]
    if why_not:
        yield from why_not
        return
    x, its_recipe = anchor.args[0], _recipe_of(anchor, recipe, block)
    assert isinstance(x, fx.Node) and its_recipe is not None
    sharing = [u for u in x.users if ir.is_call(u, ir.LINEAR) and u.args[0] is x]
    group = [
        n
        for n in sorted(sharing)
        if not reasons(recipe, block, n)
        and _recipe_of(n, recipe, block) == its_recipe
        and (theta is None or not unprofitable(n, theta))
    ]
    yield _bind(its_recipe, x, group)
    if len(group) > 1:
        yield _bind(its_recipe, x, [anchor])


def _recipe_of(linear: fx.Node, recipe: Recipe, block: str | None) -> Recipe | None:
    """Under which recipe `linear` runs; None for the model's dtype."""
    path = _path(linear)
    return recipe.of(f"{block}.{path}" if block else path)


def reasons(recipe: Recipe, block: str | None, linear: fx.Node) -> list[str]:
    """All that speaks against quantizing `linear`."""
    x, weight = linear.args[0], linear.args[1]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    found, path = [], _path(linear)
    if block is None and _is_outside(linear, path):
        found.append(OUTSIDE)
    if _recipe_of(linear, recipe, block) is None:
        found.append(KEPT)
    sizes = ir.shape(x)
    if len(sizes) < 3 or ir.same(sizes[-2], 1):
        found.append(PER_SAMPLE)
    elif _only_modulates(linear):
        found.append(MODULATES)
    uneven = [s for s in ir.shape(weight) if not isinstance(s, int) or s % MULTIPLE]
    if uneven or len(ir.shape(weight)) != 2:
        found.append(SIZES.format(" and ".join(map(str, uneven))))
    if not is_stored_by_output(linear):
        found.append(STORED)
    if ir.dtype(x) == torch.float64:
        found.append(FLOAT64)
    return found


def unprofitable(linear: fx.Node, theta: float) -> list[str]:
    """That quantizing `linear` costs more than its products save, at the sizes of the capture."""
    out, features = ir.shape(linear.args[1])  # type: ignore[arg-type]
    num_tokens = ir.num_rows(linear)
    if cost.fp8_pays(num_tokens, out, features, theta):
        return []
    first = cost.fp8_from_tokens(out, features, theta)
    pays = f"pays from {first:,} tokens" if first else "never pays"
    return [f"{features} -> {out} features: FP8 {pays}, here are {num_tokens:,}"]


def _only_modulates(linear: fx.Node) -> bool:
    """Whether all that becomes of the result is a gate, scale or shift of a fused norm."""
    stack, seen = [linear], {linear}
    while stack:
        node = stack.pop()
        for user in node.users:
            if ir.is_call(user, norm_modulate, norm_modulate_segments):
                if any(a is node for i, a in enumerate(user.args) if i not in MODULATION_OPERANDS):
                    return False
            elif ir.is_call(user, *BEFORE_MODULATION):
                stack += {user} - seen
                seen.add(user)
            else:
                return False
    return len(seen) > 1


def _path(node: fx.Node) -> str:
    """Path of the module from the root of the graph; Dynamo writes items as dict look-ups."""
    path = re.sub(r"(?:__dict__|_modules)(?:\['_modules'\])?\['([^']+)'\]", r"\1", ir.fqn(node))
    return re.sub(r"^L\['\w+'\]\.?|^L__self___?", "", path)


def _is_outside(linear: fx.Node, path: str) -> bool:
    """Whether `linear` is in none of the blocks of a graph.

    A block is an item of a list that holds enough linears; where there is none, the graph is that
    of a block if attention runs in it, and else what surrounds blocks that are graphs of their own.
    """
    items: Counter[str] = Counter()
    has_attention = False
    for node in linear.graph.nodes:
        has_attention |= ir.is_call(node, *ATTENTION)
        if ir.is_call(node, ir.LINEAR, quantized_linears):
            num_linears = 1 if node.target is ir.LINEAR else len(node.args[1])
            items.update(dict.fromkeys(_items(_path(node)), num_linears))
    blocks = {item for item, count in items.items() if count >= LEAST_LINEARS}
    return blocks.isdisjoint(_items(path)) if blocks else not has_attention


def _items(path: str) -> list[str]:
    """The prefixes of a path that are items of lists."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]


def _bind(recipe: Recipe, x: fx.Node, group: Sequence[fx.Node]) -> Binding:
    named = [ir.arguments(n) for n in group]
    weights, biases = [a["weight"] for a in named], [a["bias"] for a in named]
    is_attended = _is_attended(x)
    if is_attended and ir.is_call(x, aten.contiguous.default) and set(x.users) <= set(group):
        x = x.args[0]
    inputs = tuple(dict.fromkeys(n for n in (x, *weights, *biases) if n is not None))
    outputs, pieces = split_outputs(list(group))

    def emit(call: Call, *nodes: fx.Node) -> tuple[fx.Node, ...]:
        given = dict(zip(inputs, nodes, strict=True)) | {None: None}
        w, b = [given[w] for w in weights], [given[b] for b in biases]
        outs = call(quantized_linears, given[x], w, b, recipe.key, is_attended, pieces)
        return tuple(call(operator.getitem, outs, i) for i in range(len(outputs)))

    # The same products in another format: there is no other meaning that a proof could find.
    return Binding(
        group[0],
        inputs,
        tuple(outputs),
        emit,
        op_of(recipe),
        regroups=True,
        count=len(group),
    )


def _is_attended(x: fx.Node) -> bool:
    """Whether `x` is in the memory of an attention's result, which attention keeps for backward."""
    while ir.is_call(x, aten.contiguous.default, *ir.VIEWS):
        x = x.args[0]
    return ir.is_call(x, ir.SDPA)


def _nothing(anchor: fx.Node) -> Iterator[Binding | Reason]:
    yield from ()


# As it stands it finds nothing: `rule` gives it a recipe.
RULE = Rule(
    name="quantized_linear",
    version=2,
    anchors=(ir.LINEAR,),
    propose=_nothing,
    tier="low_precision",
)
