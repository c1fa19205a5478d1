"""The options of a benchmark that change fields of the recipe it is about."""

from __future__ import annotations

import argparse
from dataclasses import replace

from fxopt.recipe_problems import CHOICES
from fxopt.recipes import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--history", type=int, default=0, metavar="N", help="scale by the last N steps"
    )
    parser.add_argument(
        "--saved",
        default="model",
        choices=CHOICES["saved"],
        help="what fused ops keep for backward",
    )


def changed(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe as the options ask, which its name says; unchanged without any."""
    if not args.history and args.saved == "model":
        return recipe
    name = recipe.name + "_delayed" * bool(args.history) + "_saved" * (args.saved != "model")
    return replace(recipe, name=name, history=args.history, saved=args.saved)
