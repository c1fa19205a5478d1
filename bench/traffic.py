"""`python -m bench.traffic`: memory traffic of real blocks at real sizes, without a GPU.

For every preset block at batch 1 in bfloat16, forward and backward: glue bytes, kernel launches and
bytes saved for backward, in eager and as fxopt's eager door rewrites it, next to the floor of
perfect fusion and to what min-cut saves. With `--recipe`, the same under a recipe next to fxopt's
bf16, what quantization moves for each element of a linear's x, weight and gradient, and how many
kernels it launches; once more for a further micro-batch in `fxopt.cast_weights_once`. With
`--history N` its scales are delayed, and what is counted is a later step; with `--saved fp8` fused
ops keep their activations as codes. Everything runs on fake tensors, so the figures are exact and
repeat.
`fxopt.traffic` and `bench.floor_traffic` hold the definitions. The tensors are fake CPU
tensors that count as CUDA runs them, because autograd refuses fake CUDA tensors in a PyTorch that
was built without CUDA.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bench import floor_traffic, recipe_options, rows
from bench.floor_traffic import Floor
from fxopt import traffic
from fxopt.errors import InvalidRecipe
from fxopt.fakes import faked
from fxopt.kernels.weight_casts import cast_weights_once
from fxopt.presets import PRESETS, PresetBlock
from fxopt.recipes import RECIPES, Recipe, find
from fxopt.schedule import at_step

Rewrite = Callable[..., Callable[..., Any]]  # as `rewrite_block`

# The blocks that have targets: fxopt's glue over the floor, its saved bytes over eager's and over
# min-cut's, its launches over eager's.
TARGETED = {
    "flux-dev double",
    "flux-dev single",
    "flux2-dev single",
    "qwen-image block",
    "z-image block",
    "wan2.1-14b block",
}
GLUE_OVER_FLOOR = 1.35
SAVED_OVER_EAGER = 0.65
SAVED_OVER_MIN_CUT = 1.0
LAUNCHES_OVER_EAGER = 0.4
# Under a recipe: quantization's bytes per element and launches per linear, glue and saved bytes
# over those of fxopt's bf16. What was asked for, and by recipe and case what is reached, the gate.
QUANTIZATION_BYTES = 8.0
ASKED = {"launches": 5.0, "glue": 1.25, "saved": 0.75}
SAVED_OVER_BF16 = 1.005


class Gate(NamedTuple):
    """Launches of quantization per linear, and GB of glue, in a step's first micro-batch and in a
    further one; what is saved over bf16's. Glue in GB, because bf16's own, which the ratios are to,
    falls as well."""

    launches: float
    glue: float
    further: float
    saved: float = SAVED_OVER_BF16


OF_CURRENT = {
    "flux-dev double": Gate(1.59, 4.41, 2.59),
    "flux-dev single": Gate(1.8, 3.13, 2.23),
    "flux2-dev single": Gate(4.5, 8.87, 4.95),
    "qwen-image block": Gate(1.59, 4.41, 2.59),
    "z-image block": Gate(2.29, 4.95, 3.53),
    "wan2.1-14b block": Gate(3.7, 36.4, 33.6),
}
OF_DELAYED = {
    "flux-dev double": Gate(1.42, 3.73, 2.37),
    "flux-dev single": Gate(1.6, 2.71, 2.03),
    "flux2-dev single": Gate(3.5, 6.93, 3.98),
    "qwen-image block": Gate(1.42, 3.73, 2.37),
    "z-image block": Gate(2.0, 4.26, 3.2),
    "wan2.1-14b block": Gate(3.1, 32.8, 30.7),
}
OF_SAVED = {
    "flux-dev double": Gate(1.59, 4.41, 2.59, ASKED["saved"]),
    "flux-dev single": Gate(1.8, 3.14, 2.24, ASKED["saved"]),
    "flux2-dev single": Gate(4.5, 8.89, 4.97, ASKED["saved"]),
    "qwen-image block": Gate(1.59, 4.41, 2.59, ASKED["saved"]),
    "z-image block": Gate(2.29, 4.96, 3.54, ASKED["saved"]),
    "wan2.1-14b block": Gate(3.7, 36.2, 33.4, ASKED["saved"]),
}
GATES = {"fp8": OF_CURRENT, "fp8_delayed": OF_DELAYED, "fp8_saved": OF_SAVED}
GB = 1e9


def cases(only: str = "") -> Iterator[tuple[str, PresetBlock]]:
    """Blocks of all presets at batch 1 whose case contains `only`, with that case."""
    for preset in PRESETS.values():
        for block in preset.blocks():
            case = f"{preset.name} {block.name}"
            if only in case:
                yield case, block


def count(
    block: nn.Module, inputs: dict[str, Any], function: Callable[..., Any] | None = None
) -> traffic.Traffic:
    """Forward and backward of `block`, or of `function` on its parameters."""
    forward, backward = passes(block, inputs, function or block)
    return forward + backward


def passes(
    block: nn.Module, inputs: dict[str, Any], function: Callable[..., Any]
) -> tuple[traffic.Traffic, traffic.Traffic]:
    with faked(block, (), inputs) as (args, kwargs), at_step(0):
        return traffic.measure(function, block, args, kwargs)


def measure(
    case: str, preset: PresetBlock, rewrite: Rewrite | None, detail: bool
) -> list[rows.Row]:
    """Figures of eager, the floor and, unless `rewrite` is None, fxopt and its targets."""
    with torch.device("meta"):
        block, inputs = preset.build(), preset.inputs()
    eager, floor = count(block, inputs), floor_traffic.count(block, inputs, preset.num_outputs)
    table = [
        *figures(case, "eager", eager),
        rows.Row(case, "glue, floor [GB]", floor.glue / GB),
        rows.Row(case, "saved, min-cut [GB]", floor.saved / GB),
    ]
    measured = {"eager": eager}
    if rewrite is not None:
        measured["fxopt"] = fxopt = count(block, inputs, rewrite(block, (), inputs))
        table += figures(case, "fxopt", fxopt) + ratios(case, eager, floor, fxopt)
    if detail:
        for name, found in measured.items():
            print(by_op(name, found), file=sys.stderr)
    return table


def measure_recipe(
    case: str, preset: PresetBlock, rewrite: Rewrite, recipe: str, detail: bool
) -> list[rows.Row]:
    """Figures of fxopt's bf16 and of `recipe`, a key, and the targets of the latter."""
    found = find(recipe)
    name = found.name
    with torch.device("meta"):
        block, inputs = preset.build(), preset.inputs()
    plain = count(block, inputs, rewrite(block, (), inputs))
    forward, backward = passes(block, inputs, rewrite(block, (), inputs, recipe))
    low = forward + backward
    further = count_further(block, inputs, rewrite(block, (), inputs, recipe))
    if detail:
        print(by_op(name, low), file=sys.stderr)
    glue, glue_further = (t.glue.total() / GB for t in (low, further))
    glue_plain = plain.glue.total() / GB
    gate = GATES.get(name, {}).get(case)
    launches, glue_gate, further_gate, saved_gate = gate or (None, None, None, None)
    of_linears = (
        of_quantization(case, low, plain, Linears.of(backward, found), launches)
        if found.quantizes
        else ()
    )
    return [
        *figures(case, "bf16", plain),
        *figures(case, name, low, glue_gate),
        rows.Row(case, "glue, further micro-batch [GB]", glue_further, at_most=further_gate),
        *of_linears,
        rows.Row(case, f"glue, recipe / bf16 (asked: {ASKED['glue']:g})", glue / glue_plain),
        rows.Row(case, "glue, further micro-batch / bf16", glue_further / glue_plain),
        rows.Row(
            case,
            f"saved, recipe / bf16 (asked: {ASKED['saved']:g})",
            low.saved / plain.saved,
            at_most=saved_gate,
        ),
    ]


