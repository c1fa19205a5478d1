"""`python -m bench.converge`: does a model train under a recipe as it does in its own dtype?

The demo's model is trained from several seeds, in its own dtype and under each recipe, from the
same weights and on the same images, noise and times. Compared are

- the validation loss at the end, on fixed noise, in bins of time: the difference by seed, with a
  confidence interval, against the spread of the model's own dtype from seed to seed;
- gradients on the same weights and batch, along the way: their norm over that of the model's dtype
  and their cosine, by group of parameters. An optimizer that divides by the gradient's size hides a
  wrong scale from the loss; this does not.

fp32 on a CPU, the recipes by exact emulation.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import fxopt
from bench import recipe_options, rows
from fxopt.demo.training import Batch, Run, Scale, batches, build_model, flow_loss
from fxopt.errors import InvalidRecipe
from fxopt.kernels.in_force import high_precision
from fxopt.recipes import RECIPES, Recipe, find

NUM_BINS = 4  # of time
NUM_PROBES = 4  # along a run
CONFIDENCE = 0.95
# The loss may differ by this many standard deviations from seed to seed, and be the same.
BAND = 2.0
GROUPS = {
    "attention": r"attn\.",
    "mlp": r"\.ff|proj_mlp|blocks.*proj_out",
    "modulation": r"norm.*\.linear",
    "rest": "",
}
# By the bits of a recipe's narrowest operand: how far the norm of a group's gradient may be from
# that in the model's dtype, and how small their cosine may be. Five seeds of 200 steps gave
# 0.006 and 0.998 at worst in 8 bits, 0.023 and 0.976 in 4 (bench/results/converge.json); these are
# two to five times as far.
NORM_BOUNDS = {8: 0.015, 4: 0.05}
COSINE_BOUNDS = {8: 0.99, 4: 0.9}


@dataclass
class Result:
    """One run.

    losses: validation loss by bin of time. ratios, cosines: of the gradients, by group of
    parameters, one for each probe.
    """

    losses: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    cosines: dict[str, list[float]] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


@dataclass(frozen=True)
class Verdict:
    """What is said of a recipe.

    word: "same", "worse", "inconclusive" or "wrong gradients".
    difference, margin: mean difference in validation loss and half its confidence interval.
    band: the difference that is still the same.
    found: what is wrong with the gradients.
    """

    word: str
    difference: float
    margin: float
    band: float
    found: tuple[str, ...] = ()

    def __str__(self) -> str:
        interval = f"{self.difference:+.2g} ± {self.margin:.2g}"
        said = f"{self.word}: validation loss {interval}, the same within {self.band:.2g}"
        return "; ".join([said, *self.found])


def train(recipe: Recipe | None, scale: Scale, seed: int) -> Result:
    """Train under `recipe`, or in the model's dtype, and look at it."""
    model, result = build_model(scale, seed), Result()
    run = Run("", model, recipe and (lambda m: fxopt.optimize(m, recipe=recipe)), scale)
    run.open()
    every = max(scale.num_steps // NUM_PROBES, 1)
    for index, batch in enumerate(batches(scale, seed)):
        with fxopt.at_step(index):
            run.step(batch)
            if recipe is not None and index % every == every - 1:
                probe(run, batch, result)
    with fxopt.at_step(scale.num_steps):
        result.losses = validation(run.forward, scale)
    return result


def probe(run: Run, batch: Batch, result: Result) -> None:
    """Compare the gradients of one batch with those in the model's dtype."""
    run.gradients(batch)
    low = by_group(run.model)
    with high_precision():
        run.gradients(batch)
    for group, exact in by_group(run.model).items():
        ratio = (low[group].norm() / exact.norm()).item()
        cosine = nn.functional.cosine_similarity(low[group], exact, 0).item()
        result.ratios.setdefault(group, []).append(ratio)
        result.cosines.setdefault(group, []).append(cosine)
    run.optimizer.zero_grad()


def by_group(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of each group of parameters as one vector."""
    found: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            group = next(g for g, pattern in GROUPS.items() if re.search(pattern, name))
            found[group].append(parameter.grad.double().flatten())
    return {group: torch.cat(vectors) for group, vectors in found.items() if vectors}


@torch.no_grad()
def validation(forward: Callable[..., Tensor], scale: Scale) -> list[float]:
    """Loss by bin of time, on images and noise that are the same for all runs."""
    (batch,) = batches(Scale(num_steps=1, batch=4 * scale.batch), seed=10**6)
    losses = []
    for index in range(NUM_BINS):
        time_B = (batch.time_B + index) / NUM_BINS
        losses.append(flow_loss(forward, batch._replace(time_B=time_B)).item())  # type: ignore[arg-type]
    return losses


def judge(recipe: Recipe, plain: Sequence[Result], low: Sequence[Result]) -> Verdict:
    """Compare runs under `recipe` with those in the model's dtype, seed by seed."""
    from scipy import stats

    differences = [b.loss - a.loss for a, b in zip(plain, low, strict=True)]
    mean, num = statistics.fmean(differences), len(differences)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1))
    margin = quantile * statistics.stdev(differences) / math.sqrt(num)
    band = BAND * statistics.stdev(r.loss for r in plain)
    found = tuple(faults(recipe, low))
    if found:
        word = "wrong gradients"
    elif mean + margin <= band:
        word = "same"
    elif mean - margin > 0 and mean > band:
        word = "worse"
    else:
        word = "inconclusive"
    return Verdict(word, mean, margin, band, found)


