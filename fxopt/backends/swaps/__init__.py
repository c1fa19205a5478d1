"""Module swapping: which forwards can stand for which modules. One file is one kind of module.

`fused` holds the words that a fused forward is written in, `swap` what a candidate is, `proof` how
it is judged. FAMILIES lists the known classes, blocks first, and FORMS what blocks of diffusers are
made of; MLPs and norms are found by structure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from fxopt.backends.checkpoints import unwrapped
from fxopt.backends.swaps import (
    adaln,
    attention,
    cogview,
    decoder,
    flux,
    flux2,
    hunyuan,
    linears,
    ltx,
    ltx2,
    mlps,
    norms,
    one_stream,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from fxopt.backends.swaps.swap import Family, Form, Swap
from fxopt.recipes import RECIPES, Recipe

FAMILIES: tuple[Family, ...] = (
    *flux2.FAMILIES,
    *hunyuan.FAMILIES,
    *sd3.FAMILIES,
    *qwen_image.FAMILIES,
    *ltx.FAMILIES,
    *ltx2.FAMILIES,
    *z_image.FAMILIES,
    *decoder.FAMILIES,
    *adaln.FAMILIES,
    *attention.FAMILIES,
)
FORMS: tuple[Form, ...] = (*flux.FORMS, *wan.FORMS, *cogview.FORMS)


def candidates(module: nn.Module, recipe: Recipe = RECIPES["bf16"]) -> Iterator[Swap]:
    """Swaps worth a proof on `module` under `recipe`, the likeliest first."""
    if "forward" in module.__dict__ or type(module).forward is nn.Module.forward:
        return
    forward = unwrapped(type(module).forward)
    for family in FAMILIES:
        if any(forward is unwrapped(_forward(name)) for name in family.classes):
            yield family.swap
    yield from (form.swap for form in FORMS if form.fits(module, forward))
    yield from one_stream.candidates(module, forward)
    yield from mlps.candidates(module)
    yield from norms.candidates(module)
    if recipe.quantizes and type(module) is nn.Linear:
        yield linears.SWAP


def _forward(name: str) -> object:
    """The forward of a class given by its dotted name, if its library is imported."""
    library, _, class_name = name.rpartition(".")
    known = getattr(sys.modules.get(library), class_name, None)
    return getattr(known, "forward", None)
