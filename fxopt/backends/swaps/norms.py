"""RMSNorms of any library, found by structure: a weight or none, and no children."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor, nn

from fxopt.backends.swaps.fused import fire, promoted, read_norm
from fxopt.backends.swaps.swap import Arguments, Draw, Swap
from fxopt.kernels.registration import ops


def candidates(module: nn.Module) -> Iterator[Swap]:
    argument = _argument(module)
    if argument is None:
        return
    for weight_offset in (0.0, 1.0):

        def forward(norm: nn.Module, weight_offset: float = weight_offset, **x: Tensor) -> Tensor:
            return normed(norm, x[argument], weight_offset)

        def examples(norm: nn.Module, draw: Draw) -> Iterator[Arguments]:
            for leading in ((draw.B, draw.S), (draw.B, draw.S, draw.T), (draw.S,)):
                yield {argument: draw.normal(*leading, _width(norm))}

        yield Swap(f"rms_norm + {weight_offset:g}", forward, examples)


def normed(norm: nn.Module, x: Tensor, weight_offset: float) -> Tensor:
    """RMSNorm of x [..., D] by the parameters of `norm`."""
    n = read_norm(norm, x, weight_offset)
    fire("rms_norm", "norm_modulate")
    operands = (x, None, None, n.weight, n.bias, None, None, None)
    dtype = promoted(x, n.weight, n.bias)
    return ops.norm_modulate(*operands, *n[:3], 0.0, x.dtype, dtype)[0]


def _argument(module: nn.Module) -> str | None:
    """The name of the one argument of what may be an RMSNorm over the last dim."""
    vectors = [p for p in module._parameters.values() if p is not None]
    if list(module.children()) or isinstance(module, nn.LayerNorm) or len(vectors) > 1:
        return None
    if any(v.dim() != 1 for v in vectors) or not any(
        n == "eps" or (isinstance(v, float) and 0 < v < 0.1) for n, v in vars(module).items()
    ):
        return None
    required = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return required[0] if len(required) == 1 else None


def _width(norm: nn.Module) -> int:
    shape = getattr(norm, "normalized_shape", (24,))
    return int(next((p.shape for p in norm.parameters()), shape)[0])