def faults(recipe: Recipe, low: Sequence[Result]) -> Iterator[str]:
    """Groups whose gradients are off by more than rounding explains."""
    bits = narrowest(recipe)
    for group in low[0].ratios:
        ratio = statistics.fmean(r for result in low for r in result.ratios[group])
        cosine = statistics.fmean(c for result in low for c in result.cosines[group])
        if abs(ratio - 1) > NORM_BOUNDS[bits]:
            yield f"the gradient of {group} is {ratio:.2f} times as large"
        if cosine < COSINE_BOUNDS[bits]:
            yield f"the gradient of {group} has a cosine of {cosine:.2f}"


def narrowest(recipe: Recipe) -> int:
    """Bits of the narrowest operand."""
    formats = {o.format for _, g in recipe.gemms for o in (g.a, g.b)}
    return 4 if "e2m1" in formats else 8


def table(recipe: Recipe, verdict: Verdict, low: Sequence[Result]) -> list[rows.Row]:
    """What was measured, with the bounds that were set on it."""
    bits, name = narrowest(recipe), recipe.name
    found = [
        rows.Row(name, "validation loss, difference", verdict.difference, at_most=verdict.band),
        rows.Row(name, "its margin at 95%", verdict.margin),
    ]
    for group in low[0].ratios:
        ratio = statistics.fmean(r for result in low for r in result.ratios[group])
        cosine = statistics.fmean(c for result in low for c in result.cosines[group])
        off, least = NORM_BOUNDS[bits], COSINE_BOUNDS[bits]
        found += [
            rows.Row(name, f"gradient norm off by, {group}", abs(ratio - 1), at_most=off),
            rows.Row(name, f"gradient cosine, {group}", cosine, at_least=least),
        ]
    return found


def plot(path: Path, plain: Sequence[Result], low: dict[str, list[Result]]) -> None:
    """Validation loss by bin of time, all seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    runs: dict[str, Sequence[Result]] = {"model's dtype": plain, **low}
    for index, (name, results) in enumerate(runs.items()):
        for seed, result in enumerate(results):
            label = name if seed == 0 else None
            axes.plot(range(NUM_BINS), result.losses, color=f"C{index}", alpha=0.6, label=label)
    axes.set(xlabel="bin of time", ylabel="validation loss")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.converge", description=__doc__)
    rows.add_arguments(parser)
    names = [name for name, recipe in RECIPES.items() if recipe.gemms]
    parser.add_argument("--recipe", default="fp8,mxfp8,nvfp4", help=f"of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=5, help="runs each, at least 2 (default: 5)")
    parser.add_argument("--steps", type=int, default=200, help="of a run (default: 200)")
    recipe_options.add_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into FILE")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: a spread takes at least 2")
    scale = Scale(num_steps=args.steps, batch=16, num_double=1, num_single=2)
    try:
        recipes = [recipe_options.changed(find(name), args) for name in args.recipe.split(",")]
    except InvalidRecipe as error:
        parser.error(str(error))
    plain = [train(None, scale, seed) for seed in range(args.seeds)]
    low: dict[str, list[Result]] = {}
    measured: list[rows.Row] = []
    for recipe in recipes:
        low[recipe.name] = [train(recipe, scale, seed) for seed in range(args.seeds)]
        verdict = judge(recipe, plain, low[recipe.name])
        print(f"{recipe.name}: {verdict}", file=sys.stderr)
        measured += table(recipe, verdict, low[recipe.name])
    if args.plot is not None:
        plot(args.plot, plain, low)
    return rows.publish(args, measured)


if __name__ == "__main__":
    sys.exit(main())
