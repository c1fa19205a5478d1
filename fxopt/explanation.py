"""What the doors would do to a model and what each block costs, without a GPU and without weights.

A block class is captured and rewritten once, on the meta device; both forms are counted at the real
sizes (`traffic`) and put on the target's roofline (`cost`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxopt import cost, errors, fakes, hardware, traffic
from fxopt.backends import options, state
from fxopt.backends.blocks import find_blocks
from fxopt.backends.capture import CannotCapture
from fxopt.backends.exported import rewrite_block
from fxopt.kernels import counters, delayed
from fxopt.recipes import Recipe
from fxopt.report import Applied, Declined, Report
from fxopt.schedule import at_step
from fxopt.user_files import load

# Below this many rows a product is a modulation or an embedding, which stays in BF16.
MIN_FP8_TOKENS = 16

Progress = Callable[[int, int, str], None]
Inputs = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Block:
    """One block class of a model and what its forward takes; tensors may be on any device."""

    name: str
    count: int
    module: nn.Module
    args: tuple
    kwargs: Mapping[str, Any]


def explain(
    model: nn.Module | str,
    *,
    example_inputs: Inputs | None = None,
    target: str = "h100",
    recipe: str | Recipe = "bf16",
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    progress: Progress = lambda done, total, step: None,
) -> Report:
    """What `optimize` would do to `model`, with each block's roofline on `target`.

    Of a model that doors were opened on it looks at the forwards from before. A training that goes
    on meanwhile is left as it is.

    Args:
        model: a module, on any device, or the name of a preset.
        example_inputs: what the module's forward takes; only sizes and dtypes are read.
        target: name of a target in `hardware`.
        recipe: name of the recipe; of one with a schedule, the formats outside of its phases.
        batch, height, width: samples and pixels, for presets; None is the preset's own size.
        progress: called before each step with steps done, steps in all and the step's name.

    Raises:
        errors.UnknownPreset, errors.UnknownTarget, errors.UnknownRecipe: with the nearest names.
        errors.NotAModule, errors.InputMismatch: if the model or its inputs do not fit.
    """
    chosen = options.check(recipe=recipe).at(None)
    device = hardware.lookup(target)
    if not isinstance(model, (str, nn.Module)):
        raise errors.NotAModule(model)
    report = Report("explain", chosen.name, device.name, saved=chosen.saved)
    with _apart(model):
        if isinstance(model, str):
            blocks = preset_blocks(model, batch, height, width)
        else:
            blocks = model_blocks(model, example_inputs)
        for index, block in enumerate(blocks):
            progress(index, len(blocks), block.name)
            report = report.merge(_explain_block(block, chosen, device))
        progress(len(blocks), len(blocks), "done")
    return report


@contextlib.contextmanager
def _apart(model: nn.Module | str) -> Iterator[None]:
    """Leave a training alone that goes on meanwhile: its doors, histories, telemetry and step."""
    with contextlib.ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(state.shut(model))
        stack.enter_context(delayed.apart())
        stack.enter_context(counters.unwatched())
        # A history asks for a step; fake tensors are taken to have one.
        stack.enter_context(at_step(0))
        yield


def _explain_block(block: Block, recipe: Recipe, target: hardware.Target) -> Report:
    found, rewritten = _rewrite(block, recipe, target)
    forward, backward = traffic.count(block.module, block.args, block.kwargs)
    before = forward + backward
    after = sum(traffic.count(block.module, block.args, block.kwargs, rewritten), cost.Work())
    linears = {p.shape for p in forward.gemms if p.shape and p.shape[0] >= MIN_FP8_TOKENS}
    return Report(
        "explain",
        recipe.name,
        target.name,
        applied=tuple(_planned(a, block) for a in found.applied),
        declined=tuple(replace(d, block_class=block.name) for d in found.declined),
        attentions=tuple(replace(a, block_class=block.name) for a in found.attentions),
        totals={
            "glue_bytes_before": block.count * before.glue_bytes,
            "glue_bytes_after": block.count * after.glue_bytes,
            "saved_activation_bytes_before": block.count * before.saved_bytes,
            "saved_activation_bytes_after": block.count * after.saved_bytes,
        },
        blocks=(cost.block_cost(block.name, block.count, before, after, linears, target),),
    )


def _rewrite(
    block: Block, recipe: Recipe, target: hardware.Target
) -> tuple[Report, Callable[..., Any]]:
    """What `optimize` reports on the block and its rewritten forward, or its own if it has none."""
    with fakes.substituted(block.module, fakes.shell):
        args, kwargs = tree_map_only(Tensor, fakes.shell, (block.args, dict(block.kwargs)))
        try:
            rewritten = rewrite_block(block.module, args, kwargs, recipe, target, target)
        except CannotCapture as error:
            declined = Declined("capture", "", "", "", (str(error),))
            return Report("optimize", recipe.name, "meta", declined=(declined,)), block.module
    return rewritten.report, rewritten


def _planned(applied: Applied, block: Block) -> Applied:
    """`applied` for all blocks of the class."""
    return replace(
        applied,
        count=applied.count * block.count,
        bytes_saved=_times(applied.bytes_saved, block.count),
        flops=_times(applied.flops, block.count),
        block_class=block.name,
    )


def _times(of_block: int | None, count: int) -> int | None:
    return None if of_block is None else count * of_block


def preset_blocks(name: str, batch: int, height: int | None, width: int | None) -> list[Block]:
    """The blocks of a preset on the meta device."""
    from fxopt.presets import PRESETS

    if name not in PRESETS:
        raise errors.UnknownPreset(name, tuple(PRESETS))
    try:
        entries = PRESETS[name].blocks(batch, height, width)
    except ModuleNotFoundError as error:
        raise errors.MissingPackage(str(error.name), f"preset {name!r}", "models") from error
    with torch.device("meta"):
        built = [(entry, entry.build(), entry.inputs()) for entry in entries]
    classes = Counter(type(module).__name__ for _, module, _ in built)
    return [
        Block(_label(module, entry.name, classes), entry.count, module, (), inputs)
        for entry, module, inputs in built
    ]


def model_blocks(model: nn.Module, example_inputs: Inputs | None) -> list[Block]:
    """The distinct repeated blocks of `model`, with the inputs that they get from the example.

    Two blocks of one class are the same if their parameters and inputs have the same sizes.
    """
    candidates = find_blocks(model, None).values()
    named = isinstance(example_inputs, Mapping)
    args = () if named or example_inputs is None else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    errors.check_inputs(model, args, kwargs)
    calls: dict[Any, list] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = (*module.parameters(), *tree_leaves((args, kwargs)))
        sizes = tuple((t.shape, t.dtype) for t in tensors if isinstance(t, Tensor))
        calls.setdefault((type(module), sizes), []).append((module, args, kwargs))

    with contextlib.ExitStack() as hooks:
        for candidate in candidates:
            handle = candidate.register_forward_pre_hook(record, with_kwargs=True)
            hooks.callback(handle.remove)
        with fakes.faked(model, args, kwargs, "meta") as (fake_args, fake_kwargs):
            model(*fake_args, **fake_kwargs)
    classes = Counter(kind.__name__ for kind, _ in calls)
    names = {module: name for name, module in model.named_modules()}
    return [
        Block(_label(module, names[module], classes), len(found), module, args, kwargs)
        for found in calls.values()
        for module, args, kwargs in found[:1]
    ]


def _label(module: nn.Module, name: str, classes: Counter[str]) -> str:
    kind = type(module).__name__
    return kind if classes[kind] == 1 else f"{kind} ({name})"


def load_example(spec: str) -> tuple[nn.Module, Inputs]:
    """The model and inputs that FUNCTION of "FILE.py:FUNCTION" returns.

    Raises:
        errors.NotAnExample: saying what is wrong with the file, the function or its result.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise errors.NotAnExample(spec, f"there is no file {path!r}")
    module = load(path)
    if module is None:
        raise errors.NotAnExample(spec, f"{path!r} is not a Python file")
    function = getattr(module, name, None)
    if not callable(function):
        public = [n for n, value in vars(module).items() if callable(value)]
        close = errors.nearest(name, public)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise errors.NotAnExample(spec, f"{path} has no function {name!r}{hint}")
    result = function()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise errors.NotAnExample(spec, f"it returned {type(result).__name__}, not (model, inputs)")
    return result
