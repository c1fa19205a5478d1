"""Cases from a command line: functions of the user's, and published blocks through the doors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxopt.diagnose.case import Case
from fxopt.diagnose.subjects import Subject, from_function
from fxopt.errors import MissingPackage, UnknownOption, UnknownPreset, UnknownRecipe
from fxopt.recipes import RECIPES, Recipe

ATen = torch.ops.aten
DOORS = ("optimize", "swap", "compile")
CHECKPOINTING = ("none", "selective", "full")
# What selective checkpointing keeps: matrix products and attention cost more than their results.
KEPT = (
    *(ATen.mm.default, ATen.addmm.default, ATen.bmm.default),
    ATen._scaled_dot_product_flash_attention.default,
    ATen._scaled_dot_product_efficient_attention.default,
    ATen._scaled_dot_product_flash_attention_for_cpu.default,
)


# Of outputs, where operands are quantized: about half again what one product of random matrices
# loses (0.034 to 0.038 in 8 bits, 0.12 to 0.13 in 4, relative L2). Gradients, which pass through
# several, are held to four times that, so zeros and wrong signs still fail.
ENVELOPES = {"e4m3": 0.06, "e5m2": 0.06, "e2m1": 0.2}


@dataclass(frozen=True)
class Sweep:
    """Values of every option that is swept; the cases are their product.

    Args:
        batch, tokens, height, width: sizes; empty for the subject's own.
        recipe, ac, door: names.
        dtype: of parameters and activations of presets and kernels.
    """

    batch: Sequence[int] = ()
    tokens: Sequence[int] = ()
    height: Sequence[int] = ()
    width: Sequence[int] = ()
    recipe: Sequence[str] = ()
    ac: Sequence[str] = ()
    door: Sequence[str] = ()
    dtype: str = "bfloat16"

    def points(self, *names: str) -> Iterator[dict[str, Any]]:
        """The product of the options that were given, of those called `names`."""
        given = [name for name in names if getattr(self, name)]
        for values in itertools.product(*(getattr(self, name) for name in given)):
            yield dict(zip(given, values, strict=True))


def function_cases(
    baseline: str, candidate: str, sweep: Sweep, seed: int, in_float64: bool
) -> Iterator[Case]:
    """Two functions of a user's files; swept options become their arguments."""
    names = ("batch", "tokens", "height", "width", "recipe", "ac", "door")
    for point in sweep.points(*names):
        first = from_function(baseline, point, seed)
        second = from_function(candidate, point, seed)
        name = "step" + suffix(point)
        yield Case(name, first, second, point, truth=first if in_float64 else None)


def suffix(point: Mapping[str, Any]) -> str:
    return "".join(f" {key}={value}" for key, value in point.items())


def preset_cases(
    name: str, sweep: Sweep, device: torch.device, seed: int, in_float64: bool
) -> Iterator[Case]:
    """The blocks of a preset, or one of them, through one door or several.

    Args:
        name: "flux-dev" or "flux-dev-block" for all blocks, "flux-dev-double" for one of them.

    Raises:
        UnknownPreset, UnknownOption: with the nearest names.
    """
    blocks = _find_blocks(name)
    for point in sweep.points("batch", "tokens", "height", "width", "recipe", "ac", "door"):
        point = {"recipe": "bf16", "ac": "none", "door": "swap", "dtype": sweep.dtype} | point
        if point["recipe"] not in RECIPES:
            raise UnknownRecipe(point["recipe"], tuple(RECIPES))
        _require(point["door"], DOORS)
        _require(point["ac"], CHECKPOINTING)
        sizes: dict[str, Any] = {
            key: point[key] for key in ("batch", "height", "width") if key in point
        }
        if "tokens" in point:
            sizes |= {"height": 16, "width": 16 * point["tokens"]}  # a row of patches
        for label, make in blocks(sizes):
            block = functools.partial(_block, label, make, point, device, seed)
            plain = functools.partial(block, None)
            # What a compiler gains by itself is not the door's.
            before = (
                functools.partial(block, "torch.compile") if point["door"] == "compile" else plain
            )
            after = functools.partial(block, point["door"])
            shown = {k: v for k, v in point.items() if k not in ("recipe", "dtype") or v != "bf16"}
            # A quantized product is further from float64 than any factor of eager's error allows.
            keeps_dtype = not RECIPES[point["recipe"]].gemms
            # Checkpointing changes no value, and its recomputation would leave the mode that
            # raises dtypes.
            exact = functools.partial(_block, label, make, point | {"ac": "none"}, device, seed)
            truth = functools.partial(exact, None) if in_float64 and keeps_dtype else None
            tolerance = envelope(RECIPES[point["recipe"]])
            yield Case(label + suffix(shown), before, after, point, truth, tolerance=tolerance)