def of_quantization(
    case: str,
    low: traffic.Traffic,
    plain: traffic.Traffic,
    quantized: Linears,
    launches: float | None,
) -> Iterator[rows.Row]:
    """What quantization moves and launches; `launches` is the gate, None where there is none."""
    num_bytes, num_launches = per_element(low, plain, quantized), per_linear(low, plain, quantized)
    at_most = None if launches is None else QUANTIZATION_BYTES
    yield rows.Row(case, "quantization [B / element]", num_bytes, at_most=at_most)
    metric = f"quantization launches / linear (asked: {ASKED['launches']:g})"
    yield rows.Row(case, metric, num_launches, at_most=launches)


def count_further(
    block: nn.Module, inputs: dict[str, Any], function: Callable[..., Any]
) -> traffic.Traffic:
    """The second of two micro-batches between which no weight changes, accumulation left out."""
    with faked(block, (), inputs) as (args, kwargs), cast_weights_once(), at_step(0):
        traffic.measure(function, block, args, kwargs)
        for tensor in (*block.parameters(), *tree_leaves((args, kwargs))):
            if isinstance(tensor, torch.Tensor):
                tensor.grad = None
        forward, backward = traffic.measure(function, block, args, kwargs)
    return forward + backward


PRODUCERS = ("fxopt::norm_modulate", "fxopt::gated_activation")


