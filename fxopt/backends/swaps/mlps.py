"""MLPs of any library, found by structure: two linears, or three, and an activation.

Which activation stands between, and which half it is applied to, is not read but tried.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends.swaps.branches import Mlp
from fxopt.backends.swaps.fused import is_plain, project
from fxopt.backends.swaps.swap import Arguments, Draw, Swap, Unfit
from fxopt.kernels.scaled_matmul import MULTIPLE

ACTIVATIONS = ("gelu_tanh", "silu", "gelu_erf", "relu", "sigmoid")
# Classes of diffusers' `FeedForward.net[0]` and of activations, and what they compute.
NAMES = {"SiLU": "silu", "SiLUActivation": "silu", "SwiGLU": "silu", "GELUTanh": "gelu_tanh"}

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def activation(module: nn.Module) -> str:
    """The name by which the ops know an activation module (or one that holds its projection)."""
    if type(module).__name__ in ("GELU", "GEGLU"):
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu_erf"
    name = NAMES.get(type(module).__name__)
    if name is None:
        raise Unfit(f"the activation {type(module).__name__} is none of {', '.join(ACTIVATIONS)}")
    return name


def feed_forward(ff: Any) -> Mlp:
    """diffusers' FeedForward: `net` is projection with activation, dropout, linear."""
    first, dropout, out, *last = ff.net
    if any(m.p > 0 for m in last):
        raise Unfit("a dropout with p > 0 stands behind the MLP")
    packing = "up_gate" if out.in_features * 2 == first.proj.out_features else "none"
    return Mlp((first.proj,), activation(first), packing, out, dropout)


def candidates(module: nn.Module) -> Iterator[Swap]:
    linears = [(path, m) for path, m in module.named_modules() if isinstance(m, nn.Linear)]
    if len(linears) not in (2, 3) or not all(is_plain(m) for _, m in linears):
        return
    others = [m for m in module.modules() if m not in dict(linears).values()]
    if any(p is not None for m in others for p in m._parameters.values()):
        return
    if any("head" in name for m in others for name in vars(m)):
        return  # an attention: it cuts features into heads
    shapes = {path: (m.in_features, m.out_features) for path, m in linears}
    arguments = list(inspect.signature(module.forward).parameters.values())
    required = [a for a in arguments if a.default is a.empty and a.kind not in VARIADIC]
    if not arguments or len(required) > 1:
        return
    for inputs, out, packings in _roles(shapes):
        for packing, name in itertools.product(packings, ACTIVATIONS):
            yield _swap(arguments[0].name, inputs, out, name, packing)


def _roles(
    shapes: dict[str, tuple[int, int]],
) -> Iterator[tuple[tuple[str, ...], str, Sequence[str]]]:
    """(inputs, out, packings) for each way to see these linears as an MLP."""
    for *inputs, out in itertools.permutations(shapes):
        width, (d, f) = shapes[out][0], shapes[inputs[0]]
        if f == width and all(shapes[path] == (d, f) for path in inputs):
            yield tuple(inputs), out, ("none",)
        elif len(inputs) == 1 and f == 2 * width:
            yield tuple(inputs), out, ("up_gate", "gate_up")


def _swap(argument: str, inputs: tuple[str, ...], out: str, name: str, packing: str) -> Swap:
    def forward(module: nn.Module, **arguments: Tensor) -> Tensor:
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
            raise Unfit("a dropout with p > 0 stands between the linears")
        linears = tuple(module.get_submodule(path) for path in inputs)
        x = arguments[argument]
        mlp = Mlp(linears, name, packing, module.get_submodule(out)).holding(x)
        return mlp(project(x, *mlp.inputs))

    def examples(module: nn.Module, draw: Draw) -> Iterator[Arguments]:
        width = module.get_submodule(inputs[0]).in_features
        for leading in ((draw.B, draw.S), (draw.S,)):
            yield {argument: draw.normal(*leading, width)}  # type: ignore[arg-type]

    def small(module: nn.Module) -> nn.Module:
        return _narrow(module, module.get_submodule(out).in_features)  # type: ignore[arg-type]

    return Swap(f"mlp {inputs} {out} {name} {packing}", forward, examples, small)


def _narrow(module: nn.Module, hidden: int) -> nn.Module:
    """A copy whose features are few; `hidden` of them stand between activation and last linear.

    Multiples of what the matrix units take stay multiples, as the proof notes what is quantized.
    """
    narrow = 32 if hidden % MULTIPLE == 0 else 24 if 2 * hidden % MULTIPLE == 0 else 20
    few = {hidden: narrow, 2 * hidden: 2 * narrow}
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    memo: dict[int, Any] = {}
    for linear in linears:
        for size in (linear.in_features, linear.out_features):
            even = MULTIPLE * (3 + len(few))
            few.setdefault(size, even if size % MULTIPLE == 0 else even + 4)
        for p in linear.parameters():
            shape = [few[size] for size in p.shape]
            memo[id(p)] = nn.Parameter(torch.empty(shape, device="cpu"))
    twin = copy.deepcopy(module, memo)
    for linear in (m for m in twin.modules() if isinstance(m, nn.Linear)):
        linear.out_features, linear.in_features = linear.weight.shape
    return twin