def envelope(recipe: Recipe) -> float | None:
    """Largest error of outputs next to the model's own dtype; None if nothing is quantized."""
    operands = [operand for _, gemm in recipe.gemms for operand in (gemm.a, gemm.b)]
    return max((ENVELOPES[operand.format] for operand in operands), default=None)


def _require(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UnknownOption(name, known)


def _find_blocks(name: str) -> Callable[[Mapping[str, int]], list[tuple[str, Any]]]:
    from fxopt.presets import PRESETS

    preset = next((p for p in PRESETS.values() if (name + "-").startswith(p.name + "-")), None)
    if preset is None:
        raise UnknownPreset(name, tuple(PRESETS))

    def blocks(sizes: Mapping[str, int]) -> list[tuple[str, Any]]:
        try:
            found = preset.blocks(**sizes)
        except ModuleNotFoundError as error:
            raise MissingPackage(str(error.name), f"preset {name!r}", "models") from error
        wanted = name.removeprefix(preset.name).strip("-")
        kinds = [block.name for block in found]
        if wanted not in ("", "block", *kinds):
            raise UnknownPreset(name, [f"{preset.name}-{kind}" for kind in kinds])
        return [(f"{preset.name}-{b.name}", b) for b in found if wanted in ("", "block", b.name)]

    return blocks


def _block(
    label: str,
    preset: Any,
    point: Mapping[str, Any],
    device: torch.device,
    seed: int,
    door: str | None,
) -> Subject:
    """A preset's block with random values; through `door`, or as its authors wrote it."""
    torch.manual_seed(seed)
    dtype = getattr(torch, point["dtype"])
    with torch.device(device):
        block = preset.build().to(dtype)
        inputs = tree_map_only(Tensor, functools.partial(_filled, dtype=dtype), preset.inputs())
    forward = _through(block, door, point["recipe"])
    name = f"{label} through {door}" if door else f"{label} as it is"
    step = functools.partial(forward_backward, _checkpointed(forward, point["ac"]), block, seed)
    return Subject(name, step, forward, inputs)


def _filled(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Random values: normal activations; tables of rotations by an angle per position."""
    if tensor.requires_grad:
        return torch.randn_like(tensor, dtype=dtype).requires_grad_()
    angle = torch.rand_like(tensor[..., :1].real) * 6.28
    if tensor.is_complex():
        return torch.polar(torch.ones_like(angle), angle).expand_as(tensor).contiguous()
    return angle.cos().expand_as(tensor).to(tensor.dtype).contiguous()


def _through(block: nn.Module, door: str | None, recipe: str) -> nn.Module:
    import fxopt

    if door is None:
        return block
    if door == "torch.compile":
        return cast(nn.Module, torch.compile(block))
    if door == "compile":
        from fxopt.backends.dynamo import backend

        # By the function: its name is known where fxopt is installed, not in a tree of its source.
        compiled = torch.compile(block, backend=backend, options={"recipe": recipe})
        return cast(nn.Module, compiled)
    opened: nn.Module = getattr(fxopt, door)(block, recipe=recipe)
    return opened


def _checkpointed(forward: Callable[..., Any], ac: str) -> Callable[..., Any]:
    from torch.utils import checkpoint

    if ac == "none":
        return forward
    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, [*KEPT])
    options: dict[str, Any] = {"context_fn": contexts} if ac == "selective" else {}
    return functools.partial(checkpoint.checkpoint, forward, use_reentrant=False, **options)


def forward_backward(
    forward: Callable[..., Any], block: nn.Module, seed: int, **inputs: Any
) -> tuple[Tensor, ...]:
    """Forward, then backward of every output from fixed random gradients; the outputs."""
    block.zero_grad(set_to_none=True)
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            leaf.grad = None
    result = forward(**inputs)
    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    gradients = [gradient(tuple(t.shape), t.device, t.dtype, seed) for t in outputs]
    torch.autograd.backward(outputs, gradients)
    return tuple(t.detach() for t in outputs)


@functools.lru_cache(maxsize=16)
def gradient(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    # Drawn in one dtype, so that a float64 truth sees the same values.
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return drawn.bfloat16().to(dtype)