def quantization(counts: Counter[str], plain: Counter[str]) -> int:
    """What ops do that quantize or make what is quantized, beyond what the latter do in bf16."""
    low = sum(n for op, n in counts.items() if op.startswith(PRODUCERS) or "quantize" in op)
    return low - sum(n for op, n in plain.items() if op.startswith(PRODUCERS))


class Linears(NamedTuple):
    """How many linears are quantized, and how many elements their x, weights and gradients have."""

    count: float
    elements: float

    @staticmethod
    def of(backward: traffic.Traffic, recipe: Recipe) -> Linears:
        """From their products in backward: in forward a linear may have one for each piece."""
        shapes = [g.shape for g in backward.gemms if g.bits < 16 and g.shape is not None]
        each = sum(gemm is not None for gemm in (recipe.dgrad, recipe.wgrad))
        # Each of the products of a linear has all three sizes.
        elements = sum(m * n + n * k + m * k for m, n, k in shapes)
        return Linears(len(shapes) / each, elements / each)


def per_element(found: traffic.Traffic, plain: traffic.Traffic, linears: Linears) -> float:
    """Bytes of quantization for each element of x, weight and gradient of a quantized linear."""
    return quantization(found.glue, plain.glue) / linears.elements


def per_linear(found: traffic.Traffic, plain: traffic.Traffic, linears: Linears) -> float:
    """Launches of quantization, forward and backward."""
    return quantization(found.launches, plain.launches) / linears.count


def figures(
    case: str, name: str, found: traffic.Traffic, glue_gate: float | None = None
) -> list[rows.Row]:
    return [
        rows.Row(case, f"glue, {name} [GB]", found.glue.total() / GB, at_most=glue_gate),
        rows.Row(case, f"saved, {name} [GB]", found.saved / GB),
        rows.Row(case, f"launches, {name}", found.launches.total()),
    ]


def ratios(
    case: str, eager: traffic.Traffic, floor: Floor, fxopt: traffic.Traffic
) -> list[rows.Row]:
    """What the targets are set on."""
    glue, saved, launches = fxopt.glue.total(), fxopt.saved, fxopt.launches.total()
    compared = [
        ("glue, fxopt / floor", glue / floor.glue, GLUE_OVER_FLOOR),
        ("saved, fxopt / eager", saved / eager.saved, SAVED_OVER_EAGER),
        ("saved, fxopt / min-cut", saved / floor.saved, SAVED_OVER_MIN_CUT),
        ("launches, fxopt / eager", launches / eager.launches.total(), LAUNCHES_OVER_EAGER),
    ]
    has_targets = case in TARGETED
    return [
        rows.Row(case, metric, value, at_most=limit if has_targets else None)
        for metric, value, limit in compared
    ]


def by_op(name: str, found: traffic.Traffic) -> str:
    """Launches and glue bytes by op, most bytes first."""
    ordered = sorted(found.launches, key=lambda op: -found.glue[op])
    lines = [f"  {op:40} {found.launches[op]:4} {found.glue[op] / GB:9.3f} GB" for op in ordered]
    return "\n".join([name, *lines])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    rows.add_arguments(parser)
    parser.add_argument("--only", default="", metavar="NAME", help="cases that contain NAME")
    parser.add_argument("--baselines", action="store_true", help="measure eager and floor only")
    parser.add_argument("--by-op", action="store_true", help="list the ops on standard error")
    parser.add_argument("--recipe", default="bf16", choices=[*RECIPES], help="default: bf16")
    recipe_options.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.history and not RECIPES[args.recipe].quantizes:
        parser.error(f"--history is for a recipe that quantizes, not for {args.recipe}")
    try:
        recipe = recipe_options.changed(RECIPES[args.recipe], args).key
    except InvalidRecipe as error:
        parser.error(str(error))
    selected = list(cases(args.only))
    if not selected:
        known = ", ".join(case for case, _ in cases())
        parser.error(f"no case contains {args.only!r}; there are {known}")
    rewrite = None if args.baselines else eager_door()
    table: list[rows.Row] = []
    for index, (case, block) in enumerate(selected, start=1):
        print(f"[{index}/{len(selected)}] {case}", file=sys.stderr)
        if recipe == "bf16":
            table += measure(case, block, rewrite, args.by_op)
        else:
            table += measure_recipe(case, block, eager_door(), recipe, args.by_op)
    return rows.publish(args, table)


def eager_door() -> Rewrite:
    """What the eager door does to one block."""
    from fxopt.backends.exported import rewrite_block

    return rewrite_block


if __name__ == "__main__":
    sys.exit(main())
